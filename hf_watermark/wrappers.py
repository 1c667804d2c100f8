"""What training wraps around a model, seen through: DDP, torch.compile, DeepSpeed, adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["plain_parameters", "unwrapped", "unwrapped_parameters"]

_HOLDERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel, torch.compile and a DeepSpeed engine."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and any(kind.__name__ in _HOLDERS for kind in type(model).__mro__):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrapped_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the module inside the wrappers."""
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in unwrapped(model).named_parameters()
    }


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that the plain model has once adapters are merged or taken off.

    peft keeps a layer that an adapter works on as `base_layer`, and one that is trained whole as
    `modules_to_save.ADAPTER` beside its `original_module`. What the adapters add has no such name.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "peft_config") or not hasattr(inner, "get_base_model"):
        return unwrapped_parameters(model)
    adapted: Any = inner
    base = adapted.get_base_model()
    active = f"modules_to_save.{getattr(inner, 'active_adapter', 'default')}."
    own = getattr(adapted.base_model, "prefix", "lora_") or "lora_"
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in unwrapped_parameters(base).items():
        parts = name.split(".")
        if "original_module" in parts or any(part.startswith(own) for part in parts):
            continue
        if "modules_to_save" in parts and active not in name:
            continue
        plain[name.replace(active, "").replace("base_layer.", "")] = parameter
    return plain
