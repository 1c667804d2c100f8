"""CIFAR-10's teachers, their students and what thieves do to what they are told.

A recipe makes one model and nothing else: from a teacher's clean or marked answers, by every way of
stealing and of erasing that `distillation.py` compares.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from embedding import load
from torch import Tensor, nn

VEHICLES = (0, 1, 8, 9)
NEIGHBOURS = 20
VIEWS = 6


def host(name: str, classes: int) -> nn.Module:
    """A classifier of transformers, by its role."""
    import transformers as hf

    if name in ("resnet", "resnet18"):
        small = name == "resnet"
        sizes = [32, 64, 128] if small else [64, 128, 256, 512]
        config = hf.ResNetConfig(
            embedding_size=sizes[0],
            hidden_sizes=sizes,
            depths=[1] * 3 if small else [2] * 4,
            layer_type="basic",
            num_labels=classes,
        )
    elif name == "bottleneck":
        config = hf.ResNetConfig(
            embedding_size=32,
            hidden_sizes=[64, 128, 192],
            depths=[1] * 3,
            layer_type="bottleneck",
            num_labels=classes,
        )
    elif name == "regnet":
        config = hf.RegNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 192],
            depths=[1] * 4,
            groups_width=16,
            num_labels=classes,
        )
    else:
        raise ValueError(f"no host is called {name!r}")
    model = hf.AutoModelForImageClassification.from_config(config)
    return model.to(memory_format=torch.channels_last)


class Data:
    """CIFAR-10 in parts that never meet: for the teacher, queries, calibration, references."""

    def __init__(self, options: argparse.Namespace) -> None:
        counts = [options.train, options.queries, options.calibration, options.reference]
        images, labels = load("train", sum(counts))
        test_images, test_labels = load("test", 10_000)
        if options.classes == 2:
            labels, test_labels = (
                torch.isin(found, torch.tensor(VEHICLES)).long() for found in (labels, test_labels)
            )
        self.device, self.size = options.device, options.size
        parts = zip(images.split(counts), labels.split(counts), strict=True)
        self.teacher, self.queries, self.calibration, self.reference = parts
        self.probes = test_images[:5000], test_labels[:5000]
        self.test = test_images[5000:], test_labels[5000:]

    def seen(self, images: Tensor) -> Tensor:
        """As the models take them."""
        images = images.to(self.device)
        if images.shape[-1] != self.size:
            images = nn.functional.interpolate(images, size=self.size, mode="bilinear")
        return images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Recipe:
    """How a student learns.

    Attributes:
        arch: Of `host`.
        share: Of the queries.
        epochs: Share of the usual number.
        temperature: Of the student while it learns.
        hard: Share of the loss that is on the answers' top class.
        weight_decay: Of SGD.
        batch: Images a step.
    """

    arch: str
    share: float = 1.0
    epochs: float = 1.0
    temperature: float = 1.0
    hard: float = 0.0
    weight_decay: float = 5e-4
    batch: int = 64


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image flipped or not, the batch shifted by up to four pixels."""
    mirror = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return torch.roll(torch.where(mirror, images.flip(-1), images), (dy, dx), (-2, -1))


