"""The mathematics of embedding on tensors: responses of carriers, and the step to their margins.

The same numbers as `projections` and `margins` have in numpy, on whatever device the carriers are,
over the parts of them that this process holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_watermark.carriers import Carrier
from hf_watermark.margins import TOLERANCE, Grams, growth, least_change, lift
from hf_watermark.parts import Part, agreed, sum_of_parts
from hf_watermark.projections import Doubles, Projection

__all__ = ["ProjectedStep"]

_PASSES = 8  # rounding to half precision moves responses a little: two passes nearly always do


class ProjectedStep:
    """What one key wants of the carriers, as tensors that are made once a device.

    Args:
        projection: What the key reads.
        carriers: In the order of the key's streams.
    """

    def __init__(self, projection: Projection, carriers: Sequence[Carrier]) -> None:
        self._projection, self._carriers = projection, carriers
        self._cache: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._grams = Grams(len(carriers), projection.scheme.bits, partial(_gram, projection))

    def forget(self) -> None:
        """Drop the tensors; they are made again when needed."""
        self._cache.clear()

    @property
    def kept_bytes(self) -> int:
        """What is kept in memory between steps."""
        tensors = [tensor for pair in self._cache.values() for tensor in pair]
        return sum(t.numel() * t.element_size() for t in tensors) + self._grams.kept_bytes

    def responses(self, parts: Sequence[Part], *, natural: bool = True) -> Tensor:
        """z, (T,) float32, differentiable with respect to the parts.

        Args:
            parts: Of every carrier, in order.
            natural: In natural sigmas; otherwise raw, which differs only for `mean`.
        """
        if self._projection.scheme.statistic == "spread":
            return self._spread(parts)[0].sum(dim=0)
        return self._of_means(self._means(parts), natural=natural)

    def _of_means(self, means: Sequence[Tensor], *, natural: bool) -> Tensor:
        device = means[0].device
        z = torch.zeros(self._projection.scheme.bits, device=device)
        for i, mean in enumerate(means):
            z = z + (self._tensors(i, mean.device)[1] @ mean).to(device)
        if natural:
            square = torch.cat([mean.to(device) for mean in means]).square().mean()
            z = z / _not_zero(self._projection.taps * square).sqrt()
        return z

    def _spread(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Responses of every carrier alone, (n, T), and its root mean square, (n,)."""
        sums = []
        for i, part in enumerate(parts):
            w = part.matrix()
            u, x = self._tensors(i, part.device)
            raw = (x[:, part.columns] * (u[part.rows].T @ w)).sum(dim=1)
            sums.append(torch.cat([raw, w.square().sum().reshape(1)]))
        device = parts[0].device
        totals = torch.stack([total.to(device) for total in sum_of_parts(parts, sums)])
        sizes = totals.new_tensor([carrier.weights for carrier in self._carriers])
        rows = totals.new_tensor([carrier.rows for carrier in self._carriers])
        rms = _root(totals[:, -1] / sizes)
        return totals[:, :-1] / (_not_zero(rms) * rows.sqrt())[:, None], rms

    def _means(self, parts: Sequence[Part]) -> list[Tensor]:
        """The mean over output rows (w of the paper) of every carrier, (M_i,)."""
        sums = []
        for part in parts:
            columns = torch.zeros(part.carrier.columns, device=part.device)
            columns[part.columns] = part.matrix().sum(dim=0)
            sums.append(columns)
        return [
            total / part.carrier.rows
            for part, total in zip(parts, sum_of_parts(parts, sums), strict=True)
        ]

    def apply(self, parts: Sequence[Part]) -> None:
        """The smallest change of the carriers that brings every bit to its margin.

        W_i += sum_t a_t s_t u_it x_it^T rms(W_i) / sqrt(out_i) with the least a >= 0 that reaches
        the margins, then back to the norm that W_i had: a test of weight norms sees nothing. For
        `mean` it is the mean over the rows that keeps its norm. Frozen carriers are left alone, and
        so is everything while a weight is not finite.

        Args:
            parts: Of every carrier, in order.
        """
        free = np.array([part.parameter.requires_grad for part in parts])
        spread = self._projection.scheme.statistic == "spread"
        change = self._change_spread if spread else self._change_mean
        for _ in range(_PASSES):
            if not change(parts, free):
                return

    def _change_spread(self, parts: Sequence[Part], free: npt.NDArray[np.bool_]) -> bool:
        """One change of the carriers, if any is needed."""
        responses, sizes = self._spread(parts)
        z, rms = responses.double().cpu().numpy(), sizes.double().cpu().numpy()
        if not np.isfinite(z).all():
            return False
        # Zeros have no size to be changed by.
        grams = self._grams.masked(free & (rms > 0.0))
        weights = np.array([float(carrier.weights) for carrier in self._carriers])
        signs = self._projection.message_signs
        margins = np.full(self._projection.scheme.bits, self._projection.margin)
        coefficients = torch.as_tensor(lift(z, grams, weights, signs, margins), dtype=torch.float32)
        coefficients = agreed(parts, coefficients)
        v = coefficients.double().numpy()
        if not v.any():
            return False
        ratios = growth(v, z, grams, weights)
        for i, part in enumerate(parts):
            if not free[i] or not rms[i] > 0.0:
                continue
            u, x = self._tensors(i, part.device)
            size = float(rms[i]) / math.sqrt(part.carrier.rows)
            part.change(u * (coefficients * size).to(part.device), x, 1.0 / float(ratios[i]))
        return True

    def _change_mean(self, parts: Sequence[Part], free: npt.NDArray[np.bool_]) -> bool:
        """Moving every row by the same vector moves the mean by it: the least change that does.

        z does not depend on the norm of the mean, so that is put back: else margins that nothing
        can reach (more bits or higher than columns allow) would make the weights grow at each call.
        """
        margin, signs = self._projection.margin, self._projection.message_signs
        means = self._means(parts)
        z = self._of_means(means, natural=True).double().cpu().numpy()
        deficit = margin - signs * z
        if not np.isfinite(z).all() or float(deficit.max()) <= TOLERANCE * margin:
            deficit = np.zeros_like(deficit)
        total = np.zeros((self._projection.scheme.bits, self._projection.scheme.bits))
        for gram in self._grams.masked(free):
            total += gram
        v = signs * least_change(deficit, total * np.outer(signs, signs))
        coefficients = agreed(parts, torch.as_tensor(v, dtype=torch.float32))
        if not bool(coefficients.any()):
            return False
        square = torch.cat([mean.cpu() for mean in means]).square().mean()
        step = coefficients * (self._projection.taps * square).sqrt()
        moved = {
            i: mean + step.to(mean.device) @ self._tensors(i, mean.device)[1]
            for i, mean in enumerate(means)
            if free[i]
        }
        before = torch.cat([means[i].cpu() for i in moved]).norm()
        back = float(before / _not_zero(torch.cat([mean.cpu() for mean in moved.values()]).norm()))
        for i, mean in moved.items():
            rows = torch.ones(parts[i].carrier.rows, 1, device=mean.device)
            parts[i].change(rows, (mean * back - means[i])[None], 1.0)
        return True

    def _tensors(self, carrier: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """U (out_i, T) and X (T, M_i) of one carrier as float32 on the device, made once."""
        if (carrier, device) not in self._cache:
            u = torch.from_numpy(self._projection.row_signs(carrier).astype(np.float32))
            x = torch.from_numpy(np.ascontiguousarray(self._projection.x(carrier)))
            self._cache[carrier, device] = (u.to(device), x.to(device))
        return self._cache[carrier, device]


def _not_zero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0.0, torch.ones_like(divisor), divisor)


def _gram(projection: Projection, carrier: int) -> Doubles:
    """Inner products of the bits' directions in one carrier, (T, T) float64."""
    x = projection.x(carrier).astype(np.float64)
    inner: Doubles = x @ x.T
    if projection.scheme.statistic == "spread":
        u = projection.row_signs(carrier).astype(np.float32)
        inner *= (u.T @ u) / len(u)
    return inner


def _root(squares: Tensor) -> Tensor:
    """The square root, without the infinite slope at 0."""
    return torch.where(squares == 0.0, squares, _not_zero(squares).sqrt())
