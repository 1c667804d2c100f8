"""Embedding while a model trains, in any PyTorch loop: `WatermarkLoss`.

The mark lives in the parameters alone: nothing is registered on the module, no hook is set, and
detaching leaves the `state_dict` and the module as they were.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import locate_carriers, make_claim, reference_digests, reference_tensors
from hf_watermark.errors import AttachError, ShardedParameterError
from hf_watermark.evidence import Claim, Seal
from hf_watermark.extraction import Extraction, Reading
from hf_watermark.files import FolderFiles
from hf_watermark.key import OwnerKey
from hf_watermark.module_carriers import carriers_of, parts_of
from hf_watermark.parts import Part, put_back_shards
from hf_watermark.projected_step import ProjectedStep
from hf_watermark.projections import Floats, Projection
from hf_watermark.scheme import Scheme
from hf_watermark.sealing import put_on
from hf_watermark.wrappers import plain_parameters, unwrapped
from hf_watermark.zero_parts import shape_of, whole_parts

__all__ = ["Measurement", "WatermarkLoss"]

logger = logging.getLogger(__name__)

_ROWS_TO_COMPARE = 4
# Which keys are attached to which module: attaching the same one twice would push twice as hard.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.WeakValueDictionary[str, WatermarkLoss]]
_ATTACHED = weakref.WeakKeyDictionary()


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
    watermark.seal()
    watermark.detach()
    model.save_pretrained(folder)
    (folder / "watermark.json").write_bytes(watermark.claim(folder).public.to_bytes())
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
        self.secret_carriers = carriers is not None
        self.carriers = carriers_of(model, self.scheme, carriers)
        self.projection = Projection(key, self.scheme, self.carriers)
        self._projected = ProjectedStep(self.projection, self.carriers)
        self._seal: Seal | None = None
        self._sealed_rows: list[Floats] = []
        self._attached = False
        self.attach()

    @property
    def _parts(self) -> list[Part]:
        """The carriers, looked up anew: sharding and converting put others in their place."""
        return parts_of(self.model, self.carriers)

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
        self._projected.forget()
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
        held = self._parts
        device = held[0].device
        signs = torch.as_tensor(self.projection.message_signs, dtype=torch.float32, device=device)
        # Autocast would round the responses to 8 bits of mantissa.
        with (
            torch.autocast(device_type=device.type, enabled=False),
            whole_parts(held) as parts,
        ):
            raw_bce = self.scheme.statistic == "mean" and self.scheme.embedding == "bce"
            agreement = signs * self._projected.responses(parts, natural=not raw_bce)
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
            return self._projected.responses(parts, natural=natural)

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
        self._seal = None  # what trains on trains beside it
        if self.steps % self.every == 0:
            self.project()
        self.steps += 1

    @torch.no_grad()
    def project(self) -> None:
        """Bring every bit to its margin now: see `ProjectedStep.apply`."""
        if self.scheme.embedding != "projection":
            return
        put_back_shards(self.model)
        self._projected.apply(self._parts)

    @torch.no_grad()
    def seal(self) -> Seal | None:
        """Once training has ended: add the mark that is read where disguises are undone.

        Layers that were trained beside a mark know of it, and comparing disguised copies by them
        would favour its key. So the seal has a key of its own, derived from the owner's and from
        the carriers as training left them: none that an earlier training saw. It is put on like the
        closed form's, and the first mark keeps its margins. To train on voids it: seal again.

        Returns:
            What `claim` will say of it; None, with the reason in the log, where disguises of the
            architecture cannot be undone, or the carriers cannot hold both marks.

        Raises:
            AttachError: After `detach`.
        """
        self._check_attached()
        if self._seal is not None:
            return self._seal
        put_back_shards(self.model)
        parameters = plain_parameters(self.model)
        shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
        if not reference_tensors(shapes, [carrier.name for carrier in self.carriers]):
            logger.info("Not sealed: disguises of this architecture cannot be undone")
            return None
        self._seal = put_on(self.key, self.projection, self._parts, self.project)
        self._sealed_rows = self._first_rows(self.weights())
        return self._seal

    def claim(
        self, folder: str | os.PathLike[str], gathered: Mapping[str, Tensor] | None = None
    ) -> Claim:
        """The signed claim about the model as it was just saved.

        It speaks of a seal only if the weights are those that were sealed.

        Args:
            folder: Where it was saved.
            gathered: The whole weights by name, where the model is sharded.

        Returns:
            The owner's own copy; publish its `public` form.

        Raises:
            WatermarkError: If the carriers are not in what was saved, or only in shards.
        """
        gathered = gathered or {}
        # Sharded weights come gathered, and only here: the other processes are not asked again.
        if all(carrier.name in gathered for carrier in self.carriers):
            weights = [gathered[carrier.name] for carrier in self.carriers]
        elif self.is_sharded:
            raise ShardedParameterError(
                "The carriers are sharded and not in what is saved",
                do="save whole models (FULL_STATE_DICT), then run hf-watermark embed on the folder",
            )
        else:
            weights = self.weights()
        checkpoint, rows = Checkpoint.open(FolderFiles(folder)), self._first_rows(weights)
        names = locate_carriers(checkpoint, self.carriers, rows)
        sealed = self._seal is not None and all(map(np.array_equal, rows, self._sealed_rows))
        return make_claim(
            checkpoint,
            self.key,
            self.scheme,
            names,
            secret_carriers=self.secret_carriers,
            references=reference_digests(checkpoint, names) if sealed else None,
            seal=self._seal,
        )

    def _first_rows(self, weights: Sequence[Tensor]) -> list[Floats]:
        found = []
        for carrier, weight in zip(self.carriers, weights, strict=True):
            rows = weight[:_ROWS_TO_COMPARE].detach().reshape(-1, carrier.columns)
            found.append(rows.float().cpu().numpy().copy())
        return found

    @torch.no_grad()
    def measure(self) -> Measurement:
        """BER, smallest margin and log10 p as they stand now; NaN if a carrier is not finite."""
        put_back_shards(self.model)
        z = self._projected.responses(self._parts)
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
    def kept_bytes(self) -> int:
        """What the mark keeps in memory between steps: row signs, projections, Gram matrices."""
        return self._projected.kept_bytes

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
