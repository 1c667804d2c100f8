"""Parts of carriers under DeepSpeed's ZeRO: flat pieces of a float32 master copy.

Every stage trains a master copy that is cut over the processes, and refreshes what the model
computes with from it: a change of either alone is lost at the next step, or not seen until then. So
responses are summed over the pieces of the master copy, and a change goes into both.

Nothing here imports deepspeed by itself: a parameter of its making is needed to get here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_watermark.carriers import Carrier
from hf_watermark.errors import ShardedParameterError
from hf_watermark.parts import Part, changed

__all__ = ["ZeroPart", "is_partitioned", "shape_of", "whole_parts", "zero_part_of"]


def is_partitioned(parameter: Any) -> bool:
    """Whether it is ZeRO-3's, which keeps it whole at times, and empty at others."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole, also where ZeRO-3 shows none."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class ZeroPart(Part):
    """A range of a carrier's weights in row-major order.

    Attributes:
        start: Its first weight.
        stop: After its last; `start` where this process holds none.
    """

    start: int = 0
    stop: int = 0

    @property
    def _inside(self) -> slice:
        """Where the range lies in the rows that it touches."""
        first = int(self.rows.start) * self.carrier.columns
        return slice(self.start - first, self.stop - first)

    def matrix(self) -> Tensor:
        """The rows that the range touches, float32, zero where other processes hold them."""
        rows = torch.zeros(self.rows.stop - self.rows.start, self.carrier.columns)
        rows = rows.to(self.device)
        if self.stop > self.start:
            rows.view(-1)[self._inside] = self._master().to(rows)
        return rows

    def change(self, left: Tensor, right: Tensor, factor: float) -> None:
        """See `Part.change`; into the master copy, and into what the model computes with."""
        if self.stop > self.start:
            rows = changed(self.matrix(), left[self.rows], right, factor)
            self._write(rows.view(-1)[self._inside])
        if self.parameter.numel():
            seen = self.parameter.detach().view(self.carrier.rows, self.carrier.columns)
            seen.copy_(changed(seen.float(), left, right, factor))

    def whole(self) -> Tensor:
        """What the model computes with; gathered under ZeRO-3, where all processes must call."""
        if not is_partitioned(self.parameter):
            return self.parameter.detach()
        with _gathered([self.parameter]):
            return self.parameter.detach().clone()

    def _master(self) -> Tensor:
        parameter: Any = self.parameter
        if not is_partitioned(parameter):
            fragment: Tensor = parameter._hp_mapping.get_hp_fragment()
            return fragment.detach()
        from deepspeed.utils import safe_get_local_fp32_param

        # What is frozen has no master copy, and is never changed.
        trained = parameter.requires_grad
        piece: Tensor = safe_get_local_fp32_param(parameter) if trained else parameter.ds_tensor
        return piece.detach()[: self.stop - self.start]

    def _write(self, piece: Tensor) -> None:
        parameter: Any = self.parameter
        if not is_partitioned(parameter):
            fragment = parameter._hp_mapping.get_hp_fragment()
            fragment.data.copy_(piece)
            return
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        # The rest of a piece is padding.
        padded = safe_get_local_fp32_param(parameter).detach().clone()
        padded[: len(piece)] = piece.to(padded)
        safe_set_local_fp32_param(parameter, padded)
        parameter.ds_tensor.data[: len(piece)].copy_(piece)


def zero_part_of(carrier: Carrier, parameter: nn.Parameter) -> ZeroPart | None:
    """The range of a carrier that this process holds, or None if ZeRO does not train it.

    Raises:
        ShardedParameterError: Before the optimizer was prepared, when there is no master copy yet.
    """
    tensor: Any = parameter
    if is_partitioned(tensor):
        if parameter.requires_grad and not hasattr(tensor, "_z3_optimizer"):
            raise ShardedParameterError(
                f"The parameter {carrier.name[:120]!r} has no master copy yet",
                expected="a model and an optimizer that DeepSpeed has prepared",
                do="prepare them before the first step of the mark",
            )
        share, rank = int(tensor.ds_tensor.numel()), int(tensor.ds_zero_partition_rank)
        start = min(share * rank, carrier.weights)
        stop = min(share * (rank + 1), carrier.weights)
        group = getattr(tensor, "ds_process_group", None)
    elif hasattr(tensor, "_hp_mapping"):
        start = stop = 0
        if tensor._hp_mapping is not None:
            address = tensor._hp_mapping.lp_fragment_address
            start, stop = int(address.start), int(address.start + address.numel)
        group = tensor._dp_group
    else:
        return None
    columns = carrier.columns
    rows = slice(start // columns, -(-stop // columns)) if stop > start else slice(0, 0)
    whole = slice(0, columns)
    return ZeroPart(carrier, parameter, rows, whole, (group,), start=start, stop=stop)


@contextlib.contextmanager
def whole_parts(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that autograd reaches: whole on every process, which then average their gradients."""
    partitioned = [part.parameter for part in parts if is_partitioned(part.parameter)]
    with _gathered(partitioned) if partitioned else contextlib.nullcontext():
        whole: list[Part] = []
        for part in parts:
            if isinstance(part, ZeroPart):
                rows, columns = slice(0, part.carrier.rows), slice(0, part.carrier.columns)
                # A copy: what is gathered goes away before backward needs it.
                copied = part.parameter.float().clone() if partitioned else None
                part = Part(part.carrier, part.parameter, rows, columns, (), copied)
            whole.append(part)
        yield whole


def _gathered(parameters: Sequence[nn.Parameter]) -> Any:
    from deepspeed import zero

    return zero.GatheredParameters(list(parameters))
