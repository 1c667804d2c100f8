"""Students by the names of their architectures: what a reference bank is made of.

A bank of these holds, beside its weights, each student's configuration, and can be opened without
saying again what was in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_watermark.errors import SoftLabelError
from hf_watermark.folders import source_folder
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.softlabels.references import ReferenceBank

__all__ = ["new_bank", "open_bank"]

_SUFFIX = ".config.json"
_DO = "take a model type such as resnet, a folder with a config.json, or org/name"


def new_bank(
    folder: str | os.PathLike[str],
    architectures: Sequence[str],
    classes: int,
    pixel_values: Tensor,
    token: str | bool | None = None,
) -> ReferenceBank:
    """A bank of untrained students in these architectures; call its `distil`.

    Args:
        folder: Made if missing. One that an interrupted run left goes on.
        architectures: A model type of transformers (`resnet`, with its default size), a folder or
            file with a configuration, or `org/name` on the Hub, of which nothing else is fetched.
        classes: K, of the owner's model.
        pixel_values: (n, C, H, W), what they will be trained on.
        token: For private repos.

    Raises:
        SoftLabelError: If there is no such architecture, two have one name, or the folder holds
            another configuration under that name.
    """
    size = (int(pixel_values.shape[1]), int(pixel_values.shape[2]), int(pixel_values.shape[3]))
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    names = [Path(one.rstrip("/")).name.removesuffix(".json") for one in architectures]
    for name, architecture in zip(names, architectures, strict=True):
        if names.count(name) > 1:
            raise SoftLabelError("Two architectures have one name", got=quoted(name, 60))
        fields = _adapted(architecture, classes, size, token)
        path = where / f"{name}{_SUFFIX}"
        if path.exists() and _read(path) != fields:
            raise SoftLabelError(
                f"{where} holds another student {quoted(name, 60)}",
                do="choose another folder: references are fixed once they are made",
            )
        _maker(fields, architecture)()  # fails now rather than after the others are trained
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return open_bank(where)


def open_bank(folder: str | os.PathLike[str]) -> ReferenceBank:
    """The bank that `new_bank` began in a folder, with all its students.

    Raises:
        SoftLabelError: If there is none, or a file of it is unreadable.
    """
    where = Path(folder)
    paths = sorted(where.glob(f"*{_SUFFIX}"))
    if not paths:
        raise SoftLabelError(
            f"There are no references in {where}", do="make them: hf-watermark references --help"
        )
    named = {path.name.removesuffix(_SUFFIX): _read(path) for path in paths}
    return ReferenceBank(where, {name: _maker(fields, name) for name, fields in named.items()})


def _read(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SoftLabelError(
            f"The configuration {path} cannot be read", got=type(error).__name__
        ) from None
    return fields


def _adapted(
    architecture: str, classes: int, size: tuple[int, int, int], token: str | bool | None
) -> dict[str, Any]:
    """A configuration for K classes and images of this size."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(architecture).expanduser()
    fields: dict[str, Any]
    if path.is_file():
        fields = _read(path)
    elif path.is_dir() or "/" in architecture:
        fields = _read(source_folder(architecture, None, token, ("config.json",)) / "config.json")
    else:
        fields = {"model_type": architecture}
    if fields["model_type"] not in CONFIG_MAPPING:
        raise SoftLabelError(
            f"transformers knows no architecture {quoted(str(fields['model_type']), 60)}", do=_DO
        )
    # Nothing of the original's own: its code, its names, where its attention is to be fetched.
    for own in ("auto_map", "id2label", "label2id", "num_labels", "attn_implementation"):
        fields.pop(own, None)
    fields = {key: value for key, value in fields.items() if not key.startswith("_")}
    channels, height, width = size
    try:
        config = AutoConfig.for_model(**fields, num_labels=classes)
        if hasattr(config, "num_channels"):
            config.num_channels = channels
        if hasattr(config, "image_size"):
            config.image_size = height if height == width else [height, width]
        adapted: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    except Exception as error:  # a configuration can be wrong in many ways
        raise _unfit(architecture, error) from None
    return {key: value for key, value in adapted.items() if not key.startswith("_")}


def _maker(fields: dict[str, Any], architecture: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import AutoConfig, AutoModelForImageClassification

        try:
            config = AutoConfig.for_model(**fields)
            auto: Any = AutoModelForImageClassification
            student: nn.Module = auto.from_config(
                config, trust_remote_code=False, attn_implementation="eager"
            )
        except Exception as error:
            raise _unfit(architecture, error) from None
        return student

    return make


def _unfit(architecture: str, error: Exception) -> SoftLabelError:
    return SoftLabelError(
        f"No image classifier can be made of {quoted(architecture, 120)}",
        got=f"{type(error).__name__}: {quoted(str(error), 160)}",
        do=_DO,
    )
