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

__all__ = ["answers_of"]

Progress = Callable[[int, int], None]
_FILES = (".npz", ".npy", ".parquet", ".json", ".jsonl")


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
    if name.lower().endswith(_FILES) and not name.startswith(("http://", "https://")):
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
    if name.startswith(("http://", "https://")):
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
