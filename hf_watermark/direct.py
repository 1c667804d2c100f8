"""A mark without data or training: the closed form, written into a checkpoint on disk.

Only the carriers' bytes change. The checkpoint is read by rows and written by rows, so memory is
bounded whatever the model's size, and the result appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_watermark.carriers import (
    Carrier,
    check_capacity,
    choose_carriers,
    matching,
    named_carriers,
)
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import make_claim, reference_digests
from hf_watermark.closed_form import ClosedForm, Mark, Progress
from hf_watermark.errors import (
    CarrierError,
    CheckpointError,
    ClaimError,
    KeyFileError,
    ModelTooSmallError,
    SchemeError,
)
from hf_watermark.evidence import CLAIM_FILE, Claim
from hf_watermark.files import FolderFiles
from hf_watermark.folders import (
    appearing,
    copy_folder,
    free_folder,
    holds_weights,
    source_folder,
)
from hf_watermark.found_claims import CLAIM_LIMIT
from hf_watermark.key import OwnerKey
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.scheme import Scheme
from hf_watermark.threads import one_thread

__all__ = ["Embedded", "embed_checkpoint", "scheme_for", "seal_scheme"]

_CLOSED_FORM = 0.05  # nothing trains afterwards: half the distortion that training absorbs
_UNSEEN = -3.0  # log10 p above which a source never saw the key, as far as its carriers tell
_WRITTEN = ("F32", "F16", "BF16")
_SEAL_BITS = 8, 64
_WEIGHTS_PER_SEAL_BIT = 6400  # from there on the floor margin costs no more than 5% distortion


@dataclass(frozen=True)
class Embedded:
    """What was written.

    Attributes:
        folder: The marked checkpoint.
        claim: The owner's copy of the claim; its public form lies in the folder.
        margin: The smallest s_t z_t that was reached, after rounding, in natural sigmas.
        log10_p: log10 of the soft statistic's tail, as a reader of all carriers will find it.
        largest_change: The largest relative change of a carrier, ||dW|| / ||W||, as written.
        unchanged: Whether the mark was there already and no weight was changed.
        kept_claim: The file that another owner's claim was moved to, if the source had one.
        unmarked: Files of the folder that may hold the weights a second time, unmarked: what
            another library loads, or an earlier checkpoint.
    """

    folder: Path
    claim: Claim
    margin: float
    log10_p: float
    largest_change: float
    unchanged: bool
    kept_claim: str | None = None
    unmarked: tuple[str, ...] = ()


def scheme_for(weights: int, bits: int = 64) -> Scheme:
    """The default scheme of the closed form: at most 5% distortion, unless the margin needs more.

    Args:
        weights: N, the number of weights of all carriers.
        bits: T.
    """
    scheme = Scheme(bits=bits)
    gentle = Scheme(bits=bits, strength=_CLOSED_FORM)
    return gentle if gentle.margin(weights) < scheme.margin(weights) else scheme


def seal_scheme(weights: int) -> Scheme:
    """The scheme of a seal: the closed form's, of fewer bits where 64 would need more distortion.

    Args:
        weights: N, the number of weights of all carriers.
    """
    least, most = _SEAL_BITS
    return scheme_for(weights, min(max(weights // _WEIGHTS_PER_SEAL_BIT, least), most))


def embed_checkpoint(
    source: str | os.PathLike[str],
    key: OwnerKey,
    output_dir: str | os.PathLike[str],
    *,
    scheme: Scheme | None = None,
    carriers: Sequence[str] | None = None,
    recipient: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Write a marked copy of a checkpoint.

    All files of the source are copied, but for `.git` and `.cache` at its top, and nothing but the
    carriers' bytes is changed; `watermark.json`, the claim, is added. The same key's earlier claim
    gives the scheme and the carriers where none are passed, and is replaced. Another owner's claim
    is kept beside ours as `watermark-FINGERPRINT.json`, the fingerprint being that of its key (the
    first 16 hexadecimal digits of SHA-256 of the public key), or `...-2.json` if that is taken.

    The copy is made in a hidden folder beside `output_dir`, which takes its name when complete.
    Law: on the same machine the same arguments give the same bytes, and the marked copy marked
    again is the same copy.

    Args:
        source: A folder, or `org/name` on the Hub, which is downloaded.
        key: The owner's.
        output_dir: A new or empty folder, outside of the source.
        scheme: None chooses by size (`scheme_for`). Its embedding must be `projection`.
        carriers: Names of the tensors that carry the mark, or patterns (`*.attention.*.weight`);
            kept out of the public claim, so keep the claim that is returned. None chooses.
        recipient: Mark the copy for this recipient too, on top of the owner's mark.
        revision: Of a repo.
        token: For the Hub.
        progress: Called with weights done and weights to do, each time with more, in the end with
            all.

    Raises:
        CheckpointError: If the source cannot be read, or the output cannot be written; nothing is
            left behind then.
        CarrierError: If the carriers cannot hold the mark; nothing is written then.
        ClaimError: If the source holds a `watermark.json` that is no claim.
        HubError: If the repo cannot be downloaded.
        SchemeError: If the scheme is not one that the closed form can embed.
    """
    if not isinstance(key, OwnerKey):
        raise KeyFileError("The key is no OwnerKey", got=type(key).__name__, do="load it first")
    output = free_folder(output_dir)
    folder = source_folder(source, revision, token)
    if folder.resolve() in (output, *output.parents):
        raise CheckpointError(
            f"The output {quoted(str(output), 300)} lies in the source",
            do="choose a folder outside of it",
        )
    files = FolderFiles(folder)
    checkpoint = Checkpoint.open(files)
    there = _claim_in(files)
    ours = _our_claim(files, there, key)
    chosen = _carriers(checkpoint, ours, carriers)
    scheme = _scheme(chosen, ours, scheme)
    keys = [key] if recipient is None else [key, key.for_recipient(recipient)]
    _check_capacity(chosen, scheme, len(keys))
    _check_dtypes(checkpoint, chosen)
    work = ClosedForm(checkpoint, Mark(keys, scheme, chosen), progress)
    kept = _kept_name(files, there) if there is not None and there is not ours else None
    with one_thread():
        work.measure()
        is_new = ours is None and work.log10_p() > _UNSEEN
        work.solve()
    with appearing(output) as unfinished, one_thread():
        paths = []
        for path in copy_folder(folder, unfinished):
            paths.append(path)
            work.write(path, unfinished)  # while it is still in memory
        work.settle(unfinished)
        if kept is not None:
            os.replace(unfinished / CLAIM_FILE, unfinished / kept)
        names = [carrier.name for carrier in chosen]
        written = Checkpoint.open(FolderFiles(unfinished))
        claim = _claim(written, key, scheme, names, ours, is_new, secret=carriers is not None)
        (unfinished / CLAIM_FILE).write_bytes(claim.public.to_bytes())
    work.count(work.planned)
    return Embedded(
        output,
        claim,
        margin=float(work.reached.min()),
        log10_p=work.log10_p(),
        largest_change=max(work.changes),
        unchanged=not work.v.any(),
        kept_claim=kept,
        unmarked=tuple(p for p in paths if p not in checkpoint.weight_files and holds_weights(p)),
    )


