"""A claim made about a checkpoint: the carriers in it, their digests, what aligns them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hf_watermark.carriers import Carrier, named_carriers, natural_order
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import CarrierMissingError, ClaimError
from hf_watermark.evidence import Claim, ClaimedCarrier, Seal, canonical_json
from hf_watermark.key import OwnerKey
from hf_watermark.scheme import Scheme
from hf_watermark.symmetry import layout_of

__all__ = [
    "check_digests",
    "locate_carriers",
    "make_claim",
    "reference_digest",
    "reference_digests",
    "reference_tensors",
]


def make_claim(
    checkpoint: Checkpoint,
    key: OwnerKey,
    scheme: Scheme,
    names: Sequence[str],
    *,
    secret_carriers: bool = False,
    references: Mapping[str, str] | None = None,
    seal: Seal | None = None,
) -> Claim:
    """The signed claim of `key` over tensors of a checkpoint.

    Args:
        checkpoint: What will be published.
        key: The owner's.
        scheme: How the mark was embedded.
        names: The carriers' names in the checkpoint, in the order of the key's streams.
        secret_carriers: Keep the names out of the public copy.
        references: From `reference_digests`, if the tensors that they cover never felt the mark;
            they allow an aligned reading.
        seal: The mark that they never felt, if it is not the key's own; nothing without references.

    Returns:
        The owner's own copy; publish its `public` form.

    Raises:
        CarrierMissingError: If the checkpoint has no tensor of that name.
        CarrierError: If one is named twice, is no matrix, or none is named.
    """
    references = references or {}
    claimed = []
    for carrier in named_carriers(checkpoint.shapes(), names):
        span, digest = checkpoint.tensors[carrier.name], _digest(checkpoint, carrier.name)
        reference = references.get(carrier.name)
        claimed.append(ClaimedCarrier(carrier.name, span.shape, span.dtype, digest, reference))
    return Claim.make(
        key,
        scheme,
        tuple(claimed),
        secret_carriers=secret_carriers,
        seal=seal if references else None,
    )


def reference_tensors(
    shapes: Mapping[str, tuple[int, ...]], carriers: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The tensors that an aligned reading of each carrier needs of the owner's checkpoint.

    No carrier is among them. A carrier that cannot be aligned is left out.

    Args:
        shapes: The owner's tensors.
        carriers: The carriers' names.
    """
    layout = layout_of(shapes)
    supports = {}
    for name in carriers:
        key = None if layout is None else layout.key(name)
        if layout is not None and key is not None:
            support = layout.support(key, carriers)
            if support is not None and all(support_name in shapes for support_name in support):
                supports[name] = support
    return supports


def reference_digests(checkpoint: Checkpoint, carriers: Sequence[str]) -> dict[str, str]:
    """What a claim says of the tensors that align each of its carriers, by the carrier's name."""
    supports = reference_tensors(checkpoint.shapes(), carriers)
    names = {name for support in supports.values() for name in support}
    digests = {name: _digest(checkpoint, name) for name in sorted(names)}
    return {
        carrier: reference_digest({name: digests[name] for name in support})
        for carrier, support in supports.items()
    }


def reference_digest(digests: Mapping[str, str]) -> str:
    """One digest of several tensors, from the sha256 of each by its name, in their order."""
    return hashlib.sha256(canonical_json(list(digests.items()))).hexdigest()


def _digest(checkpoint: Checkpoint, name: str) -> str:
    digest = hashlib.sha256()
    for part in checkpoint.iter_bytes(name):
        digest.update(part)
    return digest.hexdigest()


def locate_carriers(
    checkpoint: Checkpoint,
    carriers: Sequence[Carrier],
    first_rows: Sequence[npt.NDArray[np.float32]],
) -> list[str]:
    """Where the carriers of a module ended up in a checkpoint that was saved from it.

    transformers renames tensors on saving (ViT's `layers.0.mlp.fc1` becomes
    `encoder.layer.0.intermediate.dense`), so the contents decide.

    Args:
        checkpoint: The saved model.
        carriers: The module's carriers, in order.
        first_rows: Some first rows of each, (r, columns), as they were when it was saved.

    Returns:
        Their names in the checkpoint, in order.

    Raises:
        CarrierMissingError: If one is not there.
    """
    shapes = checkpoint.shapes()
    names: list[str] = []
    for carrier, rows in zip(carriers, first_rows, strict=True):
        same = sorted((n for n, s in shapes.items() if s == carrier.shape), key=natural_order)
        same.sort(key=lambda name: name != carrier.name)
        for name in same:
            if name not in names and np.array_equal(checkpoint.read_rows(name, 0, len(rows)), rows):
                names.append(name)
                break
        else:
            raise CarrierMissingError(
                "A carrier of the model is not in what was saved",
                expected=f"{carrier.name[:120]!r} of shape {list(carrier.shape)}",
                got=f"{len(same)} tensors of that shape with other contents",
                do="save the whole model (merge adapters first), then embed or claim again",
            )
    return names


def check_digests(checkpoint: Checkpoint, claim: Claim) -> int:
    """Check that the claimed carriers are in the checkpoint, byte for byte.

    Returns:
        How many there are.

    Raises:
        ClaimError: If one is missing or differs.
    """
    for claimed in claim.carriers:
        span = checkpoint.tensors.get(claimed.name)
        where = f"{claimed.name[:120]!r} in {checkpoint.files.name}"
        if span is None or (span.shape, span.dtype) != (claimed.shape, claimed.dtype):
            got = "no such tensor" if span is None else f"{span.dtype} {list(span.shape)}"
            raise ClaimError(
                f"The weights are not those claimed: {where}",
                expected=f"{claimed.dtype} {list(claimed.shape)}",
                got=got,
                do="verify with --key: a changed copy still carries the mark",
            )
        digest = _digest(checkpoint, claimed.name)
        if digest != claimed.sha256:
            raise ClaimError(
                f"The weights are not those claimed: {where}",
                expected=f"sha256 {claimed.sha256[:16]}...",
                got=f"{digest[:16]}...",
                do="verify with --key: a changed copy still carries the mark",
            )
    return len(claim.carriers)
