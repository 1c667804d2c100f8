"""A classifier whose soft labels carry the mark of whoever asks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_watermark.errors import AttachError, SoftLabelError
from hf_watermark.key import OwnerKey
from hf_watermark.softlabels.answer_lists import class_names
from hf_watermark.softlabels.answers import logits_of, with_logits
from hf_watermark.softlabels.chips import chip_signs
from hf_watermark.softlabels.distortion import Distortion, expected_price, log_softmax
from hf_watermark.softlabels.features import KINDS, FeatureMap, images_needed
from hf_watermark.softlabels.lens import Lens
from hf_watermark.softlabels.perturbation import Bend, Margin, bend
from hf_watermark.softlabels.probes import Probes
from hf_watermark.softlabels.storage import SideFile, head_norms
from hf_watermark.softlabels.surveys import Images, Survey, passes, tap_for
from hf_watermark.softlabels.taps import Tap

__all__ = ["SoftLabelWatermark"]

_MANY_CLASSES = 100
_BENT_OF_MANY = 32


class SoftLabelWatermark(nn.Module):
    """Wraps an image classifier: same calls, same outputs, with `logits` bent by a secret key.

    The most likely class never changes (outside margin mode), the loss that the model computes from
    `labels` stays its own, and an input always gets the same answer. A student distilled from the
    answers is found by `hf_watermark.verify.verify_outputs`.

    Args:
        model: Any image classifier of transformers, or a module that returns logits, alone, first
            in a tuple, or under that name. It is not changed, apart from a hook that rests.
        key: The owner's.
        eps: The strength; two classes need about twice as much as ten. `distortion` says what it
            costs on your images.
        features: `H`, the model's own penultimate features, or `M`, mixed with the image at 4x4:
            better against weak students of other architectures, and in margin mode.
        margin: (lambda, tau) turns margin mode on: where the top two classes are closer than tau
            the key may swap them, which reaches students trained on labels alone. See
            `expected_price` after calibration.
        count: How many features; 64, or 128 for two classes. Narrow models have fewer.
        top_k: How many of the most likely classes are bent; by default all up to 100 classes, then
            32; K for all.
        head: The name of the layer whose input are the penultimate features, if the wrong one is
            found.

    Raises:
        AttachError: If `model` is no module, or is wrapped already.
        SoftLabelError: If a setting makes no sense.
    """

    signs: Tensor

    def __init__(
        self,
        model: nn.Module,
        key: OwnerKey,
        eps: float = 1.0,
        features: str = "H",
        margin: tuple[float, float] | None = None,
        *,
        count: int | None = None,
        top_k: int | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise AttachError("Only a torch module can be wrapped", got=type(model).__name__)
        if any(isinstance(module, SoftLabelWatermark) for module in model.modules()):
            raise AttachError(
                "The model's soft labels are marked already",
                do="wrap the model inside: served.model",
            )
        if not isinstance(key, OwnerKey):
            raise SoftLabelError("The key is no OwnerKey", got=type(key).__name__)
        if features not in KINDS:
            raise SoftLabelError(
                "Unknown features", expected=" or ".join(KINDS), got=repr(features)
            )
        if count is not None and count < 8:
            raise SoftLabelError("Too few features", expected="at least 8", got=count)
        self.model = model
        self.lens = Lens()
        self.register_buffer("signs", torch.zeros(0), persistent=False)
        self.how = Bend(eps, top_k, None if margin is None else Margin(*margin))
        self.recipient: str | None = None
        self._key = key
        self._features, self._count, self._head = features, count, head
        self._digests = np.zeros(0, np.uint64)
        self._expected_price = 0.0

    # Calibration ------------------------------------------------------------------------------

    def calibrate(self, pixel_values: Images, batch_size: int = 64) -> SoftLabelWatermark:
        """Learn the features from unlabelled images, about 5,000 of them.

        Args:
            pixel_values: (n, C, H, W) as the model takes them, or batches of them, or batches of
                dicts with that key (a DataLoader). Keep them apart from later probes.
            batch_size: For one large tensor.

        Returns:
            self.

        Raises:
            AttachError: If the model gives no logits (B, K), K >= 2, or has no classifier layer.
            SoftLabelError: If there are too few images, saying how many are needed, or this is a
                customer's view.
        """
        if self.recipient is not None:
            raise SoftLabelError(
                "A customer's view shares the owner's features", do="calibrate that"
            )
        seen = self._survey(pixel_values, batch_size)
        classes = seen.logits.shape[1]
        count = self._count or (128 if classes == 2 else 64)
        needed = images_needed(seen.own.shape[1], classes, count)
        if len(seen.own) < needed:
            raise SoftLabelError(
                "Too few images to calibrate on",
                expected=f"at least {needed} (5,000 if you can)",
                got=len(seen.own),
            )
        views = (seen.own, seen.logits, seen.images)
        feature_map = FeatureMap.fit(self._key, self._features, count, *views)
        self._adopt(feature_map, seen.digests)
        if self.how.margin is not None:
            log_probs, psi = log_softmax(seen.logits), feature_map.psi(*views)
            self._expected_price = expected_price(log_probs, psi, self._margin())
        return self

    def _adopt(self, feature_map: FeatureMap, digests: npt.NDArray[np.uint64]) -> None:
        self.lens.fit(feature_map, self.device)
        self._digests = digests
        self._set_signs()

    def _set_signs(self) -> None:
        self.signs = self._signs_of(self.recipient).to(self.device)
        if self.how.top_k is None and self.signs.shape[1] > _MANY_CLASSES:
            self.how = Bend(self.how.eps, _BENT_OF_MANY, self.how.margin)

    @property
    def expected_price(self) -> float:
        """Margin mode's loss of accuracy, 0 to 1, on the calibration images, in the mean over keys.

        For a calibrated model; `distortion` gives a single customer's, and the measured one.
        """
        return self._expected_price

    @property
    def untouched_rows(self) -> int:
        """How many rows had NaN or infinite logits and were passed through as they were."""
        return int(self.lens.untouched)

    # Serving ----------------------------------------------------------------------------------

    def forward(
        self, *args: Any, recipients: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """What the model returns, with its logits bent.

        Args:
            *args: For the model.
            recipients: Who asks for each image, when a batch mixes customers; None is the owner.
            **kwargs: For the model.

        Raises:
            NotCalibratedError: Before `calibrate`.
            SoftLabelError: If the shapes are not those of the calibration.
        """
        _, tap = self.lens.require()
        tap.listen()
        output = self.model(*args, **kwargs)
        own = tap.heard()
        logits = logits_of(output, labelled=kwargs.get("labels") is not None)
        images = kwargs.get("pixel_values", args[0] if args else None)
        served, broken = self._bend(own, logits, images, recipients)
        self.lens.untouched += broken.sum()
        if not torch.compiler.is_compiling() and broken.device.type == "cpu" and broken.any():
            warnings.warn(
                f"{int(broken.sum())} rows of logits are not finite; they were passed through",
                stacklevel=2,
            )
        return with_logits(output, served, labelled=kwargs.get("labels") is not None)

    def _bend(
        self,
        own: Tensor,
        logits: Tensor,
        images: Any,
        recipients: Sequence[str | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            psi = self.lens.psi(own, logits, images)
            if recipients is None:
                g = psi @ self.signs.to(psi.device, torch.float32)
            else:
                g = self._mixed(psi, recipients)
            return bend(logits, g / psi.shape[1] ** 0.5, self.how)

    def _mixed(self, psi: Tensor, recipients: Sequence[str | None]) -> Tensor:
        if len(recipients) != len(psi):
            raise SoftLabelError(
                "Every image needs a recipient", expected=f"{len(psi)} names", got=len(recipients)
            )
        parts = []
        order: list[int] = []
        for name in dict.fromkeys(recipients):
            rows = [i for i, other in enumerate(recipients) if other == name]
            signs = self._signs_of(name).to(psi.device, torch.float32)
            parts.append(psi[rows] @ signs)
            order += rows
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[back.to(psi.device)]

    def _signs_of(self, name: str | None) -> Tensor:
        """One customer's signs, (nb, K) float32."""
        key = self._key if name is None else self._key.for_recipient(name)
        feature_map, _ = self.lens.require()
        signs = chip_signs(key, feature_map.count, feature_map.classes)
        return torch.from_numpy(signs.astype(np.float32))

    def for_recipient(self, name: str) -> SoftLabelWatermark:
        """The same model and features with the signs of one customer.

        Raises:
            NotCalibratedError: Before `calibrate`.
            KeyFileError: If the name is empty.
        """
        self.lens.require()
        view = SoftLabelWatermark.__new__(SoftLabelWatermark)
        nn.Module.__init__(view)
        view.model, view.lens, view.how = self.model, self.lens, self.how
        view.register_buffer("signs", torch.zeros(0), persistent=False)
        view._key, view.recipient = self._key, name
        view._features, view._count, view._head = self._features, self._count, self._head
        view._digests, view._expected_price = self._digests, self._expected_price
        view.training = self.training
        view._set_signs()
        return view

    # Looking ----------------------------------------------------------------------------------

    def probes(self, pixel_values: Images, batch_size: int = 64) -> Probes:
        """The clean model's view of images, for `verify_outputs`; arguments as in `calibrate`."""
        feature_map, _ = self.lens.require()
        seen = self._survey(pixel_values, batch_size)
        return Probes(
            key=self._key,
            psi=feature_map.psi(seen.own, seen.logits, seen.images).astype(np.float32),
            log_probs=log_softmax(seen.logits).astype(np.float32),
            seen=np.isin(seen.digests, self._digests),
            top_k=self.how.top_k,
            margin=None if self.how.margin is None else self._margin(),
            labels=class_names(_id2label(self.model), feature_map.classes),
        )

    def distortion(
        self,
        pixel_values: Images,
        labels: Sequence[int] | Tensor | npt.NDArray[Any] | None = None,
        batch_size: int = 64,
    ) -> Distortion:
        """What this mark costs on images of yours, before it is deployed.

        Args:
            pixel_values: As in `calibrate`.
            labels: (n,), for accuracy, calibration error and NLL.
            batch_size: For one large tensor.
        """
        clean, served = [], []
        _, tap = self.lens.require()
        for own, logits, batch in passes(self.model, tap, pixel_values, batch_size):
            clean.append(logits.float().cpu().numpy())
            served.append(self._bend(own, logits, batch)[0].float().cpu().numpy())
        known = None if labels is None else np.asarray(labels)
        return Distortion.between(np.concatenate(clean), np.concatenate(served), known)

    def _survey(self, pixel_values: Images, batch_size: int) -> Survey:
        if self.lens.tap is None:
            self.lens.tap, pixel_values = tap_for(self.model, pixel_values, self._head)
        return Survey.of(self.model, self.lens.tap, pixel_values, batch_size)

    def detach(self) -> None:
        """Take the hook off the model, which is then as before; this wrapper serves no more."""
        if self.lens.tap is not None:
            self.lens.tap.remove()
        self.lens.tap = self.lens.map = None

    # The secret side --------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write features and settings to a file of mode 0600: secret, like the key.

        The model's own `save_pretrained` and `push_to_hub` never contain any of it.

        Raises:
            NotCalibratedError: Before `calibrate`.
            SoftLabelError: If the file cannot be written.
        """
        feature_map, tap = self.lens.require()
        settings = {
            "eps": self.how.eps,
            "top_k": self.how.top_k,
            "margin": None if self.how.margin is None else list(self._margin()),
            "head": tap.head,
            "expected_price": self._expected_price,
        }
        norms = head_norms(self.model, tap.head)
        SideFile(feature_map, self._digests, norms, settings).save(path, self._key)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, key: OwnerKey
    ) -> SoftLabelWatermark:
        """The watermark in a file that `save` wrote, around its model again.

        Raises:
            SoftLabelError: If the file is garbled, of another key, or of a model of other shapes.

        Warns:
            UserWarning: If the weights of the model's head are not those of the calibration.
        """
        stored = SideFile.load(path, key)
        settings = stored.settings
        served = cls(
            model,
            key,
            settings["eps"],
            stored.map.kind,
            settings["margin"],
            count=max(8, stored.map.count),
            top_k=settings["top_k"],
            head=settings["head"],
        )
        stored.check(model)
        served.lens.tap = Tap(model, settings["head"])
        served._expected_price = float(settings["expected_price"])
        served._adopt(stored.map, stored.digests)
        return served

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # torch.save, copy.deepcopy and pools of processes would carry the secret along.
        raise TypeError("A SoftLabelWatermark is never pickled or copied: save() and load() it")

    # What pipelines ask for -------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        tensor = next(self.model.parameters(), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating dtype."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def _margin(self) -> tuple[float, float]:
        assert self.how.margin is not None
        return self.how.margin.strength, self.how.margin.limit

    def extra_repr(self) -> str:
        """Settings, and nothing of the secret."""
        return f"eps={self.how.eps:g}, features={self._features!r}, key={self._key.fingerprint}"


def _id2label(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "id2label", None)