def _claim(
    written: Checkpoint,
    key: OwnerKey,
    scheme: Scheme,
    names: Sequence[str],
    ours: Claim | None,
    is_new: bool,
    *,
    secret: bool,
) -> Claim:
    """The new claim. It fixes what disguised copies may be compared with if the key is new here.

    Or if our earlier claim fixed the same, for the mark or for a seal in the same carriers. Layers
    that were trained beside the mark know of it: an aligned reading by them would favour the key.
    """
    found = reference_digests(written, names)
    seal = None if ours is None else ours.seal

    def claim(references: dict[str, str]) -> Claim:
        return make_claim(
            written, key, scheme, names, secret_carriers=secret, references=references, seal=seal
        )

    if is_new:
        return claim(found)
    if ours is not None and ours.hides_carriers:
        same = claim(found)
        return same if same.carriers_commitment == ours.carriers_commitment else claim({})
    known = {} if ours is None else {c.name: c.reference for c in ours.carriers}
    if seal is not None and list(known) != list(names):
        known = {}
    return claim({name: digest for name, digest in found.items() if known.get(name) == digest})


# What was asked for -------------------------------------------------------------------------------


def _claim_in(files: FolderFiles) -> Claim | None:
    if CLAIM_FILE not in files.sizes:
        return None
    try:
        return Claim.from_bytes(files.read(CLAIM_FILE, CLAIM_LIMIT), files.name)
    except ClaimError as error:
        raise ClaimError(
            f"The source has a {CLAIM_FILE} that ours would replace, and it cannot be kept",
            expected="a claim of this format",
            got=error.got,
            do="move it out of the folder, or update this package if a newer one wrote it",
        ) from None


