"""`verify_hub_model`, the same as `hf-watermark verify`, and `hf-watermark card`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_watermark.cli.terminal import (
    CONTEXT,
    FOUND,
    NOT_FOUND,
    align_option,
    echo_json,
    format_options,
    load_key,
    progress_bar,
    refuse,
)
from hf_watermark.cli.words import in_words
from hf_watermark.errors import SchemeError, WatermarkError

if TYPE_CHECKING:
    from hf_watermark.evidence import Claim, Evidence

__all__ = ["card", "verify"]

_HELP = """Whether a model on the Hub, or in a folder, carries the mark of a key.

REPO is org/name or a local folder. Reads a few ranges of its safetensors; runs none of its code.
Exit status: 0 found, 1 not found, 2 could not be checked.

\b
Example:
  verify_hub_model acme/vit --key acme.key
  verify_hub_model thief/vit-copy --key acme.key --claim acme/vit --json
  verify_hub_model acme/vit            (no key: the claim's signature and digests)
"""


@click.command("verify", help=_HELP, context_settings=CONTEXT)
@click.argument("repo")
@click.option("--key", "key_file", metavar="FILE", help="The owner's key file.")
@click.option("--revision", metavar="R", help="Branch, tag or commit.")
@click.option(
    "--alpha",
    type=float,
    default=1e-6,
    show_default=True,
    metavar="A",
    help="The chance of a false alarm that is accepted, all tries counted.",
)
@click.option(
    "--claim", metavar="FILE|REPO", help="The owner's claim: a file, or the owner's repo."
)
@click.option("--recipient", metavar="NAME", help="Look for the copy that was handed to NAME.")
@align_option
@click.option(
    "--read",
    type=click.Choice(["auto", "all"]),
    default="auto",
    show_default=True,
    help="Stop when it is certain, or read all carriers.",
)
@click.option("--write-card", is_flag=True, help="Write the evidence into the model card.")
@click.option("--create-pr", is_flag=True, help="Write the card as a pull request.")
@click.option("--report", metavar="FILE.html", help="Write a page that explains the outcome.")
@format_options
@click.option("--token", metavar="T", help="A token for private repos; default: the saved one.")
def verify(
    repo: str,
    key_file: str | None,
    revision: str | None,
    alpha: float,
    claim: str | None,
    recipient: str | None,
    align: str,
    read: str,
    write_card: bool,
    create_pr: bool,
    report: str | None,
    form: str,
    token: str | None,
) -> int:
    """See `_HELP`, which is what `--help` prints."""
    from hf_watermark.verify import verify as check

    writing = write_card or create_pr
    if key_file is None and (recipient is not None or writing):
        raise SchemeError(
            "--recipient, --write-card and --create-pr need the owner's key", do="pass --key FILE"
        )
    key = None if key_file is None else load_key(key_file)
    with progress_bar(f"Reading {repo}") as progress:
        done = check(
            repo,
            key,
            claim=claim,
            recipient=recipient,
            alpha=alpha,
            revision=revision,
            align=align,
            read=read,
            token=token,
            progress=progress,
        )
    evidence = done.evidence
    if form == "json":
        echo_json(evidence.to_dict())
    elif form == "quiet":
        click.echo(evidence.verdict)
    else:
        click.echo(in_words(evidence, done.claim))
    if report is not None:
        _write_report(report, evidence, done.claim)
    if evidence.verdict == "not checked":
        return refuse(
            "Ownership was not tested; expected the owner's key; got none. Pass --key FILE"
        )
    if writing:
        if evidence.found:
            from hf_watermark.publish import write_card as publish

            to: dict[str, Any] = {"revision": revision, "token": token, "create_pr": create_pr}
            click.echo(
                f"The card is in {publish(done.files, evidence, done.claim, **to)}", err=True
            )
        else:
            click.echo("Nothing was written to the card: the mark was not found.", err=True)
    return FOUND if evidence.found else NOT_FOUND


@click.command(context_settings=CONTEXT)
@click.argument("repo")
@click.option("--key", "key_file", metavar="FILE", required=True, help="The owner's key file.")
@click.option("--revision", metavar="R", help="Branch, tag or commit.")
@click.option("--claim", metavar="FILE|REPO", help="The owner's claim.")
@click.option("--token", metavar="T", help="A token for private repos.")
def card(
    repo: str, key_file: str, revision: str | None, claim: str | None, token: str | None
) -> int:
    """Print the model card with the evidence in it; write nothing.

    \b
    Example:
      hf-watermark card acme/vit --key acme.key > README.md
    """  # noqa: D301
    from hf_watermark.card import updated_card
    from hf_watermark.publish import read_card_text
    from hf_watermark.verify import verify as check

    done = check(repo, load_key(key_file), claim=claim, revision=revision, token=token, read="all")
    if not done.evidence.found:
        click.echo("The mark was not found: the card was not changed.", err=True)
        return NOT_FOUND
    public = None if done.claim is None else done.claim.public
    click.echo(updated_card(read_card_text(done.files), done.evidence, public), nl=False)
    return FOUND


def _write_report(path: str, evidence: Evidence, claim: Claim | None) -> None:
    from hf_watermark.report import html_report

    try:
        Path(path).write_text(html_report(evidence, claim), encoding="utf-8")
    except OSError as error:
        raise WatermarkError(
            f"The report cannot be written to {path}", got=error.strerror, do="choose another path"
        ) from None
    click.echo(f"The report is in {path}", err=True)
