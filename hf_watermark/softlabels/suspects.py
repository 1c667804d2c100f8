"""A suspect by its name: a file of outputs, an endpoint, a folder, a repo on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_watermark.errors import OutputsError
from hf_watermark.softlabels.answer_lists import is_named, scores_by_class
from hf_watermark.softlabels.output_files import read_output_file
from hf_watermark.softlabels.probes import Probes

__all__ = ["answers_of", "named"]

Progress = Callable[[int, int], None]
_FILES = (".npz", ".npy", ".parquet", ".json", ".jsonl")
_URLS = ("http://", "https://")


def named(
    suspect: str | os.PathLike[str], revision: str | None = None, token: str | None = None
) -> tuple[str, str | None]:
    """What evidence calls a suspect, and the commit of a repo, to ask it at that very commit.

    Args:
        suspect: As in `answers_of`.
        revision: Of a repo: branch, tag or commit.
        token: For the Hub.

    Returns:
        The name, without credentials of a URL; and the full sha, None for anything but a repo.

    Raises:
        HubError: If the repo is not to be found.
        OutputsError: If the URL is none.
    """
    name = os.fspath(suspect)
    if name.startswith(_URLS):
        from hf_watermark.softlabels.endpoint import Endpoint

        return Endpoint(name).name, None
    if name.lower().endswith(_FILES) or os.path.isdir(name):
        return name, None
    from hf_watermark.hub import open_files

    files = open_files(name, revision, token)
    return files.name, files.revision


def answers_of(
    suspect: str | os.PathLike[str],
    probes: Probes,
    images: Any = None,
    *,
    column: str | None = None,
    log: str | os.PathLike[str] | None = None,
    form: str = "bytes",
    revision: str | None = None,
    processor: str | os.PathLike[str] | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Any:
    """A suspect's outputs on probes, for `verify_outputs`.

    Args:
        suspect: A file of outputs (see `read_output_file`), the URL of an endpoint (see
            `Endpoint`), or a folder or `org/name` of a model (see `Classifier`).
        probes: Their `labels` are what the suspect calls the classes.
        images: The probes' images, in their order: see `ProbeImages`. Files need none.
        column: Which column of `images`.
        log: Where an endpoint's answers are kept, to go on from there.
        form: How an endpoint is asked.
        revision: Of a repo.
        processor: For a model without one.
        token: For the endpoint, or the Hub.
        progress: Called with images answered and planned.

    Raises:
        WatermarkError: If it cannot be asked, or answers what cannot be read.
    """
    name = os.fspath(suspect)
    if name.lower().endswith(_FILES) and not name.startswith(_URLS):
        found: Any = read_output_file(name)
        return scores_by_class(found, probes.labels) if is_named(found) else found
    if images is None:
        raise OutputsError(
            f"{name[:200]!r} can only be asked about images",
            expected=f"the {len(probes)} images of the probes (--images PATH)",
            got="none",
            do=f"a file of outputs ends in {', '.join(_FILES)}",
        )
    from hf_watermark.softlabels.probe_images import ProbeImages

    pictures = images if isinstance(images, ProbeImages) else ProbeImages(images, column)
    if len(pictures) != len(probes):
        raise OutputsError(
            "The images are not those of the probes",
            expected=f"{len(probes)} images",
            got=len(pictures),
        )
    if name.startswith(_URLS):
        from hf_watermark.softlabels.endpoint import Endpoint

        ask = Endpoint(
            name, form=form, token=token, top_k=probes.classes, log=log, progress=progress
        )
        found = ask(pictures)
        if not is_named(found):
            raise OutputsError(
                f"{ask.name} answers no lists of labels and scores", got=ascii(found[0])[:100]
            )
        return scores_by_class(found, probes.labels)
    from hf_watermark.softlabels.classifiers import Classifier

    model = Classifier(
        Path(name) if os.path.isdir(name) else name,
        revision=revision,
        token=token,
        processor=processor,
    )
    return model.answers(pictures, probes.labels, progress=progress)
