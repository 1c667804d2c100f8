"""What moves a model's weights and keeps its function, on the tensors that transformers saves."""

from __future__ import annotations

import re

import torch

Tensors = dict[str, torch.Tensor]


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _orthogonal(width: int, seed: int) -> torch.Tensor:
    """A rotation that keeps the direction (1, ..., 1), in float64."""
    first = torch.ones(width, 1, dtype=torch.float64) / width**0.5
    noise = torch.randn(width, width - 1, generator=_random(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([first, noise], dim=1))
    turn = torch.randn(width - 1, width - 1, generator=_random(seed + 1), dtype=torch.float64)
    inner = torch.eye(width, dtype=torch.float64)
    inner[1:, 1:], _ = torch.linalg.qr(turn)
    return basis @ inner @ basis.T


def _write_all(changed: Tensors, original: Tensors) -> Tensors:
    return {
        n: t.to(original[n].dtype if n in original else torch.float32).contiguous()
        for n, t in changed.items()
    }


# Vision transformers ------------------------------------------------------------------------------


def _blocks(tensors: Tensors) -> list[dict[str, str]]:
    """The names of the parts of every layer of a plain vision transformer."""
    found = []
    for name in tensors:
        if match := re.fullmatch(r"(.*layer\.\d+\.)intermediate\.dense\.weight", name):
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
                "attention": f"{block}attention.output.dense",
                "before": block + norms[0],
                "after": block + norms[1],
                "scale1": block + scales[0],
                "scale2": block + scales[1],
            }
        )
    assert found
    return found


def hidden_permuted(tensors: Tensors, seed: int = 0) -> Tensors:
    """The hidden units of every MLP in another order."""
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        order = torch.randperm(len(tensors[f"{names['fc1']}.bias"]), generator=_random(seed + i))
        changed[f"{names['fc1']}.weight"] = tensors[f"{names['fc1']}.weight"][order]
        changed[f"{names['fc1']}.bias"] = tensors[f"{names['fc1']}.bias"][order]
        changed[f"{names['fc2']}.weight"] = tensors[f"{names['fc2']}.weight"][:, order]
    return _write_all(changed, tensors)


def dummies_added(tensors: Tensors, count: int = 24, seed: int = 0) -> Tensors:
    """Idle hidden units among the others: half of them unread, half in pairs that cancel."""
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        fc1, bias = tensors[f"{names['fc1']}.weight"], tensors[f"{names['fc1']}.bias"]
        fc2 = tensors[f"{names['fc2']}.weight"]
        random = _random(seed + i)
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
    return _write_all(changed, tensors)


def gains_moved(tensors: Tensors, seed: int = 0) -> Tensors:
    """Other gains, some negative, in the LayerNorm before every MLP; the MLP makes up for them."""
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        width = len(tensors[f"{names['after']}.weight"])
        factor = torch.exp(torch.randn(width, generator=_random(seed + i)) * 0.7)
        factor *= torch.where(torch.rand(width, generator=_random(seed - i)) < 0.5, -1.0, 1.0)
        for part in ("weight", "bias"):
            changed[f"{names['after']}.{part}"] = tensors[f"{names['after']}.{part}"] * factor
        changed[f"{names['fc1']}.weight"] = tensors[f"{names['fc1']}.weight"] / factor
    return _write_all(changed, tensors)


def rows_shifted(tensors: Tensors, seed: int = 0) -> Tensors:
    """A constant, larger than the weights, added to each row behind a LayerNorm's gain."""
    changed = dict(tensors)
    for i, names in enumerate(_blocks(tensors)):
        w, gain = tensors[f"{names['fc1']}.weight"], tensors[f"{names['after']}.weight"]
        constant = 10.0 * w.std() * torch.randn(len(w), 1, generator=_random(seed + i))
        changed[f"{names['fc1']}.weight"] = w + constant / gain
        shift = constant[:, 0] * (tensors[f"{names['after']}.bias"] / gain).sum()
        changed[f"{names['fc1']}.bias"] = tensors[f"{names['fc1']}.bias"] - shift
    return _write_all(changed, tensors)


