"""Files of arrays that are as secret as the key they belong to: safetensors of mode 0600.

The safetensors metadata holds one JSON object with the format, the key's fingerprint and settings;
no key is ever in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import SoftLabelError
from hf_watermark.key import OwnerKey, write_secret_file

__all__ = ["garbled", "read_secret", "write_secret"]

Arrays = Mapping[str, npt.NDArray[Any]]
_METADATA = "hf_watermark"
_MAX_BYTES = 2**32


def write_secret(
    path: str | os.PathLike[str],
    form: str,
    key: OwnerKey,
    settings: Mapping[str, Any],
    arrays: Arrays,
) -> None:
    """Write arrays and JSON settings, atomically, readable by this user alone.

    Args:
        path: The file; an existing one is replaced.
        form: Name and version, `name/1`.
        key: Whose file it is.
        settings: Plain JSON types.
        arrays: By name.

    Raises:
        SoftLabelError: If it cannot be written.
    """
    from safetensors.numpy import save

    head = {**settings, "format": form, "fingerprint": key.fingerprint}
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content = save(whole, {_METADATA: json.dumps(head, sort_keys=True)})
    target = Path(path)
    try:
        write_secret_file(target, content)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise SoftLabelError(
            f"The watermark cannot be written to {target}", got=getattr(error, "strerror", error)
        ) from None


def read_secret(
    path: str | os.PathLike[str], form: str, key: OwnerKey
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The settings and arrays in a file that `write_secret` wrote.

    Raises:
        SoftLabelError: If it is missing, garbled, of another format or version, or another key's.
    """
    from safetensors.numpy import load

    where = Path(path)
    try:
        if where.stat().st_size > _MAX_BYTES:
            raise garbled(where, form, "a file that is too large")
        content = where.read_bytes()
    except (OSError, ValueError) as error:
        raise SoftLabelError(
            f"The watermark file {where} cannot be read", got=getattr(error, "strerror", error)
        ) from None
    try:
        arrays = load(content)
        size = int.from_bytes(content[:8], "little")
        head = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_METADATA])
        found, fingerprint = str(head["format"]), str(head["fingerprint"])
    except Exception:  # safetensors raises errors of its own kind
        raise garbled(where, form, "something else") from None
    if found.partition("/")[0] != form.partition("/")[0]:
        raise garbled(where, form, f"a file of format {found[:60]!r}")
    if found != form:
        raise SoftLabelError(
            f"The watermark file {where} is of another version",
            expected=form,
            got=repr(found)[:60],
            do="update: pip install -U hf-watermark",
        )
    if fingerprint != key.fingerprint:
        raise SoftLabelError(
            f"The watermark file {where} belongs to another key",
            expected=f"the key {fingerprint[:16]!r}",
            got=key.fingerprint,
            do="load that key",
        )
    return head, arrays


def garbled(path: str | os.PathLike[str], form: str, got: str) -> SoftLabelError:
    """The error for a file whose content does not fit."""
    return SoftLabelError(
        f"The watermark file {path} is garbled",
        expected=f"a file of format {form}",
        got=got,
        do="restore it from a backup",
    )
