"""Attacks that disturb where a mark may lie: noise, means, singular values, new weights.

They work on the layers that the public rule would choose as carriers, which is all that somebody
without the key can know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_watermark.stress.attacks import Attack, Change, Means, in_turn
from hf_watermark.stress.finetuning import fine_tuned
from hf_watermark.stress.layers import as_rows, bias_of, fill, likely_carriers, matrices
from hf_watermark.stress.training import Recipe

__all__ = [
    "ATTACKS",
    "centred",
    "means_replaced",
    "noisy",
    "rank_kept",
    "shifted_from_mean",
    "started_anew",
    "top_dropped",
]


def noisy(sigma: float) -> Change:
    """Gaussian noise on every matrix.

    Args:
        sigma: In standard deviations of the matrix.
    """

    @torch.no_grad()
    def change(model: Any, means: Means) -> Any:
        for weight in matrices(model).values():
            weight.add_(sigma * weight.std(correction=0) * torch.randn_like(weight))
        return model

    return change


def _on_carriers(edit: Callable[[Tensor], Tensor]) -> Change:
    """A change of each likely carrier as (rows, columns)."""

    @torch.no_grad()
    def change(model: Any, means: Means) -> Any:
        for weight in likely_carriers(model).values():
            fill(weight, edit(as_rows(weight)))
        return model

    return change


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def _with_other_means(rows: Tensor) -> Tensor:
    means = rows.mean(0)
    return rows - means + means.std(correction=0) * torch.randn_like(means)


def shifted_from_mean(factor: float) -> Change:
    """Every output row moved away from the mean row: W - factor * mean(W)."""
    return _on_carriers(lambda rows: rows - factor * rows.mean(0))


def rank_kept(share: float) -> Change:
    """Singular values beyond the largest ones dropped.

    Args:
        share: Of the singular values, the largest, which are kept.
    """

    def edit(rows: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        kept = max(1, round(share * len(s)))
        product: Tensor = (u[:, :kept] * s[:kept]) @ v[:kept]
        return product

    return _on_carriers(edit)


def top_dropped(count: int) -> Change:
    """The largest singular components dropped, where a mark of rank one would stand out."""

    def edit(rows: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        product: Tensor = (u[:, count:] * s[count:]) @ v[count:]
        return product

    return _on_carriers(edit)


def started_anew(share: float | None) -> Change:
    """Carriers drawn anew, with the standard deviation that they had.

    Args:
        share: Of the carriers, the last ones; None is the last one alone.
    """

    @torch.no_grad()
    def change(model: Any, means: Means) -> Any:
        carriers = list(likely_carriers(model).items())
        count = 1 if share is None else max(1, round(share * len(carriers)))
        for name, weight in carriers[-count:]:
            weight.copy_(weight.std(correction=0) * torch.randn_like(weight))
            bias = bias_of(model, name)
            if bias is not None:
                bias.zero_()
        return model

    return change


centred = _on_carriers(_centred)
means_replaced = _on_carriers(_with_other_means)


def _attack(
    name: str, change: Change, source: str, *, quick: bool = False, **parameters: Any
) -> Attack:
    trained = "then" in parameters
    return Attack(name, "erasure", change, source, parameters, needs_data=trained, quick=quick)


_OURS = "against Uchida's mean, which anyone can find"
_LUKAS = "after the idea in Lukas et al., S&P 2022; the formula is ours"
_SPIKE = "against marks of rank one"

ATTACKS: tuple[Attack, ...] = (
    *(
        _attack(
            f"noise-{sigma:g}",
            noisy(sigma),
            "noise, in many lists",
            quick=True,
            sigma=sigma,
            of="every matrix",
        )
        for sigma in (0.1, 0.3)
    ),
    _attack("mean-erasure", means_replaced, _OURS, quick=True, of="column means, by noise"),
    _attack("column-centring", centred, _OURS, quick=True, of="column means, by zero"),
    *(
        _attack(
            f"weight-shifting-{factor:g}",
            in_turn(shifted_from_mean(factor), fine_tuned()),
            _LUKAS,
            quick=factor < 2,
            factor=factor,
            then="fine-tuning at 1x",
        )
        for factor in (1.5, 2.5)
    ),
    _attack("svd-half", rank_kept(0.5), _SPIKE, quick=True, kept=0.5),
    _attack("svd-quarter", rank_kept(0.25), _SPIKE, kept=0.25),
    _attack("svd-drop-1", top_dropped(1), _SPIKE, dropped=1),
    _attack("svd-drop-4", top_dropped(4), _SPIKE, dropped=4),
    *(
        _attack(
            f"reinit-{label}",
            in_turn(started_anew(share), fine_tuned(Recipe(epochs=2.0))),
            "re-initialisation, then fine-tuning",
            carriers=label,
            then="fine-tuning at 1x, 2x epochs",
        )
        for label, share in (("one", None), ("half", 0.5), ("all", 1.0))
    ),
)
