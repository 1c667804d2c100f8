"""What an attack is: a change of a model, with a record of where it comes from and what it needs.

A `Change` is a function from a model to a model; it may work on the very model that it is given.
`Attack` hands it a copy, under a seed of its own, so that the victim stays as it was and the same
arguments give the same weights. No attack sees the owner's key.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Attack", "Change", "Means", "NotApplicableError", "Tensors", "in_turn"]

Tensors = dict[str, Tensor]


class NotApplicableError(Exception):
    """The victim's architecture has nothing that this attack could work on; the text says what."""


@dataclass(frozen=True)
class Means:
    """What an attacker has: images and labels of the task, and some patience.

    Attributes:
        images: (n, C, H, W) float32, as the model takes them.
        labels: (n,) int64.
        seed: Everything random follows from it.
        epochs: Passes over the images that one fine-tuning takes.
        learning_rate: The rate the victim is fine-tuned with at "1x".
        batch_size: Images a step.
    """

    images: Tensor
    labels: Tensor
    seed: int = 0
    epochs: int = 5
    learning_rate: float = 1e-4
    batch_size: int = 64


Change = Callable[[Any, Means], Any]


@dataclass(frozen=True)
class Attack:
    """One attack, as it is run and told.

    Attributes:
        name: What `--attacks` and the table call it.
        family: The room it lives in.
        change: What it does.
        source: Where it was described, or who else does it.
        parameters: Everything that sets it apart from others of its kind.
        needs_data: Whether it takes images.
        quick: Whether it belongs to the quick suite; the full one has all.
        keeps_function: A disguise: the model computes what it did before.
        names: What is done to the names of the saved tensors, if anything.
    """

    name: str
    family: str
    change: Change
    source: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    needs_data: bool = False
    quick: bool = False
    keeps_function: bool = False
    names: Callable[[Tensors], Tensors] | None = None

    def __call__(self, victim: nn.Module, means: Means) -> nn.Module:
        """The attacked model, in evaluation mode; the victim is left as it is.

        Raises:
            NotApplicableError: If the architecture has nothing to attack.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed(means.seed))
            attacked: nn.Module = self.change(copy.deepcopy(victim).eval(), means)
        for parameter in attacked.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
        return attacked.eval()

    def seed(self, seed: int) -> int:
        """The attack's own seed: it does not depend on what ran before."""
        digest = hashlib.sha256(f"{seed}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:6], "big")


def in_turn(*changes: Change) -> Change:
    """One change after the other."""

    def change(model: Any, means: Means) -> Any:
        for one in changes:
            model = one(model, means)
        return model

    return change
