"""The command line: flags, formats, exit codes; nothing else.

Data goes to stdout, everything else to stderr. Exit status: 0 found (or done), 1 not found, 2 could
not be checked (or done), with one line on stderr that says what, expected, got and what to do.

The examples in the help stand after a backspace, click's sign for "do not rewrap".
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_watermark.errors import KeyFileError, SchemeError, WatermarkError

if TYPE_CHECKING:
    from hf_watermark.evidence import Claim, Evidence
    from hf_watermark.key import OwnerKey
    from hf_watermark.readings import Progress

__all__ = ["main", "verify_hub_model"]

FOUND, NOT_FOUND, NOT_CHECKED = 0, 1, 2
_PASSPHRASE = "HF_WATERMARK_PASSPHRASE"
_DEBUG = "HF_WATERMARK_DEBUG"
_SLOW = 1.0  # seconds before a progress bar appears


def _run(command: click.Command, name: str) -> None:
    """Run a command; every failure becomes one line on stderr and exit status 2."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name that this terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command.main(prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        status = _refuse(f"No command was given; expected one of the above. Try {name} demo")
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = name if context is None else context.command_path
        status = _refuse(f"{error.format_message().rstrip('.')}. See {path} --help")
    except (click.Abort, KeyboardInterrupt):
        status = _refuse("interrupted", 130)
    except WatermarkError as error:
        status = _refuse(str(error))
    except BrokenPipeError:  # `| head` went away
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        status = NOT_CHECKED
    except Exception as error:
        if os.environ.get(_DEBUG):
            raise
        status = _refuse(
            f"Unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} "
            f"(set {_DEBUG}=1 for the traceback)"
        )
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str, status: int = NOT_CHECKED) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return status


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    click.echo(f"warning: {message}", err=True)


def verify_hub_model() -> None:
    """Entry point of the command `verify_hub_model`."""
    _run(_verify, "verify_hub_model")


def main() -> None:
    """Entry point of the umbrella `hf-watermark`."""
    _run(_umbrella, "hf-watermark")


