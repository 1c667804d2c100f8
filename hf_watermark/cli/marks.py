"""`hf-watermark embed`, marks without training, and `hf-watermark trace`, whose copy it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

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
)
from hf_watermark.errors import ClaimError, SchemeError

if TYPE_CHECKING:
    from hf_watermark.direct import Embedded
    from hf_watermark.evidence import Claim
    from hf_watermark.scan import Trace

__all__ = ["embed", "trace"]


@click.command(context_settings=CONTEXT)
@click.argument("source")
@click.option("--key", "key_file", metavar="FILE", required=True, help="The owner's key file.")
@click.option("--out", metavar="DIR", help="A new folder for the marked checkpoint.")
@click.option("--push", metavar="REPO", help="A repo on the Hub to push it to.")
@click.option("--bits", type=int, default=None, help="Length of the message [default: 64].")
@click.option("--recipient", metavar="NAME", help="Mark this copy for NAME too.")
@click.option(
    "--carriers",
    metavar="A,B",
    help="Tensors that carry the mark, by names or patterns, in place of the default ones. The "
    "public claim keeps them secret; needs --own-claim.",
)
@click.option("--own-claim", metavar="FILE", help="For the owner's copy of the claim; keep it.")
@click.option("--revision", metavar="R", help="Of SOURCE, if it is a repo.")
@click.option("--token", metavar="T", help="A token for private repos and for --push.")
@format_options
def embed(
    source: str,
    key_file: str,
    out: str | None,
    push: str | None,
    bits: int | None,
    recipient: str | None,
    carriers: str | None,
    own_claim: str | None,
    revision: str | None,
    token: str | None,
    form: str,
) -> int:
    """Mark a checkpoint on disk, without data and without training.

    SOURCE is a folder, or org/name on the Hub. Only the carriers' bytes change; watermark.json is
    added. With --push the evidence is read back from the Hub and written into the card.

    \b
    Example:
      hf-watermark embed ./vit --key acme.key --out ./vit-marked
      hf-watermark embed ./vit --key acme.key --recipient customer-17 --push acme/vit-c17
      hf-watermark embed ./vit --key acme.key --out ./vit-marked \\
          --carriers '*.attention.output.*.weight' --own-claim acme-vit.json
    """  # noqa: D301
    from hf_watermark.direct import embed_checkpoint
    from hf_watermark.scheme import Scheme

    if (out is None) == (push is None):
        raise SchemeError("Say where to write", expected="either --out DIR or --push REPO")
    if carriers is not None and own_claim is None:
        raise SchemeError(
            "Carriers that you name are in no public claim",
            expected="--own-claim FILE, for the copy that verifying takes",
        )
    kept = None if own_claim is None else _free_file(own_claim)
    key = load_key(key_file)
    with tempfile.TemporaryDirectory() as temporary, progress_bar(f"Marking {source}") as progress:
        folder = Path(temporary) / "marked" if out is None else Path(out)
        done = embed_checkpoint(
            source,
            key,
            folder,
            scheme=None if bits is None else Scheme(bits=bits),
            carriers=None if carriers is None else [one.strip() for one in carriers.split(",")],
            recipient=recipient,
            revision=revision,
            token=token,
            progress=progress,
        )
        where = str(folder)
        if kept is not None:
            _write_own(kept, done.claim)
        if push is not None:
            from hf_watermark.publish import push_folder

            where = push_folder(push, folder, key, done.claim, token=token)
    if done.kept_claim is not None:
        click.echo(f"Another owner's claim was kept as {done.kept_claim}.", err=True)
    if done.unmarked:
        listed = ", ".join(done.unmarked[:5])
        click.echo(f"warning: these may hold the weights too, unmarked: {listed}", err=True)
    _tell(done, where, form)
    return FOUND


def _free_file(name: str) -> Path:
    """Where the owner's claim can be written; what is there already may be another model's."""
    from hf_watermark.safetensors_ranges import quoted

    path = Path(name).expanduser()
    if path.exists() or not path.parent.is_dir():
        raise ClaimError(
            f"The owner's claim cannot be written to {quoted(name, 200)}",
            expected="a new file in a folder that is there",
            got="something of that name" if path.exists() else "no such folder",
        )
    return path


def _write_own(path: Path, claim: Claim) -> None:
    from hf_watermark.key import write_secret_file
    from hf_watermark.safetensors_ranges import quoted

    try:
        write_secret_file(path, claim.to_bytes())
    except OSError as error:
        raise ClaimError(
            f"The owner's claim cannot be written to {quoted(str(path), 200)}",
            got=error.strerror or type(error).__name__,
        ) from None


def _tell(done: Embedded, where: str, form: str) -> None:
    if form == "json":
        echo_json(
            {
                "output": where,
                "scheme": done.claim.scheme,
                "carriers": [claimed.name for claimed in done.claim.carriers],
                "margin": done.margin,
                "log10_p": done.log10_p,
                "largest_change": done.largest_change,
                "unchanged": done.unchanged,
            }
        )
    elif form == "quiet":
        click.echo(where)
    elif done.unchanged:
        click.echo(f"{where}: this key's mark was there already; no weight was changed.")
    else:
        click.echo(
            f"{where}: marked {len(done.claim.carriers)} tensors; the largest changed by "
            f"{done.largest_change:.2%} of its size. log10 p of the whole reading is "
            f"{done.log10_p:.1f}."
        )


@click.command(context_settings=CONTEXT)
@click.argument("repo")
@click.option("--key", "key_file", metavar="FILE", required=True, help="The owner's key file.")
@click.option(
    "--recipients",
    metavar="FILE",
    required=True,
    type=click.File(encoding="utf-8-sig"),
    help="The names that copies were marked for, one a line, in UTF-8.",
)
@click.option("--claim", metavar="FILE|REPO", help="The owner's claim.")
@click.option("--alpha", type=float, default=1e-6, show_default=True, metavar="A")
@align_option
@click.option("--revision", metavar="R", help="Branch, tag or commit.")
@click.option("--token", metavar="T", help="A token for private repos.")
@format_options
def trace(
    repo: str,
    key_file: str,
    recipients: TextIO,
    claim: str | None,
    alpha: float,
    align: str,
    revision: str | None,
    token: str | None,
    form: str,
) -> int:
    """Name the recipient whose copy a model is.

    Exit status: 0 somebody was named, 1 nobody was, 2 could not be checked.

    \b
    Example:
      hf-watermark trace thief/vit-copy --key acme.key --recipients customers.txt
      hf-watermark trace thief/disguised --key acme.key --recipients customers.txt \\
          --claim acme/vit-original
    """  # noqa: D301
    from hf_watermark.scan import trace as find

    names = _names_in(recipients)
    key = load_key(key_file)
    with progress_bar(f"Tracing {repo}") as progress:
        done = find(
            repo,
            key,
            names,
            claim=claim,
            alpha=alpha,
            align=align,
            revision=revision,
            token=token,
            progress=progress,
        )
    if form == "json":
        echo_json(done.to_dict())
    elif form == "quiet":
        click.echo(done.recipient or "")
    else:
        click.echo(_named(done, len(names)))
        if done.note:
            click.echo(done.note, err=True)
    return FOUND if done.found else NOT_FOUND


def _names_in(file: TextIO) -> list[str]:
    """The names of a list; editors' byte order marks, line ends and blank lines are no names."""
    from hf_watermark.safetensors_ranges import quoted

    try:
        return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        raise SchemeError(
            f"The list of recipients {quoted(file.name, 300)} cannot be read",
            expected="UTF-8, one name a line",
            got="another encoding",
            do="save it as UTF-8",
        ) from None


def _named(done: Trace, count: int) -> str:
    from hf_watermark.report import chance_in_words, rounded_up

    read = (
        f"log10 p {rounded_up(done.log10_p):.2f}, {count} recipients and {done.tries} tries counted"
    )
    if done.reading == "aligned":
        read += ", disguises undone"
    if done.recipient is None:
        return f"{done.repo}: nobody's copy ({read})."
    odds = chance_in_words(done.log10_p)
    return (
        f"{done.repo}: the copy of {done.recipient}. A chance of {odds} that a copy nobody was "
        f"handed names anyone so firmly ({read})."
    )
