"""What moves the weights of a plain vision transformer and keeps its function.

On the tensors that transformers saves for ViT, DeiT, DINOv2 and BEiT; what concerns MLPs alone, for
Swin Transformers and ConvNeXt too, and what concerns attention heads, for the former.
"""

from __future__ import annotations

import re

import torch

from hf_watermark.stress.attacks import NotApplicableError, Tensors
from hf_watermark.stress.tensors import as_before, generator, orthogonal

__all__ = [
    "dummies_added",
    "gains_moved",
    "heads_permuted",
    "hidden_permuted",
    "rows_shifted",
    "shifted",
    "turned",
]


def _blocks(tensors: Tensors) -> list[dict[str, str]]:
    """The names of the parts of every block."""
    found = []
    for name in tensors:
        if match := re.fullmatch(r"(.*(?:layer|blocks)\.\d+\.)intermediate\.dense\.weight", name):
            block, parts = match[1], ("intermediate.dense", "output.dense")
            norms, scales = ("layernorm_before", "layernorm_after"), ("lambda_1", "lambda_2")
        elif match := re.fullmatch(r"(.*layer\.\d+\.)mlp\.fc1\.weight", name):
            block, parts = match[1], ("mlp.fc1", "mlp.fc2")
            norms, scales = ("norm1", "norm2"), ("layer_scale1.lambda1", "layer_scale2.lambda1")
        elif match := re.fullmatch(r"(.*layers\.\d+\.)pwconv1\.weight", name):
            block, parts = match[1], ("pwconv1", "pwconv2")
            norms, scales = ("", "layernorm"), ("", "layer_scale_parameter")
        else:
            continue
        found.append(
            {
                "block": block,
                "fc1": block + parts[0],
                "fc2": block + parts[1],
                "heads": f"{block}attention.{'self' if '.blocks.' in block else 'attention'}.",
                "attention": f"{block}attention.output.dense",
                "before": block + norms[0],
                "after": block + norms[1],
                "scale1": block + scales[0],
                "scale2": block + scales[1],
            }
        )
    if not found:
        raise NotApplicableError("no MLP of a vision transformer or a ConvNeXt")
    return found


def hidden_permuted(tensors: Tensors, seed: int = 0) -> Tensors:
    """The hidden units of every MLP in another order."""
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        order = torch.randperm(len(tensors[f"{names['fc1']}.bias"]), generator=generator(seed + i))
        changed[f"{names['fc1']}.weight"] = tensors[f"{names['fc1']}.weight"][order]
        changed[f"{names['fc1']}.bias"] = tensors[f"{names['fc1']}.bias"][order]
        changed[f"{names['fc2']}.weight"] = tensors[f"{names['fc2']}.weight"][:, order]
    return as_before(changed, tensors)


def heads_permuted(tensors: Tensors, heads: int | None, seed: int = 0) -> Tensors:
    """The attention heads of every layer in another order.

    Args:
        tensors: The model's.
        heads: How many each layer has; None if its table of relative positions tells.
        seed: Which order.
    """
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        attention = names["heads"]
        tables = (n for n in tensors if n.startswith(attention) and n.endswith("_bias_table"))
        bias = next(tables, "")
        count = tensors[bias].shape[1] if heads is None else heads
        width = len(tensors[f"{attention}query.weight"])
        order = torch.randperm(count, generator=generator(seed + i))
        units = torch.arange(width).reshape(count, -1)[order].flatten()
        for part in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                name = f"{attention}{part}.{kind}"
                if name in tensors:  # BEiT's keys have no bias
                    changed[name] = tensors[name][units]
        if bias in tensors:
            changed[bias] = tensors[bias][:, order]
        output = f"{names['attention']}.weight"
        changed[output] = tensors[output][:, units]
    return as_before(changed, tensors)


def dummies_added(tensors: Tensors, seed: int = 0) -> Tensors:
    """Idle hidden units among the others: half of them unread, half in pairs that cancel.

    As many as the stream has channels: a configuration can say that.
    """
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        fc1, bias = tensors[f"{names['fc1']}.weight"], tensors[f"{names['fc1']}.bias"]
        fc2 = tensors[f"{names['fc2']}.weight"]
        random, count = generator(seed + i), fc1.shape[1]
        quarter = count // 4
        rows = fc1.std() * torch.randn(3 * quarter, fc1.shape[1], generator=random)
        rows = torch.cat([rows, rows[:quarter]])
        columns = fc2.std() * torch.randn(len(fc2), quarter, generator=random)
        idle = torch.zeros(len(fc2), 2 * quarter)
        columns = torch.cat([columns, idle, -columns], dim=1)
        order = torch.randperm(len(fc1) + count, generator=random)
        changed[f"{names['fc1']}.weight"] = torch.cat([fc1, rows])[order]
        changed[f"{names['fc1']}.bias"] = torch.cat([bias, torch.zeros(count)])[order]
        changed[f"{names['fc2']}.weight"] = torch.cat([fc2, columns], dim=1)[:, order]
    return as_before(changed, tensors)


