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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_watermark.carriers import (
    Carrier,
    check_capacity,
    choose_carriers,
    named_carriers,
)
from hf_watermark.errors import AttachError, CarrierError, ShardedParameterError
from hf_watermark.extraction import Extraction, Reading
from hf_watermark.key import OwnerKey
from hf_watermark.margins import TOLERANCE, least_change
from hf_watermark.projections import Doubles, Projection
from hf_watermark.scheme import Scheme

__all__ = ["Measurement", "WatermarkLoss", "unwrapped_parameters"]

# Which keys are attached to which module: attaching the same one twice would push twice as hard.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.WeakValueDictionary[str, WatermarkLoss]]
_ATTACHED = weakref.WeakKeyDictionary()

_PASSES = 4  # rescaling to the old norm moves responses by d^2 / 2: two passes nearly always do
_FSDP = ("FSDPModule", "FullyShardedDataParallel")


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


def _unwrapped(model: nn.Module) -> nn.Module:
    """The plain model inside DDP, DataParallel and torch.compile."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module) or isinstance(
        model, (nn.parallel.DistributedDataParallel, nn.DataParallel)
    ):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


def unwrapped_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the plain model, whatever wraps it (DDP, torch.compile)."""
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in _unwrapped(model).named_parameters()
    }


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

    Args:
        model: Any module; DDP and torch.compile wrappers are seen through.
        key: The owner's key, or a recipient's.
        scheme: None takes `Scheme()`.
        carriers: Names of the parameters that carry the mark; None chooses (`choose_carriers`).
        every: How many calls of `step` share one projection.

    Raises:
        ModelTooSmallError: If the carriers cannot hold the scheme's bits.
        CarrierError: If a carrier is missing, frozen or not floating point.
        ShardedParameterError: If a carrier is sharded.
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
        _refuse_fsdp(model)
        parameters = unwrapped_parameters(model)
        for name, parameter in parameters.items():
            _refuse_shards(name, parameter)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.secret_carriers = carriers is not None
        self.carriers: tuple[Carrier, ...] = (
            choose_carriers(shapes) if carriers is None else named_carriers(shapes, carriers)
        )
        check_capacity(self.carriers, self.scheme)
        for carrier in self.carriers:
            _refuse_unusable(carrier, parameters[carrier.name])
        self.projection = Projection(key, self.scheme, self.carriers)
        self._cache: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._gram: Doubles | None = None
        self._attached = False
        self.attach()

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """The carriers, looked up anew: sharding and converting put others in their place."""
        parameters = unwrapped_parameters(self.model)
        found = []
        for carrier in self.carriers:
            parameter = parameters.get(carrier.name)
            if parameter is not None:
                _refuse_shards(carrier.name, parameter)
            if parameter is None or tuple(parameter.shape) != carrier.shape:
                raise AttachError(
                    f"The model has changed since {carrier.name[:120]!r} became a carrier",
                    expected=f"a parameter of shape {list(carrier.shape)}",
                    got="none" if parameter is None else f"{list(parameter.shape)}",
                    do="attach after everything that wraps or changes the model",
                )
            found.append(parameter)
        return found

    def attach(self) -> None:
        """Start marking; the constructor does it.

        Raises:
            AttachError: If this key is attached to this module already.
        """
        # By the plain model: a wrapper around it trains the same parameters.
        keys = _ATTACHED.setdefault(_unwrapped(self.model), weakref.WeakValueDictionary())
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
            _ATTACHED[_unwrapped(self.model)].pop(self.key.fingerprint, None)
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
        device = self.weights()[0].device
        signs = torch.as_tensor(self.projection.message_signs, dtype=torch.float32, device=device)
        # Autocast would round the responses to 8 bits of mantissa.
        with torch.autocast(device_type=device.type, enabled=False):
            raw_bce = self.scheme.statistic == "mean" and self.scheme.embedding == "bce"
            agreement = signs * self.responses(natural=not raw_bce)
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
        parameters = self._parameters
        device = parameters[0].device
        z = torch.zeros(self.scheme.bits, device=device)
        means = []
        for i, (carrier, parameter) in enumerate(zip(self.carriers, parameters, strict=True)):
            w = parameter.reshape(carrier.rows, carrier.columns).float()
            u, x = self._tensors(i, parameter.device)
            if self.scheme.statistic == "mean":
                means.append(w.mean(dim=0))
                z = z + (x @ means[-1]).to(device)
                continue
            norm = _not_zero(w.square().mean()).sqrt() * math.sqrt(carrier.rows)
            z = z + ((x * (u.T @ w)).sum(dim=1) / norm).to(device)
        if means and natural:
            square = torch.cat([mean.to(device) for mean in means]).square().mean()
            z = z / _not_zero(self.projection.taps * square).sqrt()
        return z

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
        `mean` it is the mean over the rows that keeps its norm.
        """
        if self.scheme.embedding != "projection":
            return
        margin, signs = self.projection.margin, self.projection.message_signs
        for _ in range(_PASSES):
            z = self.responses().double().cpu().numpy()
            deficit = margin - signs * z
            if not np.isfinite(z).all() or float(deficit.max()) <= TOLERANCE * margin:
                return
            gram = self._signed_gram()
            self._change(least_change(deficit, gram) * signs)

    def _change(self, v: Doubles) -> None:
        if self.scheme.statistic == "mean":
            self._change_mean(v)
            return
        for i, (carrier, parameter) in enumerate(zip(self.carriers, self._parameters, strict=True)):
            u, x = self._tensors(i, parameter.device)
            w = parameter.detach().reshape(carrier.rows, carrier.columns).float()
            before = w.norm()
            size = before / math.sqrt(w.numel()) / math.sqrt(carrier.rows)
            coefficients = torch.as_tensor(v, dtype=torch.float32, device=w.device)
            w = torch.addmm(w, u * (coefficients * size), x)
            w *= before / _not_zero(w.norm())
            parameter.copy_(w.reshape(parameter.shape))

    def _change_mean(self, v: Doubles) -> None:
        """Moving every row by the same vector moves the mean by it: the least change that does.

        z does not depend on the norm of the mean, so that is put back: else margins that nothing
        can reach (more bits or higher than columns allow) would make the weights grow at each call.
        """
        weights = [
            parameter.detach().reshape(carrier.rows, carrier.columns).float()
            for carrier, parameter in zip(self.carriers, self._parameters, strict=True)
        ]
        means = [w.mean(dim=0) for w in weights]
        before = torch.cat([mean.cpu() for mean in means])
        scale = float((self.projection.taps * before.square().mean()).sqrt())
        moved = []
        for i, mean in enumerate(means):
            _, x = self._tensors(i, mean.device)
            coefficients = torch.as_tensor(v * scale, dtype=torch.float32, device=mean.device)
            moved.append(mean + coefficients @ x)
        back = float(before.norm() / _not_zero(torch.cat([mean.cpu() for mean in moved]).norm()))
        for w, old, new, parameter in zip(weights, means, moved, self._parameters, strict=True):
            parameter.copy_((w + (new * back - old)).reshape(parameter.shape))

    def _signed_gram(self) -> Doubles:
        """(s s^T) o G, G the inner products of the bits' directions, (T, T) float64."""
        if self._gram is None:
            bits = self.scheme.bits
            gram = np.zeros((bits, bits))
            for i in range(len(self.carriers)):
                x = self.projection.x(i).astype(np.float64)
                inner = x @ x.T
                if self.scheme.statistic == "spread":
                    u = self.projection.row_signs(i).astype(np.float32)
                    inner *= (u.T @ u) / len(u)
                gram += inner
            signs = self.projection.message_signs
            self._gram = gram * np.outer(signs, signs)
        return self._gram

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
        agreement = self.projection.message_signs * self.responses().double().cpu().numpy()
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

    def weights(self) -> list[Tensor]:
        """The carriers' current values, detached, in order."""
        return [parameter.detach() for parameter in self._parameters]

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


