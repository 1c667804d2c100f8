"""What is done to a disguised model beside disguising it."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def disturbed(tensors: Tensors, sigma: float = 0.05, seed: int = 11) -> Tensors:
    """Noise of this part of every tensor's standard deviation, as light fine-tuning leaves it."""
    return {
        name: tensor
        + sigma
        * tensor.std(correction=0)
        * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        if tensor.is_floating_point() and not name.endswith("running_var")
        else tensor
        for name, tensor in tensors.items()
    }
