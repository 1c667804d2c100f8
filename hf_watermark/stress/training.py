"""How an attacker trains: one loop for every attack that does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_watermark.softlabels.answers import logits_of
from hf_watermark.stress.attacks import Means
from hf_watermark.stress.layers import head

__all__ = ["Recipe", "answers", "batches", "train"]

_WARM = 0.1  # of the steps: up in a line, then down as a cosine
_CLIP = 1.0
_BATCH = 256  # where nothing is trained

Loss = Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        rate: Learning rate, times the attacker's.
        epochs: Passes, times the attacker's.
        weight_decay: Of the optimizer.
        momentum: SGD with this momentum and ten times the rate; AdamW if it is 0.
        head_only: Everything but the last layer stays as it is.
    """

    rate: float = 1.0
    epochs: float = 1.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    head_only: bool = False


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """The task's own loss."""

    def loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
        logits = logits_of(model(pixel_values=images), labelled=False)
        return nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return loss


def train(
    model: Any,
    means: Means,
    recipe: Recipe,
    loss: Loss | None = None,
    after_step: Callable[[], None] | None = None,
) -> Any:
    """Train the model that is given, on the attacker's images; returns it in evaluation mode.

    Args:
        model: Changed in place. Parameters that need no gradient stay as they are.
        means: What the attacker has.
        recipe: How.
        loss: From model, images and labels; the task's own by default.
        after_step: Called after every step.
    """
    loss = loss or cross_entropy()
    if recipe.head_only:
        last = set(head(model).parameters())
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = recipe.rate * means.learning_rate
    optimizer: torch.optim.Optimizer
    if recipe.momentum:
        rate *= 10.0
        optimizer = torch.optim.SGD(
            parameters, rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=recipe.weight_decay)
    epochs = max(1, round(recipe.epochs * means.epochs))
    planned = epochs * len(list(batches(means)))
    model.train(not recipe.head_only)
    step = 0
    for _ in range(epochs):
        for batch in batches(means, torch.randperm(len(means.images))):
            for group in optimizer.param_groups:
                group["lr"] = rate * _share((step + 0.5) / planned)
            optimizer.zero_grad()
            value = loss(model, means.images[batch], means.labels[batch])
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimizer.step()
            if after_step is not None:
                after_step()
            step += 1
    return model.eval()


def batches(means: Means, order: Tensor | None = None) -> Iterator[Tensor]:
    """Indices of the images, a batch at a time; a last one of a single image is left out."""
    order = torch.arange(len(means.images)) if order is None else order
    for batch in torch.split(order, means.batch_size):
        if len(batch) > 1 or len(order) == 1:  # batch normalisation needs two
            yield batch


@torch.no_grad()
def answers(model: Any, images: Tensor) -> Tensor:
    """Logits, (n, K) float32, in evaluation mode."""
    model.eval()
    parts = [
        logits_of(model(pixel_values=part), False).float() for part in torch.split(images, _BATCH)
    ]
    return torch.cat(parts)


def _share(done: float) -> float:
    if done < _WARM:
        return done / _WARM
    return 0.5 * (1.0 + math.cos(math.pi * (done - _WARM) / (1.0 - _WARM)))
