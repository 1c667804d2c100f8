"""What every command shares: exit statuses, errors in one line, keys, progress, formats."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hf_watermark.errors import KeyFileError, WatermarkError

if TYPE_CHECKING:
    from hf_watermark.key import OwnerKey
    from hf_watermark.readings import Progress

__all__ = [
    "CONTEXT",
    "FOUND",
    "NOT_CHECKED",
    "NOT_FOUND",
    "PASSPHRASE",
    "align_option",
    "echo_json",
    "format_options",
    "load_key",
    "progress_bar",
    "refuse",
    "run",
]

FOUND, NOT_FOUND, NOT_CHECKED = 0, 1, 2
CONTEXT = {"help_option_names": ["-h", "--help"]}
PASSPHRASE = "HF_WATERMARK_PASSPHRASE"
_DEBUG = "HF_WATERMARK_DEBUG"
_SLOW = 1.0  # seconds before a progress bar appears
_Command = TypeVar("_Command", bound=Callable[..., Any])


def run(command: click.Command, name: str) -> None:
    """Run a command; every failure becomes one line on stderr and exit status 2."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name that this terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command.main(prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        status = refuse(f"No command was given; expected one of the above. Try {name} demo")
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = name if context is None else context.command_path
        status = refuse(f"{error.format_message().rstrip('.')}. See {path} --help")
    except (click.Abort, KeyboardInterrupt):
        status = refuse("interrupted", 130)
    except WatermarkError as error:
        status = refuse(str(error))
    except BrokenPipeError:  # `| head` went away
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        status = NOT_CHECKED
    except Exception as error:
        if os.environ.get(_DEBUG):
            raise
        status = refuse(
            f"Unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} "
            f"(set {_DEBUG}=1 for the traceback)"
        )
    sys.exit(status if isinstance(status, int) else 0)


def refuse(message: str, status: int = NOT_CHECKED) -> int:
    """Say in one line on stderr what is wrong; returns the exit status."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return status


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    click.echo(f"warning: {message}", err=True)


def format_options(command: _Command) -> _Command:
    """`--format human|json|quiet`, and `--json` for short."""
    short = click.option("--json", "form", flag_value="json", help="Short for --format json.")
    choice = click.option(
        "--format",
        "form",
        type=click.Choice(["human", "json", "quiet"]),
        default="human",
        show_default=True,
    )
    return choice(short(command))


def align_option(command: _Command) -> _Command:
    """`--align auto|never`."""
    return click.option(
        "--align",
        type=click.Choice(["auto", "never"]),
        default="auto",
        show_default=True,
        help="Undo disguises if the raw reading fails; needs the owner's repo or folder as "
        "--claim.",
    )(command)


def load_key(path: str) -> OwnerKey:
    """The key in a file, with the passphrase from the environment or the terminal."""
    from hf_watermark.key import OwnerKey

    passphrase = os.environ.get(PASSPHRASE)
    try:
        return OwnerKey.load(path, passphrase)
    except KeyFileError as error:
        if not (passphrase is None and "encrypted" in error.what and sys.stdin.isatty()):
            raise
    return OwnerKey.load(path, click.prompt("Passphrase", hide_input=True, err=True))


def echo_json(value: dict[str, Any]) -> None:
    """One object on one line, in ASCII: it survives every terminal, pipe and name of a folder."""
    click.echo(json.dumps(value, allow_nan=False))


@contextmanager
def progress_bar(title: str) -> Iterator[Progress | None]:
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
            from rich.markup import escape
            from rich.progress import Progress as Bar

            bar = Bar(console=Console(stderr=True), transient=True)
            bar.start()
            task = bar.add_task(escape(title), total=planned)
        if bar is not None:
            bar.update(task, completed=done, total=planned)

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()
