"""`hf-watermark references`."""

from __future__ import annotations

import os

import click

from hf_watermark.cli.terminal import CONTEXT, FOUND, echo_json, format_options, progress_bar

__all__ = ["references"]


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
    """  # noqa: D301
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
            progress=progress,
        )
    if form == "json":
        echo_json({"folder": out, "students": bank.entries})
    elif form == "quiet":
        click.echo(out)
    else:
        for name, entry in bank.entries.items():
            click.echo(f"{name}  sha256 {entry['sha256'][:16]}  {entry['epochs']} epochs")
    return FOUND