def _refuse_fsdp(model: nn.Module) -> None:
    """Between forward and backward FSDP shows whole parameters, which it then throws away."""
    for name, module in model.named_modules():
        if any(kind.__name__ in _FSDP for kind in type(module).__mro__):
            raise _sharded(f"The module {name[:120]!r}" if name else "The model")


def _refuse_shards(name: str, parameter: Any) -> None:
    placeholder = parameter.numel() == 0 and hasattr(parameter, "ds_id")
    if (
        placeholder
        or type(parameter.data).__name__ == "DTensor"
        or hasattr(parameter, "_local_tensor")
    ):
        raise _sharded(f"The parameter {name[:120]!r}")


def _sharded(what: str) -> ShardedParameterError:
    return ShardedParameterError(
        f"{what} is sharded (FSDP, tensor parallel or ZeRO-3)",
        expected="whole parameters on every process: one process, DDP, or ZeRO-1/2",
        do="train without sharding, or embed into the saved checkpoint afterwards",
    )


def _refuse_unusable(carrier: Carrier, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise CarrierError(
            f"The carrier {carrier.name[:120]!r} cannot be marked",
            expected="float16, bfloat16, float32 or float64",
            got=str(parameter.dtype),
            do="name other carriers",
        )
    if not parameter.requires_grad:
        raise CarrierError(
            f"The carrier {carrier.name[:120]!r} is frozen",
            expected="a parameter with requires_grad=True",
            do="unfreeze it, or name carriers that train",
        )
    if parameter.is_meta:
        raise CarrierError(
            f"The carrier {carrier.name[:120]!r} has no weights yet",
            expected="a model that is initialised or loaded",
            got="a parameter on the meta device",
        )