@click.group(name="hf-watermark", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf-watermark")
def _umbrella() -> None:
    """Ownership watermarks for vision models.

    \b
    Example:
      hf-watermark keygen acme.key --owner acme
      hf-watermark verify acme/vit --key acme.key
      hf-watermark demo
    """  # noqa: D301


@_umbrella.command("keygen")
@click.argument("path", type=click.Path(dir_okay=False), default="owner.key")
@click.option("--owner", default="", help="A name for people; it appears in claims.")
@click.option("--encrypt", is_flag=True, help="Ask for a passphrase and encrypt the key.")
@click.option("--format", "form", type=click.Choice(["human", "json", "quiet"]), default="human")
@click.option("--json", "form", flag_value="json", help="Short for --format json.")
def _keygen(path: str, owner: str, encrypt: bool, form: str) -> int:
    """Make a key: 32 secret bytes in a file of mode 0600.

    Whoever has the file can claim your models; without it nobody can. Keep a copy offline.

    \b
    Example:
      hf-watermark keygen acme.key --owner acme
      HF_WATERMARK_PASSPHRASE=... hf-watermark keygen acme.key --encrypt
    """  # noqa: D301
    from hf_watermark.key import OwnerKey

    passphrase = None
    if encrypt:
        passphrase = os.environ.get(_PASSPHRASE)
        if not passphrase and not sys.stdin.isatty():
            raise KeyFileError(
                "A passphrase is needed to encrypt the key",
                got="no terminal to ask for it",
                do=f"set {_PASSPHRASE}",
            )
        passphrase = passphrase or click.prompt(
            "Passphrase", hide_input=True, confirmation_prompt=True, err=True
        )
    key = OwnerKey.generate(owner)
    key.save(path, passphrase)
    if form == "json":
        _echo_json(
            {
                "path": path,
                "fingerprint": key.fingerprint,
                "commitment": key.commitment,
                "public_key": key.public_key,
            }
        )
    elif form == "quiet":
        click.echo(key.fingerprint)
    else:
        click.echo(f"Key {key.fingerprint} is in {path}.")
        click.echo("Keep it secret, and a copy offline: no key, no proof.", err=True)
    return FOUND


_VERIFY_HELP = """Whether a model on the Hub, or in a folder, carries the mark of a key.

REPO is org/name or a local folder. Reads a few ranges of its safetensors; runs none of its code.
Exit status: 0 found, 1 not found, 2 could not be checked.

\b
Example:
  verify_hub_model acme/vit --key acme.key
  verify_hub_model thief/vit-copy --key acme.key --claim acme/vit --json
  verify_hub_model acme/vit            (no key: the claim's signature and digests)
"""


@click.command(
    "verify", help=_VERIFY_HELP, context_settings={"help_option_names": ["-h", "--help"]}
)
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
@click.option(
    "--align",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Undo disguises if the raw reading fails. Now: raw only, for every architecture.",
)
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
@click.option(
    "--format",
    "form",
    type=click.Choice(["human", "json", "quiet"]),
    default="human",
    show_default=True,
)
@click.option("--json", "form", flag_value="json", help="Short for --format json.")
@click.option("--token", metavar="T", help="A token for private repos; default: the saved one.")
def _verify(
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
    from hf_watermark.verify import verify

    writing = write_card or create_pr
    if key_file is None and (recipient is not None or writing):
        raise SchemeError(
            "--recipient, --write-card and --create-pr need the owner's key", do="pass --key FILE"
        )
    key = None if key_file is None else _load_key(key_file)
    with _progress(f"Reading {repo}") as progress:
        done = verify(
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
        _echo_json(evidence.to_dict())
    elif form == "quiet":
        click.echo(evidence.verdict)
    else:
        click.echo(_in_words(evidence, done.claim))
    if report is not None:
        _write_report(report, evidence, done.claim)
    if evidence.verdict == "not checked":
        return _refuse(
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


_umbrella.add_command(_verify)


@_umbrella.command("card")
@click.argument("repo")
@click.option("--key", "key_file", metavar="FILE", required=True, help="The owner's key file.")
@click.option("--revision", metavar="R", help="Branch, tag or commit.")
@click.option("--claim", metavar="FILE|REPO", help="The owner's claim.")
@click.option("--token", metavar="T", help="A token for private repos.")
def _card(
    repo: str, key_file: str, revision: str | None, claim: str | None, token: str | None
) -> int:
    """Print the model card with the evidence in it; write nothing.

    \b
    Example:
      hf-watermark card acme/vit --key acme.key > README.md
    """  # noqa: D301
    from hf_watermark.card import updated_card
    from hf_watermark.publish import read_card_text
    from hf_watermark.verify import verify

    done = verify(
        repo, _load_key(key_file), claim=claim, revision=revision, token=token, read="all"
    )
    if not done.evidence.found:
        click.echo("The mark was not found: the card was not changed.", err=True)
        return NOT_FOUND
    public = None if done.claim is None else done.claim.public
    click.echo(updated_card(read_card_text(done.files), done.evidence, public), nl=False)
    return FOUND


@_umbrella.command("demo")
@click.option(
    "--out",
    default="demo-output",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Folder for models, the loopback Hub's repos, keys and cards; emptied first.",
)
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1, 20))
def _demo(out: str, seeds: int) -> int:
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


def _load_key(path: str) -> OwnerKey:
    from hf_watermark.key import OwnerKey

    passphrase = os.environ.get(_PASSPHRASE)
    try:
        return OwnerKey.load(path, passphrase)
    except KeyFileError as error:
        if not (passphrase is None and "encrypted" in error.what and sys.stdin.isatty()):
            raise
    return OwnerKey.load(path, click.prompt("Passphrase", hide_input=True, err=True))


def _write_report(path: str, evidence: Evidence, claim: Claim | None) -> None:
    from hf_watermark.report import html_report

    try:
        Path(path).write_text(html_report(evidence, claim), encoding="utf-8")
    except OSError as error:
        raise WatermarkError(
            f"The report cannot be written to {path}", got=error.strerror, do="choose another path"
        ) from None
    click.echo(f"The report is in {path}", err=True)


def _echo_json(value: dict[str, Any]) -> None:
    """One object on one line, in ASCII: it survives every terminal, pipe and name of a folder."""
    click.echo(json.dumps(value, allow_nan=False))


@contextmanager
def _progress(title: str) -> Iterator[Progress | None]:
    """A progress bar on stderr, for a person, once something takes longer than a second."""
    if not sys.stderr.isatty():
        yield None
        return
    started = time.perf_counter()
    bar: Any = None
    task: Any = None

    def update(done: int, planned: int) -> None:
        nonlocal bar, task
        if bar is None and time.perf_counter() - started > _SLOW:
            from rich.console import Console
            from rich.progress import Progress as Bar

            bar = Bar(console=Console(stderr=True), transient=True)
            bar.start()
            task = bar.add_task(title, total=planned)
        if bar is not None:
            bar.update(task, completed=done, total=planned)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()


_STYLE = {"found": "green", "not found": "yellow", "not checked": "cyan"}


def _in_words(evidence: Evidence, claim: Claim | None) -> str:
    """The outcome as a person likes to read it."""
    colour = _STYLE[evidence.verdict]
    lines = [click.style(evidence.verdict.upper(), fg=colour, bold=True) + f"  {evidence.repo}"]
    lines += ["", *_meaning(evidence), ""]
    lines += [f"  {name:<9} {value}" for name, value in _facts(evidence, claim)]
    lines += ["", *(f"  {note}" for note in evidence.notes)]
    lines += [f"  {line}" for line in _CAVEATS[evidence.verdict]]
    return "\n".join(lines)


_CAVEATS = {
    "found": (
        "Not proven by this alone: that the owner was first. That rests on when the claim was",
        "published; a key that nobody committed to before a dispute proves nothing.",
    ),
    "not found": (
        "Not proven by this: that the model is independent. A mark in the weights does not survive",
        "distillation, and carriers that were renamed or replaced may need the owner's --claim.",
    ),
    "not checked": (),
}


def _meaning(evidence: Evidence) -> list[str]:
    from hf_watermark.report import chance_in_words, rounded_up

    if evidence.log10_p is None:
        return ["  The public part of the claim holds."]
    odds = chance_in_words(evidence.log10_p)
    if evidence.found:
        said = f"A chance of {odds} that an unrelated model agrees this well with the key."
    elif evidence.log10_p > -1.0:
        said = "Unrelated models agree with the key as well as this one does: no evidence."
    else:
        said = f"A chance of {odds} that an unrelated model agrees this well: not enough."
    return [
        f"  {said}",
        f"  (log10 p {rounded_up(evidence.log10_p):.2f}, all {evidence.tries} tries counted; "
        f"the limit set beforehand is p = {evidence.alpha:g})",
    ]


_READINGS = {
    "raw": "every carrier under its own name",
    "raw, one carrier": "one carrier alone, under its own name",
    "renamed": "carriers under other names, told by their order and shapes",
    "renamed, one carrier": "one tensor alone, under another name, told by its shape",
}


def _facts(evidence: Evidence, claim: Claim | None) -> Iterator[tuple[str, str]]:
    from hf_watermark.safetensors_ranges import quoted

    if evidence.matched is not None:
        yield (
            "bits",
            f"{evidence.matched} of {evidence.bits} of the secret message "
            f"(by chance about {evidence.bits // 2})",
        )
    read, total = evidence.bytes_read, evidence.bytes_total
    share = 100.0 * read / total if total else 0.0
    percent = f"{share:.1f}%" if share >= 0.1 else "less than 0.1%"
    yield "read", f"{_size(read)}, {percent} of the weights' {_size(total)}"
    if evidence.carriers:
        more = len(evidence.carriers) - 1
        first = quoted(evidence.carriers[0])
        yield "from", f"{first} and {more} more" if more else first
    if evidence.reading is not None:
        yield "reading", f"{evidence.reading}: {_READINGS.get(evidence.reading, 'see the docs')}"
    yield "revision", evidence.revision or "none (a folder)"
    if claim is not None:
        # A stranger's text: nobody checked the name, and it may hold a terminal's commands.
        owner = claim.owner if claim.owner.isprintable() else ascii(claim.owner)
        by = f" under the name {owner}" if owner else ""
        since = f", first published in {evidence.committed_at}" if evidence.committed_at else ""
        yield "claim", f"signed{by}{since}"
    yield "scheme", evidence.scheme
    if evidence.key_fingerprint is not None:
        yield "key", evidence.key_fingerprint
    yield "time", f"{evidence.seconds:.2f} s"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000.0:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000.0
    return f"{value:.1f} GB"
