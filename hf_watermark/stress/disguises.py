"""Attacks that change weights and leave the function: symmetries of the architecture, other names.

Each works on the tensors as they are saved. A disguise that would change what the model computes,
because the architecture only looks like one that it knows, is not applied.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_watermark.stress.attacks import Attack, Change, Means, NotApplicableError, Tensors, in_turn
from hf_watermark.stress.convnext_disguises import streams_permuted
from hf_watermark.stress.finetuning import fine_tuned
from hf_watermark.stress.renaming import named_as_in_timm, named_at_random
from hf_watermark.stress.resnet_disguises import channels_permuted, channels_scaled, norms_folded
from hf_watermark.stress.swin_disguises import stem_permuted, stem_shifted, streams_turned
from hf_watermark.stress.training import answers
from hf_watermark.stress.vit_disguises import (
    dummies_added,
    gains_moved,
    heads_permuted,
    hidden_permuted,
    rows_shifted,
    shifted,
    turned,
)
from hf_watermark.symmetry import layout_of

__all__ = ["ATTACKS", "disguised"]

Config = Mapping[str, Any]
Disguise = Callable[[Tensors, Config, int], Tensors]
_TOLERANCE = 1e-2  # of the largest logit
_WIDENED = ("intermediate.dense.weight", "mlp.fc1.weight")
_NEUTRAL = 16  # images
_SWIN = "Swin Transformer"


def disguised(disguise: Disguise) -> Change:
    """A model loaded from its own tensors in disguise.

    Args:
        disguise: From tensors, configuration and seed to tensors.
    """

    def change(model: Any, means: Means) -> Any:
        seed = int(torch.randint(2**30, ()))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model.save_pretrained(folder)
            tensors = saved_tensors(folder)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            try:
                changed = disguise(tensors, config, seed)
            except (KeyError, IndexError) as error:
                raise NotApplicableError(f"other layers than expected: {error}") from None
            for path in folder.iterdir():
                path.unlink()
            save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
            config = config | _width_of(changed, tensors, config)
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            other = type(model).from_pretrained(folder, attn_implementation="eager").float().eval()
        other.to(model.device)
        _check(model, other, means)
        return other

    return change


def saved_tensors(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors."""
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def _width_of(changed: Tensors, tensors: Tensors, config: Config) -> dict[str, Any]:
    """What the configuration must say of the hidden units, if their number changed."""
    wider = [name for name, t in changed.items() if t.shape != tensors[name].shape]
    first = next((changed[name] for name in wider if name.endswith(_WIDENED)), None)
    if not wider:
        return {}
    if first is not None and "intermediate_size" in config:
        return {"intermediate_size": len(first)}
    if first is not None and "mlp_ratio" in config and len(first) % first.shape[1] == 0:
        return {"mlp_ratio": len(first) // first.shape[1]}
    raise NotApplicableError("a configuration that cannot name a number of hidden units")


def _check(model: Any, other: Any, means: Means) -> None:
    before, after = (answers(one, means.images[:_NEUTRAL]) for one in (model, other))
    if float((before - after).abs().max()) > _TOLERANCE * float(before.abs().max()):
        raise NotApplicableError("it would change what this model computes")


# By family ----------------------------------------------------------------------------------------


def _family(tensors: Tensors) -> str:
    layout = layout_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if layout is None:
        raise NotApplicableError("an architecture whose symmetries are not known here")
    return layout.family


def permuted(tensors: Tensors, config: Config, seed: int) -> Tensors:
    """Channels and hidden units in another order, whatever the family has of these."""
    family = _family(tensors)
    if family == "ResNet":
        return channels_permuted(tensors, seed)
    changed = hidden_permuted(tensors, seed)
    if family == "ConvNeXt":
        return streams_permuted(changed, seed)
    return stem_permuted(changed, seed) if family == _SWIN else changed


def scaled(tensors: Tensors, config: Config, seed: int) -> Tensors:
    """Sizes and signs moved between layers and their normalisations."""
    if _family(tensors) == "ResNet":
        return channels_scaled(tensors, seed)
    return gains_moved(tensors, seed)


def _heads(tensors: Tensors, config: Config, seed: int) -> Tensors:
    if "num_attention_heads" in config:
        return heads_permuted(tensors, int(config["num_attention_heads"]), seed)
    if _family(tensors) == _SWIN:
        return heads_permuted(tensors, None, seed)
    raise NotApplicableError("no attention heads")


def _turned(tensors: Tensors, config: Config, seed: int) -> Tensors:
    family = _family(tensors)
    if family == "plain vision transformer":
        return turned(tensors, seed)
    if family == _SWIN:
        return streams_turned(tensors, seed)
    raise NotApplicableError("no residual stream that may be rotated")


def _dummies(tensors: Tensors, config: Config, seed: int) -> Tensors:
    return dummies_added(tensors, seed)


def _shifted(tensors: Tensors, config: Config, seed: int) -> Tensors:
    if any(name.endswith("cls_token") for name in tensors):
        return shifted(tensors, seed)
    if _family(tensors) == _SWIN:
        return stem_shifted(tensors, seed)
    raise NotApplicableError("no class token")


def together(tensors: Tensors, config: Config, seed: int) -> Tensors:
    """All symmetries of the family at once."""
    family = _family(tensors)
    if family == "ResNet":
        changed = norms_folded(channels_scaled(channels_permuted(tensors, seed), seed))
        return channels_scaled(changed, seed + 1)
    changed = rows_shifted(gains_moved(tensors, seed), seed)
    changed = permuted(changed, config, seed)
    if family == "ConvNeXt":
        return changed
    if family == _SWIN:
        changed = stem_shifted(changed, seed)
    return _turned(_heads(_dummies(changed, config, seed), config, seed), config, seed)


def _same(model: Any, means: Means) -> Any:
    return model


_NSO = "Yan et al., USENIX Security 2023"


def _attack(
    name: str,
    disguise: Disguise,
    *,
    source: str = _NSO,
    quick: bool = False,
    **parameters: Any,
) -> Attack:
    change = disguised(disguise)
    return Attack(name, "disguises", change, source, parameters, quick=quick, keeps_function=True)


_ROTATION = "Ashkboos et al. 2024"

ATTACKS: tuple[Attack, ...] = (
    _attack("permutation", permuted, quick=True, of="channels, hidden units"),
    _attack("scale-and-sign", scaled, quick=True, of="rows, normalisations"),
    _attack("rotation", _turned, source=_ROTATION, quick=True, of="residual stream"),
    _attack("head-permutation", _heads, quick=True, of="attention heads"),
    _attack("dummy-neurons", _dummies, quick=True, added="hidden units that cancel"),
    _attack(
        "row-shifts",
        lambda tensors, config, seed: rows_shifted(tensors, seed),
        of="rows behind a LayerNorm",
    ),
    _attack(
        "norms-folded",
        lambda tensors, config, seed: norms_folded(tensors),
        source="Jacob et al. 2018",
        of="batch normalisation",
    ),
    _attack("constants-moved", _shifted, of="class token, positions, patches"),
    _attack("all-disguises", together, quick=True, of="all symmetries at once"),
    Attack(
        "all-disguises-tune",
        "disguises",
        in_turn(disguised(together), fine_tuned()),
        _NSO,
        {"of": "all symmetries at once", "then": "fine-tuning at 1x"},
        needs_data=True,
        keeps_function=True,
    ),
    Attack(
        "names-timm",
        "disguises",
        _same,
        "conversion to timm",
        {"names": "timm's"},
        quick=True,
        keeps_function=True,
        names=named_as_in_timm,
    ),
    Attack(
        "names-random",
        "disguises",
        _same,
        "names that say nothing",
        {"names": "at random"},
        keeps_function=True,
        names=named_at_random,
    ),
)
