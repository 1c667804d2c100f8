"""Which tensors carry the mark, decided from names and shapes alone.

The owner's model, the file on the Hub and a stolen copy must all lead to the same list, so the rule
looks at nothing but a mapping from names to shapes, and leans on shapes wherever it can: the names
in a checkpoint are not always those of the module (transformers renames on saving), and libraries
differ. The position in the list, not the name, is what the key's streams are bound to.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_watermark.errors import CarrierError, CarrierMissingError, ModelTooSmallError
from hf_watermark.scheme import Scheme

__all__ = [
    "Carrier",
    "check_capacity",
    "choose_carriers",
    "matching",
    "named_carriers",
    "natural_order",
]

Shape = tuple[int, ...]

# Words (parts of a name between dots and underscores) that mark a tensor as none of ours.
_EMBEDDINGS = "embed embedding embeddings embedder patch pos position positions stem wte wpe"
_NORMS = "norm layernorm batchnorm groupnorm ln bn grn"
_HEADS = "classifier head heads score logits fc final pooler lm predictor decoder"
_PYRAMIDS = (
    "fpn fpn1 fpn2 fpn3 fpn4"  # necks of segmentation: numbered in the file, not in the module
)
_ATTENTION = "q k v qkv kv query key value queries keys values wq wk wv wqkv"
_EXCLUDED = frozenset(" ".join((_EMBEDDINGS, _NORMS, _HEADS, _PYRAMIDS, _ATTENTION)).split())
# Patch merging (`downsample.reduction` of Swin Transformers) alone tells how the stream behind it
# was turned, and no carrier may tell that: see `symmetry.swins`.
_EXCLUDED_PARTS = frozenset({"in_proj", "c_attn", "in_proj_weight", "reduction"})
_MATRIX = re.compile(r"(?:.*\.)?(?:weight|kernel)")
_MIN_SIDE = 8
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Carrier:
    """One tensor that carries the mark, seen as a matrix.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its full shape; the first axis are output rows, the rest is flattened to columns.
    """

    name: str
    shape: Shape

    @property
    def rows(self) -> int:
        """Output rows."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Inputs of one output row."""
        return math.prod(self.shape[1:])

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key under which `layer.2` comes before `layer.10`, and no two names are equal."""
    parts = (part for part in re.split(r"(\d{1,9})", name) if part)
    key = ((0, int(part)) if part.isdecimal() else (1, part) for part in parts)
    return (*key, (-1, name))  # `layer.1` and `layer.01` differ here alone


def _is_matrix(name: str, shape: Shape) -> bool:
    """A convolution's or a linear layer's weight; no bias in disguise, nothing depthwise."""
    if len(shape) not in (2, 3, 4, 5) or not _MATRIX.fullmatch(name):
        return False
    return min(shape[0], math.prod(shape[1:])) >= _MIN_SIDE and not (
        len(shape) > 2 and shape[1] == 1
    )


def _is_candidate(name: str, shape: Shape) -> bool:
    if not _is_matrix(name, shape):
        return False
    parts = name.lower().split(".")
    words = {word for part in parts for word in part.split("_")}
    return words.isdisjoint(_EXCLUDED) and _EXCLUDED_PARTS.isdisjoint(parts)


def _blocks(names: Sequence[str]) -> dict[str, list[str]]:
    """Candidates grouped by the innermost numbered part of the model that holds several of them."""
    prefixes: dict[str, list[str]] = {}
    held: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        prefixes[name] = [
            ".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()
        ]
        for prefix in prefixes[name]:
            held[prefix] = held.get(prefix, 0) + 1
    blocks: dict[str, list[str]] = {}
    for name in names:
        block = next((p for p in reversed(prefixes[name]) if held[p] > 1), name)
        blocks.setdefault(block, []).append(name)
    return blocks


def choose_carriers(shapes: Mapping[str, Shape]) -> tuple[Carrier, ...]:
    """The default carriers: the largest layer of every block, in the model's order.

    Convolutions and linear layers only; never embeddings, norms, biases, heads (the decoders of
    pretraining and feature pyramids among them), queries, keys and values, or patch merging. Of
    layers of equal size the one with more rows wins, then the last: the first MLP layer of a
    transformer block, the second convolution of a ResNet's. Layers outside all numbered blocks
    serve only where there is no block at all.

    Args:
        shapes: Every tensor's name and shape.

    Raises:
        CarrierError: If no tensor qualifies.
    """
    names = sorted(
        (name for name, shape in shapes.items() if _is_candidate(name, shape)), key=natural_order
    )
    inside = [name for name in names if any(part.isdecimal() for part in name.split("."))]
    chosen = []
    for members in _blocks(inside or names).values():
        order = {name: position for position, name in enumerate(members)}
        best = max(members, key=lambda n: (math.prod(shapes[n]), shapes[n][0], order[n]))
        chosen.append(best)
    if not chosen:
        raise CarrierError(
            "No tensor can carry a mark",
            expected="convolutions or linear layers that are not embeddings, norms or heads",
            got=f"{len(shapes)} tensors",
            do="name the carriers yourself",
        )
    return tuple(Carrier(name, tuple(shapes[name])) for name in sorted(chosen, key=natural_order))


def matching(shapes: Mapping[str, Shape], patterns: Sequence[str]) -> list[str]:
    """The names that a user's patterns stand for, `*.attention.*.weight` for instance.

    Args:
        shapes: Every tensor's name and shape.
        patterns: Names, which are left as they are, and patterns in the shell's style, each of
            which stands for the matrices that it matches, in the model's order.

    Raises:
        CarrierMissingError: If a pattern matches no convolution and no linear layer.
    """
    names: list[str] = []
    for pattern in patterns:
        if not _WILD.search(pattern):
            names.append(pattern)
            continue
        found = [
            name
            for name, shape in shapes.items()
            if fnmatch.fnmatchcase(name, pattern) and _is_matrix(name, shape)
        ]
        if not found:
            raise CarrierMissingError(
                "No carrier is called so",
                expected=f"a convolution or linear layer like {pattern!r}"[:160],
                got=f"{len(shapes)} tensors of other names",
                do="check the pattern against model.named_parameters()",
            )
        names += [name for name in sorted(found, key=natural_order) if name not in names]
    return names


def named_carriers(shapes: Mapping[str, Shape], names: Sequence[str]) -> tuple[Carrier, ...]:
    """The carriers that a user or a claim names, in the order given.

    Raises:
        CarrierMissingError: If the model has no tensor of that name.
        CarrierError: If one is named twice, is no matrix, or none is named.
    """
    if not names or len(set(names)) != len(names):
        raise CarrierError("Carriers must be named, each once", got=f"{len(names)} names")
    for name in names:
        if name not in shapes:
            raise CarrierMissingError(
                "A carrier is not in the model",
                expected=repr(name)[:120],
                got=f"{len(shapes)} tensors without it",
                do="check the name against model.named_parameters()",
            )
        if len(shapes[name]) < 2 or 0 in shapes[name]:
            raise CarrierError(
                f"{name[:120]!r} cannot carry a mark",
                expected="a convolution's or a linear layer's weight",
                got=f"shape {list(shapes[name])}",
            )
    return tuple(Carrier(name, tuple(shapes[name])) for name in names)


def check_capacity(carriers: Sequence[Carrier], scheme: Scheme) -> None:
    """Refuse more bits than the carriers can hold.

    Raises:
        ModelTooSmallError: Saying how many bits they can carry.
    """
    weights = sum(carrier.weights for carrier in carriers)
    most = scheme.capacity(weights, sum(carrier.columns for carrier in carriers))
    if scheme.bits > most:
        do = f"use Scheme(bits={most}) or fewer" if most else "use a larger model"
        raise ModelTooSmallError(
            f"The model is too small for {scheme.bits} bits",
            expected=f"at most {most} bits for {weights:,} weights in {len(carriers)} carriers",
            do=do,
        )
