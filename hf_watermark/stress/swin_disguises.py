"""What moves the weights of a Swin Transformer and keeps its function.

On the tensors that transformers saves. What concerns MLPs and attention heads alone is in
`vit_disguises`.
"""

from __future__ import annotations

import re

import torch

from hf_watermark.stress.attacks import NotApplicableError, Tensors
from hf_watermark.stress.tensors import as_before, generator, orthogonal

__all__ = ["stem_permuted", "stem_shifted", "streams_turned"]

_STAGE = re.compile(r"(.*)encoder\.layers\.(\d+)\.blocks\.\d+\.layernorm_after\.weight")
# What is added to a stage's stream or acts on it channel by channel, and what reads it.
_ADDED = r"encoder\.layers\.{}\.blocks\.\d+\.((attention\.)?output\.dense|layernorm_\w+)\.\w+"
_READ = (
    r"encoder\.layers\.{}\.(blocks\.\d+\.(attention\.self\.\w+|intermediate\.dense)\.weight"
    r"|downsample\.\w+\.\w+)"
)
_STEM = r"embeddings\.(patch_embeddings\.projection|norm)\.\w+"
_POSITIONS = r"embeddings\.(position_embeddings|mask_token)"
_MERGED = r"encoder\.layers\.{}\.downsample\.reduction\.weight"
# A LayerNorm, and the layers behind it.
_BEHIND = {
    "layernorm_before": [f"attention.self.{part}" for part in ("query", "key", "value")],
    "layernorm_after": ["intermediate.dense"],
    "downsample.norm": ["downsample.reduction"],
}


def stem_permuted(tensors: Tensors, seed: int = 0) -> Tensors:
    """The channels of the first stage in another order."""
    t = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    prefix, widths = _stages(t)
    order = torch.randperm(widths[0], generator=generator(seed))
    _move(t, prefix, 0, len(widths), torch.eye(widths[0], dtype=torch.float64)[order])
    return as_before(t, tensors)


def stem_shifted(tensors: Tensors, seed: int = 0) -> Tensors:
    """The same added to every row of the patch convolution, which the LayerNorm behind ignores."""
    stem = f"{_stages(tensors)[0]}embeddings.patch_embeddings.projection."
    w, bias = tensors[f"{stem}weight"], tensors[f"{stem}bias"]
    added = torch.randn(w[0].numel() + 1, generator=generator(seed)) * 3.0 * w.std()
    moved = {f"{stem}weight": w + added[1:].reshape(w[0].shape), f"{stem}bias": bias + added[0]}
    return as_before(tensors | moved, tensors)


def streams_turned(tensors: Tensors, seed: int = 0) -> Tensors:
    """The gains of LayerNorms folded, the stream of every stage but the first rotated."""
    t = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    prefix, widths = _stages(t)
    _fold(t, f"{prefix}layernorm", ["classifier"])
    for name in tensors:
        for norm, behind in _BEHIND.items():
            if name.endswith(f".{norm}.weight"):
                block = name.removesuffix(f"{norm}.weight")
                _fold(t, f"{block}{norm}", [f"{block}{layer}" for layer in behind])
    for stage, width in list(enumerate(widths))[1:]:
        _move(t, prefix, stage, len(widths), orthogonal(width, seed + stage))
    return as_before(t, tensors)


def _stages(tensors: Tensors) -> tuple[str, list[int]]:
    """What comes before all names, and how wide the stages are."""
    found = [match for name in tensors if (match := _STAGE.fullmatch(name)) is not None]
    if not found:
        raise NotApplicableError("no stages of a Swin Transformer")
    widths = {int(match[2]): len(tensors[match[0]]) for match in found}
    return found[0][1], [widths[stage] for stage in sorted(widths)]


def _fold(t: Tensors, norm: str, behind: list[str]) -> None:
    """A LayerNorm's gain moved into the layers behind; a merging has no bias to take its bias."""
    gain = t[f"{norm}.weight"]
    for layer in behind:
        t[f"{layer}.weight"] = t[f"{layer}.weight"] * gain
    t[f"{norm}.bias"] = t[f"{norm}.bias"] / gain
    t[f"{norm}.weight"] = torch.ones_like(gain)


def _move(t: Tensors, prefix: str, stage: int, stages: int, turn: torch.Tensor) -> None:
    """One stream turned by (n, n), in everything that is added to it and that reads it."""
    added, read = [_ADDED.format(stage)], [_READ.format(stage)]
    if stage == 0:
        added.append(_STEM)
        read.append(_POSITIONS)
    else:
        added.append(_MERGED.format(stage - 1))
    if stage == stages - 1:
        added.append(r"layernorm\.\w+")
        read.append(r"classifier\.weight")
    for name, tensor in t.items():
        local = name.removeprefix(prefix)
        if any(re.fullmatch(pattern, local) for pattern in added):
            t[name] = torch.tensordot(turn, tensor, 1)
        elif any(re.fullmatch(pattern, local) for pattern in read):
            neighbours = tensor.reshape(*tensor.shape[:-1], -1, len(turn))
            t[name] = (neighbours @ turn.T).reshape(tensor.shape)
