"""`hf-watermark demo`."""

from __future__ import annotations

from pathlib import Path

import click

from hf_watermark.cli.terminal import CONTEXT, FOUND
from hf_watermark.errors import WatermarkError

__all__ = ["demo"]


@click.command(context_settings=CONTEXT)
@click.option(
    "--out",
    default="demo-output",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Folder for models, the loopback Hub's repos, keys and cards; emptied first.",
)
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1, 20))
def demo(out: str, seeds: int) -> int:
    """The whole way on this machine, without network: train, push, verify, card.

    Fine-tunes a small ViT on scikit-learn's digits with a mark and without, pushes it to a Hub on
    127.0.0.1, and verifies it there with the right key and with a wrong one.

    \b
    Example:
      hf-watermark demo --out demo-output
    """  # noqa: D301
    try:
        from hf_watermark.demo import run
    except ModuleNotFoundError as error:
        raise WatermarkError(
            "The demo needs more packages",
            got=f"no {error.name}",
            do="pip install hf-watermark[demo]",
        ) from None
    table = run(Path(out), seeds, lambda line: click.echo(line, err=True))
    click.echo(table)
    return FOUND