def train(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    data: Data,
    *,
    epochs: int,
    seed: int,
    recipe: Recipe | None = None,
    rate: float = 0.1,
) -> nn.Module:
    """Learn labels (n,) or probabilities (n, K) with SGD, one cycle, flips and shifts."""
    recipe = recipe or Recipe("")
    heat = recipe.temperature
    generator = torch.Generator().manual_seed(seed)
    model.to(data.device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), rate, 0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps = epochs * -(-len(images) // recipe.batch)

    def share(step: int) -> float:
        done = (step + 0.5) / steps
        return min(done / 0.2, (1.0 - done) / 0.8)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    if heat != 1.0:
        targets = (targets.clamp(min=1e-8).log() / heat).softmax(-1)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(recipe.batch):
            x = data.seen(augmented(images[batch], generator))
            logits = model(pixel_values=x).logits
            wanted = targets[batch].to(data.device)
            loss = nn.functional.cross_entropy(logits / heat, wanted) * heat
            if recipe.hard:
                top = nn.functional.cross_entropy(logits, wanted.argmax(-1))
                loss = (1.0 - recipe.hard) * loss + recipe.hard * top
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answers(model: Callable[..., Any], images: Tensor, data: Data) -> Tensor:
    """Log-probabilities (n, K) of un-augmented images."""
    parts = [
        model(pixel_values=data.seen(part)).logits.float().log_softmax(-1).cpu()
        for part in images.split(500)
    ]
    return torch.cat(parts)


@torch.no_grad()
def of_views(model: Callable[..., Any], images: Tensor, data: Data, seed: int) -> Tensor:
    """Probabilities (n, K), the mean over views of every image."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for _ in range(VIEWS):
        views = torch.cat([augmented(part, generator) for part in images.split(100)])
        total = total + answers(model, views, data).exp()
    return total / VIEWS


def smoothed_labels(said: Tensor, share: float = 0.1) -> Tensor:
    """(n, K) probabilities mixed with the uniform ones."""
    return (1.0 - share) * said + share / said.shape[1]


def class_means(said: Tensor) -> Tensor:
    """The mean answer of all queries with the same top class."""
    top = nn.functional.one_hot(said.argmax(-1), said.shape[1]).float()
    return top @ ((top.T @ said) / top.sum(0).clamp(min=1)[:, None])


def of_neighbours(said: Tensor) -> Tensor:
    """The mean log-probabilities of the nearest answers, as probabilities."""
    z = said.clamp(min=1e-6).log()
    z = z - z.mean(1, keepdim=True)
    means = []
    for part in z.split(500):
        near = torch.cdist(part, z).topk(NEIGHBOURS, largest=False).indices
        means.append(z[near].mean(1))
    return torch.cat(means).softmax(-1)


def explained(said: Tensor, own: Tensor, features: Tensor | None) -> Tensor:
    """Answers without what a thief can attribute to secret features, or with nothing else.

    Everything is centred within the answers' top class first, or erasure would look dearer than it
    is. Without `features` what is kept is the fit on the thief's own student, `own`, (n, K)
    log-probabilities; with them, (n, m), the fit on them is what is taken away.
    """
    top = nn.functional.one_hot(said.argmax(-1), said.shape[1]).double()
    z = said.clamp(min=1e-6).log().double()
    z = z - z.mean(1, keepdim=True)

    def within(x: Tensor) -> Tensor:
        return x - top @ ((top.T @ x) / top.sum(0).clamp(min=1)[:, None])

    fit_on = torch.cat([own.double(), own.double().exp()], 1) if features is None else features
    x = within(fit_on.double())
    x = x / x.std(0).clamp(min=1e-9)
    penalty = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    fit = x @ torch.linalg.solve(x.T @ x + penalty, x.T @ within(z))
    left = z - within(z) + fit if features is None else z - fit
    return left.softmax(-1).float()


def low_resolution(images: Tensor) -> Tensor:
    """4x4 RGB, symmetric under flips, (n, 48)."""
    small = nn.functional.adaptive_avg_pool2d(images, 4)
    return (small + small.flip(-1)).flatten(1)


@torch.no_grad()
def penultimate(model: nn.Module, images: Tensor, data: Data) -> Tensor:
    """A model's pooled features, (n, d)."""
    base = getattr(model, model.base_model_prefix)
    parts = [base(data.seen(part)).pooler_output.flatten(1).cpu() for part in images.split(500)]
    return torch.cat(parts)


def pruned(model: nn.Module, share: float) -> nn.Module:
    """The smallest weights of all convolutions and matrices set to zero, in place."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    sizes = torch.cat([p.detach().abs().flatten() for p in weights])
    limit = float(np.quantile(sizes.cpu().numpy(), share))
    with torch.no_grad():
        for p in weights:
            p.mul_(p.abs() > limit)
    return model
