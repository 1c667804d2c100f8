"""Which part of a carrier this process holds, and the sum over all parts.

Whole parameters (one process, DDP) are one part each. FSDP2 and tensor parallelism keep a block of
rows or columns on every process as a DTensor. Responses are sums over the weights, so every process
sums what it holds and one all-reduce makes the rest; what is written stays on its process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_watermark.carriers import Carrier
from hf_watermark.errors import ShardedParameterError

__all__ = [
    "Part",
    "agreed",
    "changed",
    "part_of",
    "put_back_shards",
    "refuse_unknown_shards",
    "sum_of_parts",
]


@dataclass(frozen=True)
class Part:
    """A block of one carrier, which is all of it where nothing is sharded.

    Attributes:
        carrier: The whole.
        parameter: The model's own, whole or a DTensor.
        rows: Which of the carrier's rows are here; none at all on some processes of an uneven
            split.
        columns: Which of its columns.
        groups: The process groups over which the parts add up to the whole, one after the other.
        copied: A copy to read instead, with its graph; None almost always.
    """

    carrier: Carrier
    parameter: nn.Parameter
    rows: slice
    columns: slice
    groups: tuple[Any, ...] = ()
    copied: Tensor | None = None

    def matrix(self) -> Tensor:
        """The part as (rows, columns) float32, differentiable."""
        height, width = (int(part.stop - part.start) for part in (self.rows, self.columns))
        return self._local().reshape(height, width).float()

    def change(self, left: Tensor, right: Tensor, factor: float) -> None:
        """W <- (W + left right) factor, in place.

        Args:
            left: (out, T), or (out, 1).
            right: (T, M), or (1, M).
            factor: A number.
        """
        local = self._local().detach()
        new = changed(self.matrix().detach(), left[self.rows], right[:, self.columns], factor)
        local.copy_(new.reshape(local.shape))

    def whole(self) -> Tensor:
        """The carrier in its own shape, detached; where it is sharded, all processes must call."""
        parameter = self.parameter.detach()
        return parameter.full_tensor() if _is_dtensor(parameter) else parameter  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.parameter.device

    def _local(self) -> Tensor:
        if self.copied is not None:
            return self.copied
        if _is_dtensor(self.parameter):
            return self.parameter.to_local()  # type: ignore[attr-defined, no-any-return]
        return self.parameter


def changed(w: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """(W + left right) factor."""
    return torch.addmm(w, left, right) * factor


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def part_of(carrier: Carrier, parameter: nn.Parameter) -> Part:
    """The part of a carrier that this process holds.

    Raises:
        ShardedParameterError: If it is split otherwise than into blocks of rows or columns.
    """
    whole = slice(0, carrier.rows), slice(0, carrier.columns)
    if not _is_dtensor(parameter):
        return Part(carrier, parameter, *whole)
    from torch.distributed.tensor import Shard

    tensor: Any = parameter
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    bounds, groups = [(0, size) for size in carrier.shape], []
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        # Exactly a Shard: its strided kind (FSDP over tensor parallelism) holds no block.
        if type(placement) is not Shard or placement.dim > 1 or coordinate is None:
            raise _sharded(f"The parameter {carrier.name[:120]!r}", str(placement))
        start, stop = bounds[placement.dim]
        share = -(-(stop - start) // mesh.size(axis))  # as torch.chunk: the last ones get less
        start = min(start + coordinate[axis] * share, stop)
        bounds[placement.dim] = start, min(start + share, stop)
        groups.append(mesh.get_group(axis))
    taps = carrier.columns // carrier.shape[1]
    columns = slice(bounds[1][0] * taps, bounds[1][1] * taps)
    return Part(carrier, parameter, slice(*bounds[0]), columns, tuple(groups))


def sum_of_parts(parts: Sequence[Part], local: Sequence[Tensor]) -> list[Tensor]:
    """The sum over processes of a tensor for each part: one all-reduce for all that share groups.

    The gradient is that of this process's own term, which is what its own weights need.

    Args:
        parts: Of the carriers.
        local: What this process has to say of each, of the same shape on every process.
    """
    totals = list(local)
    for groups in {part.groups: None for part in parts if part.groups}:
        members = [i for i, part in enumerate(parts) if part.groups == groups]
        flat = torch.cat([local[i].detach().reshape(-1).to(local[members[0]]) for i in members])
        for group in groups:
            dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [local[i].numel() for i in members])
        for i, piece in zip(members, pieces, strict=True):
            total = piece.reshape(local[i].shape).to(local[i])
            # Without a graph the sum itself: it is the same to a bit on every process.
            totals[i] = total + (local[i] - local[i].detach()) if local[i].requires_grad else total
    return totals


def agreed(parts: Sequence[Part], values: Tensor) -> Tensor:
    """The mean over the processes that share parts: what they decide by must be the same to a bit.

    Else processors that round differently could disagree on whether another round is needed, and
    wait for each other for ever.
    """
    for groups in {part.groups: None for part in parts if part.groups}:
        device = next(part.device for part in parts if part.groups == groups)
        mean = values.to(device, copy=True)
        for group in groups:
            dist.all_reduce(mean, group=group)
            mean = mean / dist.get_world_size(group)
        values = mean.to(values)
    return values


def put_back_shards(model: nn.Module) -> None:
    """Let FSDP2 drop the whole parameters that it lends between forward and backward.

    What is written into them is lost. After an evaluation the outermost module's still lie there.
    """
    for module in model.modules():
        if _has_base(module, "FSDPModule"):
            module.reshard()  # type: ignore[operator]


def refuse_unknown_shards(model: nn.Module) -> None:
    """Refuse what shards in ways that no part can be made of.

    Raises:
        ShardedParameterError: For the first FSDP, which keeps flat pieces of several parameters.
    """
    for name, module in model.named_modules():
        if _has_base(module, "FullyShardedDataParallel"):
            raise _sharded(f"The module {name[:120]!r}" if name else "The model", "FSDP1")


def _has_base(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def _sharded(what: str, how: str) -> ShardedParameterError:
    return ShardedParameterError(
        f"{what} is sharded in a way that cannot be marked in training",
        expected="whole parameters (one process, DDP), or FSDP2's shards",
        got=how,
        do="set fsdp_version 2, or embed into the saved checkpoint afterwards",
    )
