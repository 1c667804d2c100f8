"""`hf-watermark keygen`."""

from __future__ import annotations

import os
import sys

import click

from hf_watermark.cli.terminal import CONTEXT, FOUND, PASSPHRASE, echo_json, format_options
from hf_watermark.errors import KeyFileError

__all__ = ["keygen"]


@click.command(context_settings=CONTEXT)
@click.argument("path", type=click.Path(dir_okay=False), default="owner.key")
@click.option("--owner", default="", help="A name for people; it appears in claims.")
@click.option("--encrypt", is_flag=True, help="Ask for a passphrase and encrypt the key.")
@format_options
def keygen(path: str, owner: str, encrypt: bool, form: str) -> int:
    """Make a key: 32 secret bytes in a file of mode 0600.

    Whoever has the file can claim your models; without it nobody can. Keep a copy offline.

    \b
    Example:
      hf-watermark keygen acme.key --owner acme
      HF_WATERMARKPASSPHRASE=... hf-watermark keygen acme.key --encrypt
    """  # noqa: D301
    from hf_watermark.key import OwnerKey

    passphrase = None
    if encrypt:
        passphrase = os.environ.get(PASSPHRASE)
        if not passphrase and not sys.stdin.isatty():
            raise KeyFileError(
                "A passphrase is needed to encrypt the key",
                got="no terminal to ask for it",
                do=f"set {PASSPHRASE}",
            )
        passphrase = passphrase or click.prompt(
            "Passphrase", hide_input=True, confirmation_prompt=True, err=True
        )
    key = OwnerKey.generate(owner)
    key.save(path, passphrase)
    if form == "json":
        echo_json(
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
