"""Attacks that round weights: integers, 8-bit floats, half precision. Rounded and stored as floats.

What a quantised file holds is codes and scales; whoever publishes a copy of it again as safetensors
of floats publishes these values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_watermark.stress.attacks import Attack, Change, Means, in_turn
from hf_watermark.stress.finetuning import fine_tuned
from hf_watermark.stress.layers import as_rows, fill, matrices

__all__ = ["ATTACKS", "cast", "float8", "quantized"]

_GROUP = 64
_FLOAT8_MAX = 448.0


def quantized(bits: int, group: int | None = None) -> Change:
    """Every matrix rounded to 2^bits evenly spaced values between the ends of each group.

    Args:
        bits: Of a weight.
        group: Consecutive weights of a row that share a scale; None is the whole row, 0 the tensor.
    """

    @torch.no_grad()
    def change(model: Any, means: Means) -> Any:
        for weight in matrices(model).values():
            rows = as_rows(weight) if group != 0 else weight.detach().reshape(1, -1)
            size = group or rows.shape[1]
            parts = [_rounded(part, bits) for part in torch.split(rows, size, dim=1)]
            fill(weight, torch.cat(parts, dim=1))
        return model

    return change


def _rounded(rows: Tensor, bits: int) -> Tensor:
    """Each row on a grid of its own, (rows, n)."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((rows - low) / step.clamp_min(torch.finfo(rows.dtype).tiny)).round()
    rounded: Tensor = low + codes * step
    return rounded


@torch.no_grad()
def float8(model: Any, means: Means) -> Any:
    """Every matrix in float8 e4m3, scaled so that its largest weight is the largest number."""
    for weight in matrices(model).values():
        scale = weight.abs().max() / _FLOAT8_MAX
        if scale > 0:
            weight.copy_((weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale)
    return model


def cast(dtype: torch.dtype) -> Change:
    """All parameters and buffers in another precision, and back."""

    def change(model: Any, means: Means) -> Any:
        return model.to(dtype).float()

    return change


def _attack(
    name: str, change: Change, source: str, *, quick: bool = False, **parameters: Any
) -> Attack:
    trained = "then" in parameters
    return Attack(name, "quantization", change, source, parameters, needs_data=trained, quick=quick)


ATTACKS: tuple[Attack, ...] = (
    _attack("int8", quantized(8), "Jacob et al. 2018", quick=True, bits=8, of="each row"),
    _attack(
        "int4",
        quantized(4, _GROUP),
        "round to nearest, the baseline of Frantar et al. 2023",
        quick=True,
        bits=4,
        group=_GROUP,
    ),
    *(
        _attack(
            f"int{bits}-tune",
            in_turn(quantized(bits, 0), fine_tuned(), quantized(bits, 0)),
            "Lukas et al., S&P 2022",
            bits=bits,
            of="each tensor",
            then="fine-tuning at 1x, rounded again",
        )
        for bits in (5, 6)
    ),
    _attack("fp8", float8, "Micikevicius et al. 2022", format="e4m3"),
    _attack("fp16", cast(torch.float16), "half precision", quick=True),
    _attack("bf16", cast(torch.bfloat16), "half precision", quick=True),
)
