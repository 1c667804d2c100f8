"""The layers that attacks work on, as anyone finds them: by names and shapes, without a key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_watermark.carriers import choose_carriers
from hf_watermark.errors import CarrierError
from hf_watermark.stress.attacks import NotApplicableError

__all__ = ["as_rows", "bias_of", "fill", "head", "likely_carriers", "matrices"]


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """All weights of convolutions, linear layers and embeddings."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and parameter.is_floating_point() and name.endswith("weight")
    }


def likely_carriers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Where a mark lies unless its owner chose other places: the rule is public.

    Raises:
        NotApplicableError: If the rule finds nothing.
    """
    parameters = dict(model.named_parameters())
    try:
        chosen = choose_carriers({name: tuple(p.shape) for name, p in parameters.items()})
    except CarrierError:
        raise NotApplicableError("no layer that could carry a mark") from None
    return {carrier.name: parameters[carrier.name] for carrier in chosen}


def as_rows(weight: Tensor) -> Tensor:
    """A weight as (rows, columns): output rows, everything else flattened."""
    return weight.detach().reshape(len(weight), -1)


def bias_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """The bias of the layer that a weight belongs to, if it has one."""
    return dict(model.named_parameters()).get(f"{name.removesuffix('weight')}bias")


def head(model: nn.Module) -> nn.Linear:
    """The last layer, which gives the classes.

    Raises:
        NotApplicableError: If no linear layer gives as many outputs as there are classes.
    """
    config: Any = model.config
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == config.num_labels
    ]
    if not found:
        raise NotApplicableError("no linear layer that gives the classes")
    return found[-1]


@torch.no_grad()
def fill(weight: Tensor, rows: Tensor) -> None:
    """Write (rows, columns) back into a weight."""
    weight.copy_(rows.reshape(weight.shape))
