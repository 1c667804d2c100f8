"""Embedding while a model trains, in any PyTorch loop: `WatermarkLoss`.

The mark lives in the parameters alone: nothing is registered on the module, no hook is set, and
detaching leaves the `state_dict` and the module as they were.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_watermark.carriers import (
    Carrier,
    check_capacity,
    choose_carriers,
    named_carriers,
)
from hf_watermark.errors import AttachError, CarrierError
from hf_watermark.extraction import Extraction, Reading
from hf_watermark.key import OwnerKey
from hf_watermark.margins import TOLERANCE, Grams, growth, least_change, lift
from hf_watermark.parts import (
    Part,
    agreed,
    part_of,
    put_back_shards,
    refuse_unknown_shards,
    sum_of_parts,
)
from hf_watermark.projections import Doubles, Projection
from hf_watermark.scheme import Scheme
from hf_watermark.wrappers import plain_parameters, unwrapped, unwrapped_parameters
from hf_watermark.zero_parts import shape_of, whole_parts, zero_part_of

__all__ = ["Measurement", "WatermarkLoss", "unwrapped_parameters"]

# Which keys are attached to which module: attaching the same one twice would push twice as hard.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.WeakValueDictionary[str, WatermarkLoss]]
_ATTACHED = weakref.WeakKeyDictionary()

_PASSES = 8  # rounding to half precision moves responses a little: two passes nearly always do


@dataclass(frozen=True)
class Measurement:
    """How the mark stands now.

    Attributes:
        ber: Bit error rate, 0 to 1.
        margin: The smallest s_t z_t, in natural sigmas; negative where a bit is wrong.
        log10_p: log10 of the deciding statistic's tail.
    """

    ber: float
    margin: float
    log10_p: float


class WatermarkLoss:
    """The mark of one key in one model while it trains.

    ```python
    watermark = WatermarkLoss(model, key)
    loss = watermark(task_loss)
    accelerator.backward(loss)
    optimizer.step()
    watermark.step()
    ...
    watermark.detach()
    ```

    With `embedding="projection"` (the default) the call returns the task's loss as it is, and
    `step` changes the carriers; with `hinge` and `bce` the call adds the term of Uchida et al.
    2017, section 3 (summed over bits), and `step` does nothing. In evaluation mode neither does
    anything.

    Under FSDP2 and ZeRO every process makes one, and calls the same methods at the same time:
    responses are summed over the shards, and every process changes its own.

    Args:
        model: Any module; DDP, torch.compile and peft wrappers are seen through.
        key: The owner's key, or a recipient's.
        scheme: None takes `Scheme()`.
        carriers: Names of the parameters that carry the mark; None chooses (`choose_carriers`), and
            of those chosen the frozen ones stay as they are, while the others carry their share.
        every: How many calls of `step` share one projection.

    Raises:
        ModelTooSmallError: If the carriers cannot hold the scheme's bits.
        CarrierError: If a carrier is missing, frozen or not floating point.
        ShardedParameterError: If the model is sharded by FSDP1.
        AttachError: If this key is attached to this module already.
    """

    def __init__(
        self,
        model: nn.Module,
        key: OwnerKey,
        scheme: Scheme | None = None,
        *,
        carriers: Sequence[str] | None = None,
        every: int = 10,
    ) -> None:
        if not isinstance(key, OwnerKey):
            raise AttachError("The key is no OwnerKey", got=type(key).__name__)
        if every < 1:
            raise AttachError("every is out of range", expected="1 or more", got=every)
        self.model = model
        self.key = key
        self.scheme = Scheme() if scheme is None else scheme
        self.every = every
        self.steps = 0
        refuse_unknown_shards(model)
        put_back_shards(model)
        plain = plain_parameters(model)
        named = plain if carriers is None else {**unwrapped_parameters(model), **plain}
        shapes = {name: shape_of(parameter) for name, parameter in named.items()}
        self.secret_carriers = carriers is not None
        self.carriers: tuple[Carrier, ...] = (
            choose_carriers(shapes) if carriers is None else named_carriers(shapes, carriers)
        )
        check_capacity(self.carriers, self.scheme)
        for carrier in self.carriers:
            _refuse_unusable(carrier, named[carrier.name])
        trainable = [carrier for carrier in self.carriers if named[carrier.name].requires_grad]
        if len(trainable) < len(self.carriers):
            _refuse_frozen(self.carriers, trainable, self.scheme, chosen=carriers is None)
        self.projection = Projection(key, self.scheme, self.carriers)
        self._cache: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._grams = Grams(len(self.carriers), self.scheme.bits, partial(_gram, self.projection))
        self._attached = False
        self.attach()

    @property
    def _parts(self) -> list[Part]:
        """The carriers, looked up anew: sharding and converting put others in their place."""
        refuse_unknown_shards(self.model)
        parameters = {**unwrapped_parameters(self.model), **plain_parameters(self.model)}
        found = []
        for carrier in self.carriers:
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

    def attach(self) -> None:
        """Start marking; the constructor does it.

        Raises:
            AttachError: If this key is attached to this module already.
        """
        # By the plain model: a wrapper around it trains the same parameters.
        keys = _ATTACHED.setdefault(unwrapped(self.model), weakref.WeakValueDictionary())
        if self.key.fingerprint in keys:
            raise AttachError(
                f"The key {self.key.fingerprint} is attached to this model already",
                do="detach() the first WatermarkLoss, or go on using it",
            )
        keys[self.key.fingerprint] = self
        self._attached = True

    def release(self) -> None:
        """Stop marking without touching the weights; nothing happens if it has stopped already."""
        if self._attached:
            _ATTACHED[unwrapped(self.model)].pop(self.key.fingerprint, None)
        self._cache.clear()
        self._attached = False

    def __call__(self, task_loss: Tensor) -> Tensor:
        """The loss to go backward from: with the mark's term added where the scheme has one.

        Args:
            task_loss: A scalar. Not divided by accumulation steps: `Accelerator.backward` does it.

        Raises:
            AttachError: After `detach`.
        """
        self._check_attached()
        if self.scheme.embedding == "projection" or not self.model.training:
            return task_loss
        return task_loss + self.penalty().to(task_loss.device)

    def penalty(self) -> Tensor:
        """The weighted term that `hinge` and `bce` add: a float32 scalar with its graph.

        `hinge`: lambda sum_t relu(m - s_t z_t); `bce`: lambda sum_t log(1 + exp(-s_t z_t)). z is
        in natural sigmas, except for `mean` with `bce`: the paper's own z = X w on raw weights.
        """
        device = self._parts[0].device
        signs = torch.as_tensor(self.projection.message_signs, dtype=torch.float32, device=device)
        # Autocast would round the responses to 8 bits of mantissa.
        with (
            torch.autocast(device_type=device.type, enabled=False),
            whole_parts(self._parts) as parts,
        ):
            raw_bce = self.scheme.statistic == "mean" and self.scheme.embedding == "bce"
            agreement = signs * self._responses(parts, natural=not raw_bce)
            if self.scheme.embedding == "bce":
                total = nn.functional.softplus(-agreement).sum()
            else:
                total = torch.relu(self.projection.margin - agreement).sum()
            return (self.scheme.weight or 0.0) * total

    def responses(self, *, natural: bool = True) -> Tensor:
        """z, (T,) float32, differentiable with respect to the carriers.

        A carrier of zeros, which some models start with, says nothing: its part is 0.

        Args:
            natural: In natural sigmas; otherwise raw, which differs only for `mean`.
        """
        with whole_parts(self._parts) as parts:
            return self._responses(parts, natural=natural)

    def _responses(self, parts: Sequence[Part], *, natural: bool) -> Tensor:
        if self.scheme.statistic == "spread":
            return self._spread(parts)[0].sum(dim=0)
        means = self._means(parts)
        device = means[0].device
        z = torch.zeros(self.scheme.bits, device=device)
        for i, mean in enumerate(means):
            z = z + (self._tensors(i, mean.device)[1] @ mean).to(device)
        if natural:
            square = torch.cat([mean.to(device) for mean in means]).square().mean()
            z = z / _not_zero(self.projection.taps * square).sqrt()
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
        sizes, rows = (
            torch.tensor([getattr(c, of) for c in self.carriers], device=device, dtype=totals.dtype)
            for of in ("weights", "rows")
        )
        rms = _root(totals[:, -1] / sizes)
        return totals[:, :-1] / (_not_zero(rms) * rows.sqrt())[:, None], rms

    def _means(self, parts: Sequence[Part]) -> list[Tensor]:
        """W of the paper, the mean over output rows, of every carrier, (M_i,)."""
        sums = []
        for part in parts:
            columns = torch.zeros(part.carrier.columns, device=part.device)
            columns[part.columns] = part.matrix().sum(dim=0)
            sums.append(columns)
        return [
            total / part.carrier.rows
            for part, total in zip(parts, sum_of_parts(parts, sums), strict=True)
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Call after `optimizer.step()`: every `every`-th call brings the bits to their margins.

        Does nothing for `hinge` and `bce`, in evaluation mode, or while a carrier holds NaN or Inf,
        which the mark must not hide. Nor inside `Accelerator.accumulate` until the optimizer takes
        its step too: between micro-batches the weights must stay as they are.
        """
        self._check_attached()
        if not self.model.training or _is_accumulating():
            return
        if self.steps % self.every == 0:
            self.project()
        self.steps += 1

    @torch.no_grad()
    def project(self) -> None:
        """The smallest change of the carriers that brings every bit to its margin, now.

        W_i += sum_t a_t s_t u_it x_it^T rms(W_i) / sqrt(out_i) with the least a >= 0 that reaches
        the margins, then back to the norm that W_i had: a test of weight norms sees nothing. For
        `mean` it is the mean over the rows that keeps its norm. Frozen carriers are left alone.
        """
        if self.scheme.embedding != "projection":
            return
        put_back_shards(self.model)
        parts = self._parts
        free = np.array([part.parameter.requires_grad for part in parts])
        change = self._change_spread if self.scheme.statistic == "spread" else self._change_mean
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
        weights = np.array([float(carrier.weights) for carrier in self.carriers])
        signs = self.projection.message_signs
        margins = np.full(self.scheme.bits, self.projection.margin)
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
        margin, signs = self.projection.margin, self.projection.message_signs
        means = self._means(parts)
        z = self._responses(parts, natural=True).double().cpu().numpy()
        deficit = margin - signs * z
        if not np.isfinite(z).all() or float(deficit.max()) <= TOLERANCE * margin:
            deficit = np.zeros_like(deficit)
        total = np.zeros((self.scheme.bits, self.scheme.bits))
        for gram in self._grams.masked(free):
            total += gram
        v = signs * least_change(deficit, total * np.outer(signs, signs))
        coefficients = agreed(parts, torch.as_tensor(v, dtype=torch.float32))
        if not bool(coefficients.any()):
            return False
        square = torch.cat([mean.cpu() for mean in means]).square().mean()
        step = coefficients * (self.projection.taps * square).sqrt()
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
            u = torch.from_numpy(self.projection.row_signs(carrier).astype(np.float32))
            x = torch.from_numpy(np.ascontiguousarray(self.projection.x(carrier)))
            self._cache[carrier, device] = (u.to(device), x.to(device))
        return self._cache[carrier, device]

    @torch.no_grad()
    def measure(self) -> Measurement:
        """BER, smallest margin and log10 p as they stand now; NaN if a carrier is not finite."""
        put_back_shards(self.model)
        z = self._responses(self._parts, natural=True)
        agreement = self.projection.message_signs * z.double().cpu().numpy()
        if not np.isfinite(agreement).all():
            return Measurement(math.nan, math.nan, math.nan)
        reading = self.read()
        return Measurement(
            ber=1.0 - reading.matched / reading.bits,
            margin=float(agreement.min()),
            log10_p=reading.log10_p,
        )

    @torch.no_grad()
    def read(self) -> Reading:
        """What a verifier would read from the carriers now."""
        extraction = Extraction(self.projection)
        for i, weight in enumerate(self.weights()):
            extraction.add(i, 0, weight.float().cpu().numpy())
        return extraction.reading()

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold different parts of a carrier: then all of them must read."""
        return any(part.groups for part in self._parts)

    def weights(self) -> list[Tensor]:
        """The carriers' current values, detached, in order; gathered where they are sharded."""
        put_back_shards(self.model)
        return [part.whole() for part in self._parts]

    def detach(self) -> None:
        """One last projection, then let go of the model: nothing is left on it.

        A model that was only looked at, in evaluation mode from first to last, is left as it is.

        Raises:
            AttachError: If it was detached before.
        """
        self._check_attached()
        # Loops end with an evaluation: what was stepped needs its last projection all the same.
        try:
            if self.model.training or self.steps:
                self.project()
        finally:
            self.release()

    def _check_attached(self) -> None:
        if not self._attached:
            raise AttachError("This WatermarkLoss was detached", do="make a new one")

    def __repr__(self) -> str:
        return (
            f"WatermarkLoss(scheme={self.scheme.name!r}, carriers={len(self.carriers)}, "
            f"key={self.key.fingerprint!r})"
        )


def _is_accumulating() -> bool:
    """Whether accelerate lets an optimizer's step pass without effect now."""
    accelerate = sys.modules.get("accelerate.state")
    return accelerate is not None and not accelerate.GradientState().sync_gradients


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
