"""Attacks that mix the victim with other weights: averages, and merged low-rank adapters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_watermark.stress.attacks import Attack, Change, Means, NotApplicableError
from hf_watermark.stress.finetuning import fresh
from hf_watermark.stress.layers import head
from hf_watermark.stress.training import Recipe, train

__all__ = ["ATTACKS", "averaged_with_another", "averaged_with_sibling", "low_rank_merged"]

_INDEPENDENT_EPOCHS = 4.0


def averaged_with_sibling(model: Any, means: Means) -> Any:
    """The mean of the victim and of a copy that was fine-tuned at 1x."""
    return _mean(model, train(copy.deepcopy(model), means, Recipe()))


def averaged_with_another(model: Any, means: Means) -> Any:
    """The mean of the victim and of a model of its kind that was trained from scratch."""
    return _mean(model, train(fresh(model), means, Recipe(epochs=_INDEPENDENT_EPOCHS)))


@torch.no_grad()
def _mean(model: Any, other: Any) -> Any:
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(theirs[name], 0.5)
    return model


class _LowRank(nn.Module):
    """W + B A, B being zero at first (Hu et al. 2021, section 4.1)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        columns = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def low_rank_merged(rank: int, rate: float = 10.0) -> Change:
    """Adapters on every linear layer and convolution, trained with the head, then merged.

    Args:
        rank: Of each adapter.
        rate: Learning rate, times the attacker's.
    """

    def change(model: Any, means: Means) -> Any:
        last = head(model)
        layers = [
            module
            for module in model.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module is not last
        ]
        if not layers:
            raise NotApplicableError("no layer for an adapter")
        model.requires_grad_(False)
        last.requires_grad_(True)
        for layer in layers:
            adapter = _LowRank(layer.weight.detach(), rank).to(model.device)
            parametrize.register_parametrization(layer, "weight", adapter)
        train(model, means, Recipe(rate))
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        return model

    return change


def _attack(
    name: str, change: Change, source: str, *, quick: bool = False, **parameters: Any
) -> Attack:
    return Attack(name, "merging", change, source, parameters, needs_data=True, quick=quick)


ATTACKS: tuple[Attack, ...] = (
    _attack(
        "average-sibling",
        averaged_with_sibling,
        "Wortsman et al. 2022",
        quick=True,
        other="fine-tuned at 1x",
    ),
    _attack(
        "average-independent",
        averaged_with_another,
        "Wortsman et al. 2022",
        other="trained from scratch",
    ),
    *(
        _attack(f"lora-{rank}", low_rank_merged(rank), "Hu et al. 2021", rank=rank, rate="10x")
        for rank in (4, 8)
    ),
)
