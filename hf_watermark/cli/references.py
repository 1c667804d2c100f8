"""`hf-watermark references`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from hf_watermark.cli.terminal import (
    CONTEXT,
    FOUND,
    echo_json,
    format_options,
    load_key,
    progress_bar,
)
from hf_watermark.errors import WatermarkError

if TYPE_CHECKING:
    from hf_watermark.softlabels.classifiers import Classifier
    from hf_watermark.softlabels.references import ReferenceBank

__all__ = ["references"]

_ALIKE = 0.9  # of the probes: what a processor of another version may leave


@click.command(context_settings=CONTEXT)
@click.argument("model")
@click.option(
    "--data",
    metavar="PATH",
    required=True,
    help="Unlabelled images like a customer's: a folder of them, parquet, or a saved dataset.",
)
@click.option(
    "--arch",
    "architectures",
    metavar="ARCH",
    multiple=True,
    required=True,
    help="A model type (resnet), a folder with a config.json, or org/name; repeatable.",
)
@click.option("--out", metavar="DIR", required=True, help="The bank's folder.")
@click.option("--column", metavar="NAME", help="The column of the images, if it is not clear.")
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--learning-rate", type=float, default=2e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--hard-labels",
    is_flag=True,
    help="Teach the most likely class alone: what margin mode is read against.",
)
@click.option(
    "--probes",
    "probes_file",
    metavar="FILE",
    help="Add the students' answers to these probes, each once; needs --key and --images.",
)
@click.option("--key", "key_file", metavar="FILE", help="The owner's key file, for --probes.")
@click.option(
    "--images", "images_at", metavar="PATH", help="The probes' images, in their order, like --data."
)
@click.option("--revision", metavar="R", help="Of MODEL, if it is a repo.")
@click.option("--processor", metavar="DIR", help="A preprocessor_config.json for a model without.")
@click.option("--token", metavar="T", help="A token for private repos.")
@format_options
def references(
    model: str,
    data: str,
    architectures: tuple[str, ...],
    out: str,
    column: str | None,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    hard_labels: bool,
    probes_file: str | None,
    key_file: str | None,
    images_at: str | None,
    revision: str | None,
    processor: str | None,
    token: str | None,
    form: str,
) -> int:
    """Distil clean students of your own model, for later checks to allow for.

    MODEL is the unmarked model, a folder or org/name. Do it before any dispute: bank.json records
    the digests of what was made, from what. Interrupted, the same command goes on.

    \b
    Example:
      hf-watermark references ./vit --data ./queries --arch resnet --arch acme/small-swin \\
          --out ./references
      hf-watermark references ./vit --data ./queries --arch resnet --out ./references \\
          --probes acme.probes --images ./probes --key acme.key
    """  # noqa: D301
    given = [one is not None for one in (probes_file, key_file, images_at)]
    if any(given) and not all(given):
        raise click.UsageError("--probes, --key and --images go together")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch

    from hf_watermark.softlabels.architectures import new_bank
    from hf_watermark.softlabels.classifiers import Classifier
    from hf_watermark.softlabels.probe_images import ProbeImages

    teacher = Classifier(model, revision=revision, token=token, processor=processor)
    pixel_values = torch.cat(list(teacher.pixel_values(ProbeImages(data, column))))
    bank = new_bank(out, architectures, teacher.classes, pixel_values, token)
    with progress_bar(f"Distilling {len(architectures)} students") as progress:
        bank.distil(
            teacher.model,
            pixel_values,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            hard_labels=hard_labels,
            progress=progress,
        )
    held = None
    if probes_file is not None and key_file is not None and images_at is not None:
        held = _add(bank, teacher, probes_file, key_file, images_at, column)
    if form == "json":
        echo_json(
            {"folder": out, "students": bank.entries}
            | ({} if held is None else {"probes": probes_file, "references": held})
        )
    elif form == "quiet":
        click.echo(out)
    else:
        for name, entry in bank.entries.items():
            click.echo(f"{name}  sha256 {entry['sha256'][:16]}  {entry['epochs']} epochs")
        if held is not None:
            click.echo(f"{probes_file} holds {held} references beside your model")
    return FOUND


def _add(
    bank: ReferenceBank,
    teacher: Classifier,
    probes_file: str,
    key_file: str,
    images_at: str,
    column: str | None,
) -> int:
    """Put the bank's answers into a file of probes; how many references it then holds."""
    import torch

    from hf_watermark.softlabels.probe_images import ProbeImages
    from hf_watermark.softlabels.probes import Probes

    probes = Probes.load(probes_file, load_key(key_file))
    images = ProbeImages(images_at, column)
    own = teacher.answers(images, teacher.names)
    alike = own.shape == probes.log_probs.shape and float(
        (own.argmax(axis=1) == probes.log_probs.argmax(axis=1)).mean()
    )
    if not alike >= _ALIKE:
        raise WatermarkError(
            "These are not the probes' images, or not in their order, or the probes are another "
            "model's",
            expected=f"MODEL's own answers to {len(probes)} images, as {probes_file} has them",
            got=f"{len(images)} images, {alike:.0%} alike",
        )
    pixel_values = torch.cat(list(teacher.pixel_values(images)))
    with_bank = bank.added_to(probes, pixel_values)
    with_bank.save(probes_file)
    return len(with_bank.references)
