"""A marked model as a teacher: what another model's loss is when it learns its soft labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_watermark.errors import AttachError, SoftLabelError
from hf_watermark.softlabels.answer_lists import class_names
from hf_watermark.softlabels.answers import logits_of
from hf_watermark.softlabels.surveys import resting
from hf_watermark.softlabels.wrapper import SoftLabelWatermark

__all__ = ["Teacher"]


class Teacher:
    """Says how far a student is from what a `SoftLabelWatermark` serves.

    The student's weights then carry the mark, without the wrapper. The teacher is only asked: in
    eval mode, without gradients, as its customers ask it; its modes are then as before.

    Args:
        served: Calibrated, the owner's own view or a customer's.
        temperature: T of Hinton et al. 2015, section 2: both sides' logits are divided by it, and
            the loss multiplied by T^2. 1 shows the mark best.

    Raises:
        AttachError: If `served` is no wrapper.
        NotCalibratedError: If it is not calibrated.
        SoftLabelError: If the temperature makes no sense.
    """

    def __init__(self, served: SoftLabelWatermark, temperature: float = 1.0) -> None:
        if not isinstance(served, SoftLabelWatermark):
            raise AttachError(
                "The teacher is no SoftLabelWatermark",
                got=type(served).__name__,
                do="wrap your model: SoftLabelWatermark(model, key).calibrate(images)",
            )
        served.lens.require()
        if not 0.0 < temperature < math.inf:
            raise SoftLabelError("The temperature makes no sense", expected="> 0", got=temperature)
        self.served = served
        self.temperature = float(temperature)

    def accept(self, student: nn.Module) -> None:
        """Look at a student before training.

        Raises:
            AttachError: If it shares parameters with the teacher, which would change under its own
                lesson, or has the same classes in another order.
        """
        own = {id(parameter) for parameter in self.served.parameters()}
        if any(id(parameter) in own for parameter in student.parameters()):
            raise AttachError(
                "The student shares parameters with its teacher",
                do="train a model of its own, such as a copy of it",
            )
        feature_map, _ = self.served.lens.require()
        ours, theirs = (
            class_names(getattr(getattr(model, "config", None), "id2label", None), count)
            for model, count in (
                (self.served.model, feature_map.classes),
                (student, feature_map.classes),
            )
        )
        if ours != theirs and set(ours) == set(theirs):
            raise AttachError(
                "The student has the teacher's classes in another order",
                expected=", ".join(ours[:5]),
                got=", ".join(theirs[:5]),
            )

    def losses(self, logits: Tensor, pixel_values: Tensor) -> Tensor:
        """Cross-entropy against the served soft labels, (B,) nats, differentiable in `logits`.

        Args:
            logits: (B, K), the student's.
            pixel_values: (B, C, H, W), what it was given.

        Raises:
            AttachError: If the student has another number of classes.
        """
        with resting(self.served), torch.no_grad():
            at = self.served.device
            if at != logits.device:
                self.served.to(logits.device)
            served = logits_of(
                self.served(pixel_values=pixel_values.to(logits.device, self.served.dtype)),
                labelled=False,
            )
        if served.shape != logits.shape:
            raise AttachError(
                "The student's answers are not of the shape of its teacher's",
                expected=tuple(served.shape),
                got=tuple(logits.shape),
                do=f"give the student {served.shape[1]} labels (num_labels=)",
            )
        heat = self.temperature
        targets = (served.float() / heat).softmax(dim=1)
        spoken = (logits.float() / heat).log_softmax(dim=1)
        return -(targets * spoken).sum(dim=1) * heat**2
