"""`hf-watermark stress`: does the mark survive?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hf_watermark.cli.terminal import (
    CONTEXT,
    FOUND,
    NOT_CHECKED,
    NOT_FOUND,
    echo_json,
    format_options,
    load_key,
)

__all__ = ["stress"]


def _list(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from hf_watermark.stress.suite import ATTACKS

    width = max(len(attack.name) for attack in ATTACKS)
    for attack in ATTACKS:
        suite = "quick" if attack.quick else "full "
        click.echo(f"{attack.name:<{width}}  {suite}  {attack.family}: {attack.source}")
    context.exit(FOUND)


@click.command(context_settings=CONTEXT)
@click.argument("model")
@click.option("--key", "key_file", metavar="FILE", required=True, help="The owner's key file.")
@click.option(
    "--data",
    metavar="PATH",
    required=True,
    help="Labelled images of the task: a folder a class, parquet, or a saved dataset. Parts train "
    "and test are kept; otherwise a third is held out.",
)
@click.option("--out", metavar="DIR", required=True, help="For stress.json, .md and .png.")
@click.option("--suite", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--attacks", metavar="A,B", help="These alone, of either suite.")
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Name them all."
)
@click.option("--claim", metavar="FILE|REPO", help="The owner's claim [default: MODEL's].")
@click.option("--alpha", type=float, default=1e-6, show_default=True, metavar="A")
@click.option("--column", metavar="NAME", help="The column of the images, if it is not clear.")
@click.option("--limit", type=click.IntRange(1), help="The most images of either part.")
@click.option("--epochs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=64, show_default=True)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0.0, min_open=True),
    default=1e-4,
    show_default=True,
    help='AdamW\'s at "1x": the rate the model was trained with.',
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="To attack on: cuda, mps.")
@click.option("--revision", metavar="R", help="Of MODEL, if it is a repo.")
@click.option("--token", metavar="T", help="A token for private repos.")
@format_options
def stress(
    model: str,
    key_file: str,
    data: str,
    out: str,
    suite: str,
    attacks: str | None,
    claim: str | None,
    alpha: float,
    column: str | None,
    limit: int | None,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
    revision: str | None,
    token: str | None,
    form: str,
) -> int:
    """Try to remove your own mark, and tell what survives.

    MODEL is a marked image classifier of transformers, a folder or org/name. Every attack works on
    a copy, without the key; what it leaves is read as `verify` reads it. Interrupted, the same
    command goes on. Exit status: 0 the mark stood every attack that leaves accuracy within 5
    points, 1 some attack removed it, 2 it could not be checked.

    \b
    Example:
      hf-watermark stress ./vit-marked --key acme.key --data ./images --out ./stress
      hf-watermark stress ./vit-marked --key acme.key --data ./images --out ./stress \\
          --attacks prune-80,all-disguises --learning-rate 5e-5
    """  # noqa: D301
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # deepspeed, where it is installed, is imported on saving, and then talks on stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from hf_watermark.stress.suite import attacks_of

    names = None if attacks is None else [name.strip() for name in attacks.split(",")]
    chosen = attacks_of(suite, names)
    from hf_watermark.stress.examples import attackers_and_test
    from hf_watermark.stress.outcomes import Outcome
    from hf_watermark.stress.plot import check_matplotlib
    from hf_watermark.stress.results import write_results
    from hf_watermark.stress.runner import Settings, Stress
    from hf_watermark.stress.table import in_words, one_line
    from hf_watermark.stress.victims import Victim

    check_matplotlib()
    key = load_key(key_file)
    victim = Victim(model, revision=revision, token=token, device=device)
    training, test = attackers_and_test(data, victim, seed=seed, column=column, limit=limit)
    settings = Settings(seed, epochs, learning_rate, batch_size, alpha)
    run = Stress(victim, key, training, test, settings, claim)

    def say(outcome: Outcome, number: int, planned: int) -> None:
        click.echo(f"[{number}/{planned}] {one_line(outcome)}", err=True)

    folder = Path(out)
    record = run.run(chosen, folder, say)
    write_results(record, folder)
    done = record.of(tuple(attack.name for attack in chosen))
    if form == "json":
        content: dict[str, Any] = done.to_dict()
        echo_json(content)
    elif form == "quiet":
        click.echo(" ".join(done.removed))
    else:
        click.echo(in_words(done))
        click.echo(f"stress.json, stress.md and stress.png are in {folder}", err=True)
    if done.removed:
        return NOT_FOUND
    return NOT_CHECKED if done.failed else FOUND
