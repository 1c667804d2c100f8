"""The command line: flags, formats, exit codes; nothing else.

Data goes to stdout, everything else to stderr. Exit status: 0 found (or done), 1 not found, 2 could
not be checked (or done), with one line on stderr that says what, expected, got and what to do.

The examples in the help stand after a backspace, click's sign for "do not rewrap".
"""

from __future__ import annotations

import click

from hf_watermark.cli.demo import demo
from hf_watermark.cli.keys import keygen
from hf_watermark.cli.marks import embed, trace
from hf_watermark.cli.outputs import verify_outputs
from hf_watermark.cli.references import references
from hf_watermark.cli.stress import stress
from hf_watermark.cli.terminal import CONTEXT, run
from hf_watermark.cli.verifying import card, verify

__all__ = ["main", "verify_hub_model"]


def verify_hub_model() -> None:
    """Entry point of the command `verify_hub_model`."""
    run(verify, "verify_hub_model")


def main() -> None:
    """Entry point of the umbrella `hf-watermark`."""
    run(_umbrella, "hf-watermark")


@click.group(name="hf-watermark", context_settings=CONTEXT)
@click.version_option(package_name="hf-watermark")
def _umbrella() -> None:
    """Ownership watermarks for vision models.

    \b
    Example:
      hf-watermark keygen acme.key --owner acme
      hf-watermark verify acme/vit --key acme.key
      hf-watermark embed ./vit --key acme.key --out ./vit-marked
      hf-watermark demo
    """  # noqa: D301


for _command in (keygen, embed, verify, verify_outputs, references, trace, card, stress, demo):
    _umbrella.add_command(_command)
