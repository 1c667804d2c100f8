"""What all disguises do with the tensors of a file: draw at random, store in the same precision."""

from __future__ import annotations

import torch

from hf_watermark.stress.attacks import Tensors

__all__ = ["as_before", "generator", "orthogonal"]


def generator(seed: int) -> torch.Generator:
    """Randomness of its own."""
    return torch.Generator().manual_seed(seed)


def as_before(changed: Tensors, original: Tensors) -> Tensors:
    """Tensors as a file can hold them, each in the precision that it had."""
    return {
        n: t.to(original[n].dtype if n in original else torch.float32).contiguous()
        for n, t in changed.items()
    }


def orthogonal(width: int, seed: int) -> torch.Tensor:
    """A rotation that keeps the direction (1, ..., 1), in float64."""
    first = torch.ones(width, 1, dtype=torch.float64) / width**0.5
    noise = torch.randn(width, width - 1, generator=generator(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([first, noise], dim=1))
    turn = torch.randn(width - 1, width - 1, generator=generator(seed + 1), dtype=torch.float64)
    inner = torch.eye(width, dtype=torch.float64)
    inner[1:, 1:], _ = torch.linalg.qr(turn)
    turning: torch.Tensor = basis @ inner @ basis.T
    return turning