def turned(tensors: Tensors, seed: int = 0) -> Tensors:
    """Gains and layer scales folded, every write to the stream centred, the stream rotated."""
    t = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    blocks = _blocks(tensors)
    prefix = re.match(r"(.*?)encoder\.", blocks[0]["block"])[1]
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
        attention = f"{names['block']}attention.attention."
        fold_norm(names["before"], [attention + part for part in ("query", "key", "value")])
        fold_norm(names["after"], [names["fc1"]])
    last = "pooler.layernorm" if f"{prefix}pooler.layernorm.weight" in t else "layernorm"
    repeats = t["classifier.weight"].shape[1] // len(t[f"{prefix}{last}.weight"])
    fold_norm(prefix + last, ["classifier"], repeats)

    q = _orthogonal(len(t[f"{prefix}{last}.weight"]), seed)
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
    return _write_all(t, tensors)


def shifted(tensors: Tensors, seed: int = 0) -> Tensors:
    """Constants moved between the class token, the positions and the patches' bias."""
    prefix = next(name for name in tensors if name.endswith("cls_token"))[: -len("cls_token")]
    changed = dict(tensors)
    position, bias = f"{prefix}position_embeddings", f"{prefix}patch_embeddings.projection.bias"
    shift = torch.randn(2, len(tensors[bias]), generator=_random(seed)) * 0.1
    changed[f"{prefix}cls_token"] = tensors[f"{prefix}cls_token"] + shift[0]
    changed[bias] = tensors[bias] + shift[1]
    moved = tensors[position].clone()
    moved[:, 0] -= shift[0]
    patches = 2 if f"{prefix}distillation_token" in tensors else 1
    moved[:, patches:] -= shift[1]
    return _write_all(changed | {position: moved}, tensors)


# ConvNeXt -----------------------------------------------------------------------------------------


def streams_permuted(tensors: Tensors, seed: int = 0) -> Tensors:
    """The channels of every stage of a ConvNeXt in another order."""
    changed = dict(tensors)
    stages = sorted({int(m[1]) for name in tensors if (m := re.search(r"stages\.(\d+)\.", name))})
    prefix = next(n for n in tensors if n.endswith("dwconv.weight")).split("encoder.")[0]
    orders = {}
    for stage in stages:
        here = f"{prefix}encoder.stages.{stage}."
        width = len(tensors[f"{here}layers.0.dwconv.weight"])
        orders[stage] = order = torch.randperm(width, generator=_random(seed + stage))
        for name, tensor in tensors.items():
            if not name.startswith(here):
                continue
            if "pwconv1" in name:
                changed[name] = tensor[:, order] if name.endswith("weight") else tensor
            elif "downsampling_layer.0" in name:
                changed[name] = tensor[orders[stage - 1]]
            elif name.endswith("downsampling_layer.1.weight"):
                changed[name] = tensor[order][:, orders[stage - 1]]
            else:
                changed[name] = tensor[order]
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}embeddings."):
            changed[name] = tensor[orders[0]]
        elif name.startswith(f"{prefix}layernorm."):
            changed[name] = tensor[orders[stages[-1]]]
    changed["classifier.weight"] = tensors["classifier.weight"][:, orders[stages[-1]]]
    return _write_all(changed, tensors)


# ResNets ------------------------------------------------------------------------------------------


def _convolutions(tensors: Tensors) -> dict[str, tuple[str, str]]:
    """Each convolution's output and input axis, by its name without `convolution.weight`."""
    prefix = next(n for n in tensors if n.endswith("embedder.embedder.convolution.weight"))
    stem = prefix[: -len("convolution.weight")]
    found, stream = {stem: ("stem", "")}, "stem"
    blocks: dict[str, list[str]] = {}
    for name in sorted(tensors):
        if match := re.fullmatch(
            r"(.*stages\.\d+\.layers\.\d+\.)layer\.\d\.convolution.weight", name
        ):
            blocks.setdefault(match[1], []).append(name[: -len("convolution.weight")])
    for block, layers in blocks.items():
        into = stream
        if f"{block}shortcut.convolution.weight" in tensors:
            stream = block
            found[f"{block}shortcut."] = (stream, into)
        axes = [into, *(f"{block}{k}" for k in range(1, len(layers))), stream]
        for k, layer in enumerate(layers):
            found[layer] = (axes[k + 1], axes[k])
    return found