def gains_moved(tensors: Tensors, seed: int = 0) -> Tensors:
    """Other gains, some negative, in the LayerNorm before every MLP; the MLP makes up for them."""
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        width = len(tensors[f"{names['after']}.weight"])
        factor = torch.exp(torch.randn(width, generator=generator(seed + i)) * 0.7)
        factor *= torch.where(torch.rand(width, generator=generator(seed - i)) < 0.5, -1.0, 1.0)
        for part in ("weight", "bias"):
            changed[f"{names['after']}.{part}"] = tensors[f"{names['after']}.{part}"] * factor
        changed[f"{names['fc1']}.weight"] = tensors[f"{names['fc1']}.weight"] / factor
    return as_before(changed, tensors)


def rows_shifted(tensors: Tensors, seed: int = 0) -> Tensors:
    """A constant, larger than the weights, added to each row behind a LayerNorm's gain."""
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        w, gain = tensors[f"{names['fc1']}.weight"], tensors[f"{names['after']}.weight"]
        constant = 10.0 * w.std() * torch.randn(len(w), 1, generator=generator(seed + i))
        changed[f"{names['fc1']}.weight"] = w + constant / gain
        shift = constant[:, 0] * (tensors[f"{names['after']}.bias"] / gain).sum()
        changed[f"{names['fc1']}.bias"] = tensors[f"{names['fc1']}.bias"] - shift
    return as_before(changed, tensors)


def turned(tensors: Tensors, seed: int = 0) -> Tensors:
    """Gains and layer scales folded, every write to the stream centred, the stream rotated."""
    t = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    blocks = _blocks(tensors)
    prefix = blocks[0]["block"].partition("encoder.")[0]
    reads: list[str] = []

    def fold_norm(norm: str, behind: list[str], repeats: int = 1) -> None:
        gain, bias = t[f"{norm}.weight"].repeat(repeats), t[f"{norm}.bias"].repeat(repeats)
        for layer in behind:
            if f"{layer}.bias" in t:  # a key's bias adds the same to every score: softmax drops it
                t[f"{layer}.bias"] = t[f"{layer}.bias"] + t[f"{layer}.weight"] @ bias
            t[f"{layer}.weight"] = t[f"{layer}.weight"] * gain
            reads.append(f"{layer}.weight")
        t[f"{norm}.weight"] = torch.ones_like(t[f"{norm}.weight"])
        t[f"{norm}.bias"] = torch.zeros_like(t[f"{norm}.bias"])

    writes = []
    for names in blocks:
        for layer, scale in (("attention", "scale1"), ("fc2", "scale2")):
            if names[scale] in t:
                for part in ("weight", "bias"):
                    value = t[f"{names[layer]}.{part}"]
                    t[f"{names[layer]}.{part}"] = (
                        t[names[scale]].reshape(-1, *[1] * (value.ndim - 1)) * value
                    )
                t[names[scale]] = torch.ones_like(t[names[scale]])
            writes += [f"{names[layer]}.weight", f"{names[layer]}.bias"]
        fold_norm(names["before"], [names["heads"] + part for part in ("query", "key", "value")])
        fold_norm(names["after"], [names["fc1"]])
    last = "pooler.layernorm" if f"{prefix}pooler.layernorm.weight" in t else "layernorm"
    repeats = t["classifier.weight"].shape[1] // len(t[f"{prefix}{last}.weight"])
    fold_norm(prefix + last, ["classifier"], repeats)

    q = orthogonal(len(t[f"{prefix}{last}.weight"]), seed)
    for name in writes:
        t[name] = q @ (t[name] - t[name].mean(dim=0))
    for name in reads:
        folded = t[name].reshape(len(t[name]), -1, len(q))
        t[name] = (folded @ q.T).reshape(t[name].shape)
    stem = f"{prefix}embeddings.patch_embeddings.projection."
    for name in (f"{stem}weight", f"{stem}bias"):
        flat = t[name].reshape(len(q), -1)
        t[name] = (q @ (flat - flat.mean(dim=0))).reshape(t[name].shape)
    for token in ("cls_token", "distillation_token", "position_embeddings", "mask_token"):
        name = f"{prefix}embeddings.{token}"
        if name in t:
            t[name] = (t[name] - t[name].mean(dim=-1, keepdim=True)) @ q.T
    return as_before(t, tensors)


def shifted(tensors: Tensors, seed: int = 0) -> Tensors:
    """Constants moved between the class token, the positions and the patches' bias."""
    prefix = next(name for name in tensors if name.endswith("cls_token"))[: -len("cls_token")]
    changed = dict(tensors)
    position, bias = f"{prefix}position_embeddings", f"{prefix}patch_embeddings.projection.bias"
    shift = torch.randn(2, len(tensors[bias]), generator=generator(seed)) * 0.1
    changed[f"{prefix}cls_token"] = tensors[f"{prefix}cls_token"] + shift[0]
    changed[bias] = tensors[bias] + shift[1]
    moved = tensors[position].clone()
    moved[:, 0] -= shift[0]
    patches = 2 if f"{prefix}distillation_token" in tensors else 1
    moved[:, patches:] -= shift[1]
    return as_before(changed | {position: moved}, tensors)
