"""`hf-watermark verify-outputs`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hf_watermark.cli.terminal import (
    CONTEXT,
    FOUND,
    NOT_FOUND,
    echo_json,
    format_options,
    load_key,
    progress_bar,
)
from hf_watermark.errors import WatermarkError

if TYPE_CHECKING:
    from hf_watermark.softlabels.verification import OutputEvidence

__all__ = ["verify_outputs"]


@click.command("verify-outputs", context_settings=CONTEXT)
@click.argument("suspect")
@click.option("--key", "key_file", metavar="FILE", required=True, help="The owner's key file.")
@click.option(
    "--probes",
    "probes_file",
    metavar="FILE",
    required=True,
    help="What served.probes(pixel_values).save(FILE) wrote.",
)
@click.option(
    "--images",
    "images_at",
    metavar="PATH",
    help="The probes' images, in their order: a folder of images, parquet, or a saved dataset.",
)
@click.option("--column", metavar="NAME", help="The column of the images, if it is not clear.")
@click.option(
    "--recipient", "names", metavar="NAME", multiple=True, help="A customer to suspect; repeatable."
)
@click.option("--recipients", metavar="FILE", help="Customers, one name a line.")
@click.option(
    "--reference",
    "references",
    metavar="FILE",
    multiple=True,
    help="A clean model's outputs on the same probes; repeatable.",
)
@click.option(
    "--alpha",
    type=float,
    default=1e-6,
    show_default=True,
    metavar="A",
    help="The chance of a false alarm that is accepted, all tries counted.",
)
@click.option(
    "--labels",
    metavar="FILE",
    help="What the suspect calls your classes, one a line, in your model's order.",
)
@click.option(
    "--answers", metavar="FILE.jsonl", help="Keep an endpoint's answers, and go on from them."
)
@click.option(
    "--form",
    "body",
    type=click.Choice(["bytes", "json"]),
    default="bytes",
    show_default=True,
    help="How an endpoint is sent an image: as it is, or as base64 in JSON.",
)
@click.option("--revision", metavar="R", help="Of a repo: branch, tag or commit.")
@click.option("--processor", metavar="DIR", help="A preprocessor_config.json for a model without.")
@click.option("--token", metavar="T", help="For the endpoint, or the Hub.")
@format_options
def verify_outputs(
    suspect: str,
    key_file: str,
    probes_file: str,
    images_at: str | None,
    column: str | None,
    names: tuple[str, ...],
    recipients: str | None,
    references: tuple[str, ...],
    alpha: float,
    labels: str | None,
    answers: str | None,
    body: str,
    revision: str | None,
    processor: str | None,
    token: str | None,
    form: str,
) -> int:
    """Whether a suspect learnt from your soft labels, from its outputs alone.

    SUSPECT is a file of outputs, one row for every probe, in the probes' order (.npz, .npy,
    .parquet: probabilities, their logarithms, or labels; .json: label/score lists; rounded or top-k
    as they may be). Or, with --images: the URL of an endpoint that classifies what is posted to it;
    a folder or org/name of a model, which is run here, without code of its own.
    Exit status: 0 found, 1 not found, 2 could not be checked.

    \b
    Example:
      hf-watermark verify-outputs answers.npz --key acme.key --probes acme.probes
      hf-watermark verify-outputs answers.parquet --key acme.key --probes acme.probes \\
          --recipients customers.txt --json
      hf-watermark verify-outputs https://thief.example/classify --key acme.key \\
          --probes acme.probes --images ./probes --answers thief.jsonl
      hf-watermark verify-outputs thief/vit-copy --key acme.key --probes acme.probes \\
          --images ./probes
    """  # noqa: D301
    from hf_watermark.softlabels.output_files import read_output_file
    from hf_watermark.softlabels.probes import Probes
    from hf_watermark.softlabels.suspects import answers_of, named
    from hf_watermark.verify import verify_outputs as check

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    suspects = [*names, *([] if recipients is None else _lines(recipients))]
    key = load_key(key_file)
    probes = Probes.load(probes_file, key)
    name, commit = named(suspect, revision, token) if images_at else (suspect, None)
    with progress_bar(f"Asking {name}") as progress:
        outputs = answers_of(
            suspect,
            probes if labels is None else dataclasses.replace(probes, labels=tuple(_lines(labels))),
            images_at,
            column=column,
            log=answers,
            form=body,
            revision=commit or revision,
            processor=processor,
            token=token,
            progress=progress,
        )
    evidence = check(
        outputs,
        None,
        probes,
        [read_output_file(one) for one in references],
        suspects or None,
        alpha,
    )
    evidence = dataclasses.replace(evidence, suspect=name, revision=commit)
    if form == "json":
        echo_json(evidence.to_dict())
    elif form == "human":
        click.echo(_in_words(evidence))
    return FOUND if evidence.found else NOT_FOUND


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise WatermarkError(
            f"The names in {path} cannot be read", got=getattr(error, "strerror", "no UTF-8")
        ) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _in_words(evidence: OutputEvidence) -> str:
    from hf_watermark.report import chance_in_words, rounded_up

    colour = "green" if evidence.found else "yellow"
    lines = [
        click.style(evidence.verdict.upper(), fg=colour, bold=True) + f"  {evidence.suspect}",
        "",
    ]
    whose = "the owner" if evidence.recipient is None else repr(evidence.recipient)
    odds = chance_in_words(evidence.log10_p)
    lines.append(
        f"  A chance of at most {odds} that a model which never learnt from answers\n"
        f"  to {whose} agrees this well (log10 p {rounded_up(evidence.log10_p):.2f}, all "
        f"{evidence.tries} tries counted)."
    )
    more = evidence.probes_needed
    rows = [
        ("t", f"{evidence.t:.2f} standard deviations"),
        ("outputs", evidence.outputs),
        ("probes", f"{evidence.probes}"),
        ("reading", evidence.reading),
        ("beside", f"{evidence.references} clean models"),
        ("key", evidence.key_fingerprint),
    ]
    if evidence.revision is not None:
        rows.insert(0, ("commit", evidence.revision))
    lines += ["", *(f"  {name:<9} {value}" for name, value in rows), ""]
    if not evidence.found:
        enough = "no estimate" if more is None else f"about {more} probes (an estimate)"
        lines.append(f"  Enough to reach p = {evidence.alpha:g}: {enough}.")
    lines += [f"  {note}" for note in evidence.notes]
    lines.append(
        "  Not proven by this: who gave the answers away. That rests on who had them."
        if evidence.found
        else "  Not proven by this: that the model is independent. Students trained on labels\n"
        "  alone carry nothing unless margin mode was on."
    )
    return "\n".join(lines)
