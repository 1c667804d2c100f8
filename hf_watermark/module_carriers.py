"""Carriers among the parameters of a module: which are marked in training, and where they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_watermark.carriers import (
    Carrier,
    check_capacity,
    choose_carriers,
    matching,
    named_carriers,
)
from hf_watermark.errors import AttachError, CarrierError
from hf_watermark.parts import Part, part_of, put_back_shards, refuse_unknown_shards
from hf_watermark.scheme import Scheme
from hf_watermark.wrappers import plain_parameters, unwrapped_parameters
from hf_watermark.zero_parts import shape_of, zero_part_of

__all__ = ["carriers_of", "parts_of"]


def carriers_of(
    model: nn.Module, scheme: Scheme, names: Sequence[str] | None = None
) -> tuple[Carrier, ...]:
    """The parameters that carry the mark of a module that is to train.

    Args:
        model: The module, wrapped or not.
        scheme: What they must hold.
        names: The user's choice, names or patterns; None chooses, and of those chosen the frozen
            ones stay as they are, if the others can carry their share.

    Raises:
        ModelTooSmallError: If they cannot hold the scheme's bits.
        CarrierError: If one is missing, frozen, not floating point or without weights.
        ShardedParameterError: If the model is sharded by FSDP1.
    """
    refuse_unknown_shards(model)
    put_back_shards(model)
    plain = plain_parameters(model)
    named = plain if names is None else {**unwrapped_parameters(model), **plain}
    shapes = {name: shape_of(parameter) for name, parameter in named.items()}
    if names is None:
        carriers = choose_carriers(shapes)
    else:  # a pattern stands for a parameter by the name that its checkpoint has
        own = {name: shapes[name] for name in plain}
        carriers = named_carriers(shapes, matching(own, names))
    check_capacity(carriers, scheme)
    for carrier in carriers:
        _refuse_unusable(carrier, named[carrier.name])
    trainable = [carrier for carrier in carriers if named[carrier.name].requires_grad]
    if len(trainable) < len(carriers):
        _refuse_frozen(carriers, trainable, scheme, chosen=names is None)
    return carriers


def parts_of(model: nn.Module, carriers: Sequence[Carrier]) -> list[Part]:
    """What this process holds of the carriers now.

    Raises:
        AttachError: If one is no longer there, or has another shape.
        ShardedParameterError: If one is sharded in a way that no part can be made of.
    """
    refuse_unknown_shards(model)
    parameters = {**unwrapped_parameters(model), **plain_parameters(model)}
    found = []
    for carrier in carriers:
        parameter = parameters.get(carrier.name)
        if parameter is None or shape_of(parameter) != carrier.shape:
            raise AttachError(
                f"The model has changed since {carrier.name[:120]!r} became a carrier",
                expected=f"a parameter of shape {list(carrier.shape)}",
                got="none" if parameter is None else f"{list(shape_of(parameter))}",
                do="attach after everything that wraps or changes the model",
            )
        found.append(zero_part_of(carrier, parameter) or part_of(carrier, parameter))
    return found


def _refuse_unusable(carrier: Carrier, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise CarrierError(
            f"The carrier {carrier.name[:120]!r} cannot be marked",
            expected="float16, bfloat16, float32 or float64",
            got=str(parameter.dtype),
            do="name other carriers",
        )
    if parameter.is_meta:
        raise CarrierError(
            f"The carrier {carrier.name[:120]!r} has no weights yet",
            expected="a model that is initialised or loaded",
            got="a parameter on the meta device",
        )


def _refuse_frozen(
    carriers: Sequence[Carrier], trainable: Sequence[Carrier], scheme: Scheme, *, chosen: bool
) -> None:
    frozen = next(carrier for carrier in carriers if carrier not in trainable)
    enough = trainable and sum(c.weights for c in trainable) >= scheme.bits
    if chosen and enough:
        check_capacity(trainable, scheme)
        return
    raise CarrierError(
        f"The carrier {frozen.name[:120]!r} is frozen",
        expected="a parameter with requires_grad=True",
        got=f"{len(trainable)} of {len(carriers)} carriers that train",
        do="unfreeze it, name carriers that train (with peft: list them in modules_to_save), or "
        "mark the saved and merged checkpoint with embed_checkpoint",
    )
