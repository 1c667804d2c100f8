"""What all disguises do with the tensors of a file: draw at random, store in the same precision."""

from __future__ import annotations

import torch

from hf_watermark.stress.attacks import Tensors

__all__ = ["as_before", "generator"]


def generator(seed: int) -> torch.Generator:
    """Randomness of its own."""
    return torch.Generator().manual_seed(seed)


def as_before(changed: Tensors, original: Tensors) -> Tensors:
    """Tensors as a file can hold them, each in the precision that it had."""
    return {
        n: t.to(original[n].dtype if n in original else torch.float32).contiguous()
        for n, t in changed.items()
    }