def _our_claim(files: FolderFiles, there: Claim | None, key: OwnerKey) -> Claim | None:
    """What the key said of this model before: in its place, or where a later owner moved it."""
    if there is not None and _is_ours(there, key):
        return there
    moved = _moved_name(key.public_key)
    if moved in files.sizes:
        with contextlib.suppress(CheckpointError, ClaimError):
            claim = Claim.from_bytes(files.read(moved, CLAIM_LIMIT), files.name)
            return claim if _is_ours(claim, key) else None
    return None


def _is_ours(claim: Claim, key: OwnerKey) -> bool:
    """Whether the key signed a claim; what it did not sign is a stranger's, whatever it says."""
    try:
        claim.check("")
    except ClaimError:
        return False
    return claim.commits_to(key)


def _moved_name(public_key: str, number: int = 1) -> str:
    fingerprint = hashlib.sha256(bytes.fromhex(public_key)).hexdigest()[:16]
    stem, suffix = CLAIM_FILE.split(".")
    return f"{stem}-{fingerprint}{f'-{number}' if number > 1 else ''}.{suffix}"


def _kept_name(files: FolderFiles, claim: Claim) -> str:
    """A name for another owner's claim that nothing in the folder has."""
    names = (_moved_name(claim.public_key, number) for number in itertools.count(1))
    return next(name for name in names if name not in files.sizes)


def _carriers(
    checkpoint: Checkpoint, ours: Claim | None, names: Sequence[str] | None
) -> tuple[Carrier, ...]:
    shapes = checkpoint.shapes()
    if names is not None:
        return named_carriers(shapes, matching(shapes, names))
    if ours is not None and ours.hides_carriers:
        raise CarrierError(
            "The source is marked with this key already, in carriers that its claim keeps secret",
            expected="their names",
            do="pass them, or remove that claim to mark the default carriers too",
        )
    if ours is not None and all(shapes.get(c.name) == c.shape for c in ours.carriers):
        return tuple(claimed.carrier for claimed in ours.carriers)
    return choose_carriers(shapes)


def _scheme(carriers: Sequence[Carrier], ours: Claim | None, scheme: Scheme | None) -> Scheme:
    default = scheme_for(sum(carrier.weights for carrier in carriers))
    if scheme is None:
        scheme = default if ours is None else Scheme.from_name(ours.scheme)
    if scheme.embedding != "projection" or scheme.statistic != "spread":
        raise SchemeError(
            "The closed form embeds the spread statistic by projection",
            expected=default.name,
            got=scheme.name,
            do="pass another scheme; its claim replaces the one there" if ours else None,
        )
    return scheme


def _check_capacity(carriers: Sequence[Carrier], scheme: Scheme, keys: int) -> None:
    check_capacity(carriers, scheme)
    weights = sum(carrier.weights for carrier in carriers)
    most = scheme.capacity(weights, sum(carrier.columns for carrier in carriers)) // keys
    if scheme.bits > most:
        raise ModelTooSmallError(
            f"The model is too small for a recipient's {scheme.bits} bits beside the owner's",
            expected=f"at most {most} bits each for {weights:,} weights",
            do=f"use Scheme(bits={most}) or fewer" if most else "use a larger model",
        )


def _check_dtypes(checkpoint: Checkpoint, carriers: Sequence[Carrier]) -> None:
    for carrier in carriers:
        dtype = checkpoint.tensors[carrier.name].dtype
        if dtype not in _WRITTEN:
            raise CarrierError(
                f"The carrier {quoted(carrier.name, 120)} cannot be marked",
                expected=" or ".join(_WRITTEN),
                got=dtype,
                do="mark the checkpoint before it is quantised, or name other carriers",
            )
