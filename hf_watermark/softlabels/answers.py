"""Where a classifier keeps its logits, and its answer with others in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from hf_watermark.errors import AttachError

__all__ = ["logits_of", "with_logits"]


def logits_of(output: Any, labelled: bool) -> Tensor:
    """The logits (B, K) of a model's output.

    Args:
        output: A tensor, a tuple, a mapping or an object with `logits`.
        labelled: Labels were given: a tuple then begins with the loss.

    Raises:
        AttachError: If there are none, or they are not those of a classifier.
    """
    if isinstance(output, Tensor):
        logits: Any = output
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple) and not hasattr(output, "logits"):
        logits = output[_place(output, labelled)]
    else:
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise AttachError(
            "The model gives no logits",
            expected="an image classifier",
            got=type(output).__name__,
            do="load it with AutoModelForImageClassification",
        )
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise AttachError(
            "The model's logits are not those of a classifier",
            expected="(images, classes) with at least two classes",
            got=tuple(logits.shape),
        )
    return logits


def with_logits(output: Any, logits: Tensor, labelled: bool) -> Any:
    """A look-alike of `output` with `logits` in place of its own; `output` stays as it is."""
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, Mapping):  # transformers' ModelOutput is a mapping and a dataclass
        return type(output)(**{**output, "logits": logits})
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        place = _place(output, labelled)
        return (*output[:place], logits, *output[place + 1 :])
    if hasattr(output, "_replace"):
        return output._replace(logits=logits)
    if is_dataclass(output) and not isinstance(output, type) and fields(output):
        return replace(output, logits=logits)
    raise AttachError(
        "The model's output cannot be rebuilt",
        expected="a tensor, a tuple, a dict or a dataclass",
        got=type(output).__name__,
    )


def _place(output: tuple[Any, ...], labelled: bool) -> int:
    return 1 if labelled and len(output) > 1 else 0