def _norm(tensors: Tensors, layer: str) -> dict[str, torch.Tensor]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {part: tensors[f"{layer}normalization.{part}"] for part in parts}


def channels_permuted(tensors: Tensors, seed: int = 0) -> Tensors:
    """Every axis of a ResNet in another order."""
    found = _convolutions(tensors)
    orders: dict[str, torch.Tensor] = {}
    for layer, (rows, _) in found.items():
        width = len(tensors[f"{layer}convolution.weight"])
        orders.setdefault(rows, torch.randperm(width, generator=_random(seed + len(orders))))
    changed = dict(tensors)
    for layer, (rows, columns) in found.items():
        w = tensors[f"{layer}convolution.weight"][orders[rows]]
        changed[f"{layer}convolution.weight"] = w[:, orders[columns]] if columns else w
        for part, value in _norm(tensors, layer).items():
            changed[f"{layer}normalization.{part}"] = value[orders[rows]]
    last = list(found.values())[-1][0]
    changed["classifier.1.weight"] = tensors["classifier.1.weight"][:, orders[last]]
    return _write_all(changed, tensors)


def channels_scaled(tensors: Tensors, seed: int = 0) -> Tensors:
    """Signs and sizes of all rows, which batch normalisation ignores; sizes that ReLU lets pass."""
    found = _convolutions(tensors)
    changed = dict(tensors)
    passed: dict[str, torch.Tensor] = {}
    inner = {axis for _, axis in found.values() if axis and axis[-1].isdecimal()}
    for number, (layer, (rows, columns)) in enumerate(found.items()):
        random = _random(seed + number)
        w, norm = changed[f"{layer}convolution.weight"], _norm(tensors, layer)
        factor = torch.exp(torch.randn(len(w), generator=random) * 0.5)
        factor *= torch.where(torch.rand(len(w), generator=random) < 0.5, -1.0, 1.0)
        w = w * factor.reshape(-1, 1, 1, 1)
        norm["running_mean"] = norm["running_mean"] * factor
        norm["running_var"] = (norm["running_var"] + 1e-5) * factor**2 - 1e-5
        norm["weight"] = norm["weight"] * factor.sign()
        if rows in inner:
            passed[rows] = torch.exp(torch.randn(len(w), generator=random) * 0.5)
            norm["weight"], norm["bias"] = (norm[p] * passed[rows] for p in ("weight", "bias"))
        if columns in passed:
            # The normalisation behind sees the same: its inputs are as before.
            w = w / passed[columns].reshape(1, -1, 1, 1)
        changed[f"{layer}convolution.weight"] = w
        changed |= {f"{layer}normalization.{part}": value for part, value in norm.items()}
    return _write_all(changed, tensors)


def norms_folded(tensors: Tensors) -> Tensors:
    """Batch normalisations folded into the convolutions; what is left of them adds a bias."""
    changed = dict(tensors)
    for layer in _convolutions(tensors):
        norm = _norm(tensors, layer)
        factor = norm["weight"] / torch.sqrt(norm["running_var"] + 1e-5)
        w = tensors[f"{layer}convolution.weight"]
        changed[f"{layer}convolution.weight"] = w * factor.reshape(-1, 1, 1, 1)
        changed[f"{layer}normalization.weight"] = torch.ones_like(factor)
        changed[f"{layer}normalization.bias"] = norm["bias"] - norm["running_mean"] * factor
        changed[f"{layer}normalization.running_mean"] = torch.zeros_like(factor)
        changed[f"{layer}normalization.running_var"] = torch.ones_like(factor) - 1e-5
    return _write_all(changed, tensors)


# Either -------------------------------------------------------------------------------------------


def disturbed(tensors: Tensors, sigma: float = 0.05, seed: int = 11) -> Tensors:
    """Noise of this part of every tensor's standard deviation, as light fine-tuning leaves it."""
    return {
        name: tensor
        + sigma * tensor.std(correction=0) * torch.randn(tensor.shape, generator=_random(seed))
        if tensor.is_floating_point() and not name.endswith("running_var")
        else tensor
        for name, tensor in tensors.items()
    }
