"""Attacks that set weights to zero: by size, by row, by how little a unit is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_watermark.stress.attacks import Attack, Change, Means
from hf_watermark.stress.layers import as_rows, bias_of, likely_carriers, matrices
from hf_watermark.stress.training import Recipe, answers, train

__all__ = ["ATTACKS", "fine_pruned", "pruned", "pruned_rows"]

Masks = Mapping[str, Tensor]


def pruned(share: float, *, per_tensor: bool = False, then: Recipe | None = None) -> Change:
    """The smallest weights of all matrices set to zero, exactly this share of them.

    Args:
        share: 0 to 1; in the end this share of the weights is zero.
        per_tensor: Of each tensor, rather than of all together.
        then: Train what is left, zeros staying zero.
    """

    def change(model: Any, means: Means) -> Any:
        weights = matrices(model)
        if per_tensor:
            masks = {name: _kept(weight.detach(), share) for name, weight in weights.items()}
        else:
            together = torch.cat([weight.detach().flatten() for weight in weights.values()])
            parts = torch.split(_kept(together, share), [w.numel() for w in weights.values()])
            masks = {
                name: part.reshape(weight.shape)
                for (name, weight), part in zip(weights.items(), parts, strict=True)
            }
        return _held(model, masks, means, then)

    return change


def pruned_rows(share: float, *, then: Recipe | None = None) -> Change:
    """Whole rows of every block's largest layer set to zero, those of the smallest norm.

    Args:
        share: Of the rows of each layer.
        then: Train what is left.
    """

    def change(model: Any, means: Means) -> Any:
        masks: dict[str, Tensor] = {}
        for name, weight in likely_carriers(model).items():
            rows = as_rows(weight)
            kept = _kept(rows.norm(dim=1), share)
            masks[name] = kept[:, None].expand_as(rows).reshape(weight.shape)
            if bias_of(model, name) is not None:
                masks[f"{name.removesuffix('weight')}bias"] = kept
        return _held(model, masks, means, then)

    return change


def fine_pruned(share: float, *, then: Recipe | None = None) -> Change:
    """The units of the last block's largest layer that the task uses least, zeroed; trained on.

    Args:
        share: Of the units, by their mean absolute output on the attacker's images.
        then: How it is trained on.
    """

    def change(model: Any, means: Means) -> Any:
        name, weight = list(likely_carriers(model).items())[-1]
        layer = model.get_submodule(name.removesuffix(".weight"))
        seen: list[Tensor] = []

        def look(module: nn.Module, given: Any, output: Tensor) -> None:
            units = 1 if output.ndim == 4 else output.ndim - 1  # channels first, or tokens
            seen.append(output.detach().abs().transpose(0, units).flatten(1).mean(1))

        handle = layer.register_forward_hook(look)
        answers(model, means.images)
        handle.remove()
        kept = _kept(torch.stack(seen).mean(0), share)
        masks = {name: kept[:, None].expand_as(as_rows(weight)).reshape(weight.shape)}
        if bias_of(model, name) is not None:
            masks[f"{name.removesuffix('weight')}bias"] = kept
        return _held(model, masks, means, then or Recipe())

    return change


def _kept(sizes: Tensor, share: float) -> Tensor:
    """Which stay: all but the round(share n) smallest."""
    order = sizes.abs().flatten().argsort(stable=True)
    kept = torch.ones(len(order), dtype=torch.bool, device=order.device)
    kept[order[: round(share * len(order))]] = False
    return kept.reshape(sizes.shape)


def _held(model: Any, masks: Masks, means: Means, then: Recipe | None) -> Any:
    """Zero what the masks leave out, and keep it so while the rest is trained."""
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def hold() -> None:
        for name, mask in masks.items():
            parameters[name].mul_(mask)

    hold()
    return model if then is None else train(model, means, then, after_step=hold)


_HAN = "Han et al. 2015"


def _attack(
    name: str, change: Change, source: str, *, quick: bool = False, **parameters: Any
) -> Attack:
    trained = "then" in parameters
    return Attack(name, "pruning", change, source, parameters, needs_data=trained, quick=quick)


ATTACKS: tuple[Attack, ...] = (
    _attack("prune-65", pruned(0.65), f"{_HAN}; Uchida et al. 2017", quick=True, share=0.65),
    _attack("prune-80", pruned(0.80), f"{_HAN}; Uchida et al. 2017", quick=True, share=0.80),
    _attack("prune-95", pruned(0.95), f"{_HAN}; Uchida et al. 2017", share=0.95),
    *(
        _attack(
            f"prune-{100 * share:.0f}-tune",
            pruned(share, then=Recipe()),
            _HAN,
            share=share,
            then="fine-tuning at 1x, zeros kept",
        )
        for share in (0.80, 0.95)
    ),
    *(
        _attack(
            f"prune-tensor-{100 * share:.0f}",
            pruned(share, per_tensor=True),
            "Lukas et al., S&P 2022",
            share=share,
            of="each tensor",
        )
        for share in (0.50, 0.80)
    ),
    _attack(
        "prune-tensor-80-tune",
        pruned(0.80, per_tensor=True, then=Recipe()),
        "Lukas et al., S&P 2022",
        share=0.80,
        of="each tensor",
        then="fine-tuning at 1x, zeros kept",
    ),
    _attack("prune-rows-50", pruned_rows(0.50), "Li et al. 2017", share=0.50, of="rows"),
    _attack(
        "prune-rows-50-tune",
        pruned_rows(0.50, then=Recipe()),
        "Li et al. 2017",
        share=0.50,
        of="rows",
        then="fine-tuning at 1x, zeros kept",
    ),
    _attack(
        "fine-pruning",
        fine_pruned(0.96, then=Recipe(epochs=2.0)),
        "Liu et al. 2018; Lukas et al., S&P 2022",
        share=0.96,
        of="units of the last block",
        then="fine-tuning at 1x, 2x epochs",
    ),
)
