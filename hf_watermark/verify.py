"""Is this model marked with that key? Read, extract, judge: `verify_hub_model`, `verify_outputs`.

Needs neither torch nor transformers, runs nobody's code, and fetches a few ranges of the suspect's
safetensors, or takes the outputs that somebody else got from it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_watermark.carriers import Carrier, choose_carriers
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import check_digests
from hf_watermark.errors import CarrierError, ClaimError, KeyFileError, SchemeError
from hf_watermark.evidence import CLAIM_FILE, Claim, Evidence
from hf_watermark.files import Files
from hf_watermark.found_claims import FoundClaim, committed_at, find_claim, usable_claim
from hf_watermark.key import OwnerKey
from hf_watermark.projections import Projection
from hf_watermark.readings import Plan, Progress, read_suspect
from hf_watermark.references import Aligner, aligner_of
from hf_watermark.scheme import Scheme

if TYPE_CHECKING:
    from hf_watermark.softlabels.probes import Probes
    from hf_watermark.softlabels.verification import OutputEvidence, Served

__all__ = [
    "DEFAULT_ALPHA",
    "Verification",
    "check_align",
    "check_alpha",
    "check_key",
    "verify",
    "verify_hub_model",
    "verify_outputs",
    "what_to_read",
]

DEFAULT_ALPHA = 1e-6
# What X and u may take for carriers that the suspect's own shapes suggest, in bytes. A ViT-g takes
# 20 MB; a header of a few bytes can declare terabytes.
_ROOM = 2**29
_ON_ALIGNMENT = (
    "The weights were reordered or rotated; that was undone by comparing other layers with those"
    " of the owner's original. It counts against models made after the claim: the order of an"
    " original's channels is its owner's choice."
)


@dataclass(frozen=True)
class Verification:
    """An evidence with what it rests on.

    Attributes:
        evidence: The outcome.
        claim: The claim that said what to read, if one did.
        files: The suspect, at the revision that was read.
    """

    evidence: Evidence
    claim: Claim | None
    files: Files


def verify_hub_model(
    repo: str | os.PathLike[str],
    key: OwnerKey | None = None,
    *,
    claim: Claim | str | os.PathLike[str] | None = None,
    recipient: str | None = None,
    alpha: float = DEFAULT_ALPHA,
    revision: str | None = None,
    align: str = "auto",
    read: str = "auto",
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Whether a model on the Hub, or in a folder, carries the mark of `key`.

    What to read comes from `claim`, else from the suspect's own claim if it commits to the key,
    else from the default rule on the suspect's names and shapes: a thief deletes the claim first.

    Args:
        repo: `org/name`, or a folder.
        key: The owner's key. None checks what anyone can check, the claim's signature and the
            carriers' digests; the verdict is then `not checked`.
        claim: The owner's claim: the object, its file, or the owner's own repo or folder.
        recipient: Look for the mark of this recipient's copy instead of the owner's own.
        alpha: The chance of a false alarm that is accepted, after correction for all tries.
        revision: Branch, tag or commit; pinned to a full sha before anything is read.
        align: `auto` or `never`: whether to undo function-preserving disguises (channels
            reordered, scaled, negated, added; a residual stream rotated) when the raw reading
            fails. The suspect is compared with the owner's original, read by range where `claim`
            lies: his repo or folder, or that of the claim's file; its mark must have been made in
            closed form, or sealed when training had ended. Otherwise, for families without an
            aligned reading, and for recipients of sealed models, the raw weights alone are read,
            and the notes say so.
        read: `auto` stops once the corrected p-value passes alpha; `all` reads every carrier.
        token: For private and gated repos; None takes the one huggingface_hub knows.
        progress: Called with weights read and weights planned.

    Returns:
        The evidence; `log10_p` is corrected for `tries`.

    Raises:
        WatermarkError: If it could not be checked; the message says why and what to do.
    """
    return verify(
        repo,
        key,
        claim=claim,
        recipient=recipient,
        alpha=alpha,
        revision=revision,
        align=align,
        read=read,
        token=token,
        progress=progress,
    ).evidence


def verify_outputs(
    probs: Any,
    pixel_values: Any,
    served: Served | Probes,
    references: Sequence[Any] = (),
    recipient: str | Sequence[str] | None = None,
    alpha: float = DEFAULT_ALPHA,
) -> OutputEvidence:
    """Whether a suspect learnt from the soft labels of `served`, from its outputs alone.

    Choose probes and references before looking, without the customer's signs: images that were not
    used in calibration; in margin mode, those that the clean model hardly decides, or the logged
    queries of an account, all of them. Whoever picks probes by how they were answered, accuser or
    account, can make any model look guilty: the chance that is told holds for no such choice.

    Args:
        probs: The suspect's answers to n probes: (n, K) probabilities or their logarithms, rounded
            or top-k (0 or -inf where silent) as they may be, or (n,) labels; or a callable that
            gives them. Which of these is found out and said.
        pixel_values: The probes, (n, C, H, W); not used if `served` is `Probes`.
        served: The calibrated watermark, or what its `probes` gave earlier.
        references: Clean models' answers to the same probes, or callables. The owner's clean model
            is always among them; others, distilled from it, sharpen the view of weak suspects.
            Those that `Probes` hold count too.
        recipient: Whose mark to look for; several to find out whose, all counted as tries. None is
            the owner, or the customer of a view.
        alpha: The chance of a false alarm that is accepted, after correction for all tries.

    Raises:
        OutputsError: If the answers are no distributions over K classes, hold NaN, are not one for
            every probe, or are too few.

    Warns:
        UserWarning: If probes were used in calibration.
    """
    from hf_watermark.softlabels.verification import judge

    return judge(probs, pixel_values, served, references, recipient, alpha)


def verify(
    repo: str | os.PathLike[str],
    key: OwnerKey | None = None,
    *,
    claim: Claim | str | os.PathLike[str] | None = None,
    recipient: str | None = None,
    alpha: float = DEFAULT_ALPHA,
    revision: str | None = None,
    align: str = "auto",
    read: str = "auto",
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Verification:
    """As `verify_hub_model`, with the claim and the files beside the evidence."""
    from hf_watermark.hub import open_files

    started = time.perf_counter()
    if key is not None:
        check_key(key)
    check_alpha(alpha)
    check_align(align)
    _check_read(read)
    files = open_files(repo, revision, token)
    found = find_claim(files, claim, token, None if key is None else key.fingerprint)
    checkpoint = Checkpoint.open(files)
    common: dict[str, Any] = {"repo": files.name, "revision": files.revision, "alpha": alpha}
    others = found.files if found is not None else None
    original: Files | None = None
    with ThreadPoolExecutor(1) as background:
        if key is None:
            commit = background.submit(committed_at, found)
            common |= _public_checks(checkpoint, found)
        else:
            reader = key if recipient is None else key.for_recipient(recipient)
            found, notes = usable_claim(found, (key, reader), claim is not None)
            commit = background.submit(committed_at, found)
            aligner, why_not = None, ""
            if align == "auto":
                aligner, why_not = aligner_of(checkpoint, reader, found, claim)
                original = None if aligner is None else aligner.files
            outcome, note = _read(checkpoint, reader, found, alpha, read, progress, aligner)
            common |= outcome
            if outcome["verdict"] == "not found" and (why_not or note):
                notes += (why_not or note,)
            elif outcome["reading"].startswith("aligned"):
                notes += (_ON_ALIGNMENT,)
            if recipient is not None:
                notes += (f"Read with the key of the copy that was handed to {recipient!r}.",)
            common |= {"notes": notes}
        common |= {"committed_at": commit.result()}
    sources = {id(one): one for one in (files, others, original) if one is not None}
    evidence = Evidence(
        **common,
        bytes_read=sum(one.bytes_read for one in sources.values()),
        bytes_total=checkpoint.bytes_total,
        seconds=time.perf_counter() - started,
    )
    return Verification(evidence, found.claim if found is not None else None, files)


def check_key(key: OwnerKey) -> None:
    """Refuse what is no key.

    Raises:
        KeyFileError: If it is none.
    """
    if not isinstance(key, OwnerKey):
        raise KeyFileError(
            "The key is no OwnerKey",
            got=type(key).__name__,
            do="load it: OwnerKey.load('acme.key')",
        )


def check_alpha(alpha: float) -> None:
    """Refuse what is no chance.

    Raises:
        SchemeError: Unless 0 < alpha < 1.
    """
    if not (isinstance(alpha, (int, float)) and 0.0 < alpha < 1.0 and math.isfinite(alpha)):
        raise SchemeError(
            "alpha is out of range",
            expected="a number between 0 and 1",
            got=alpha,
            do=f"leave it out for {DEFAULT_ALPHA:g}",
        )


def check_align(align: str) -> None:
    """Refuse what is no way to align.

    Raises:
        SchemeError: Unless it is `auto` or `never`.
    """
    if align not in ("auto", "never"):
        raise SchemeError("Unknown align", expected="auto or never", got=repr(align))


def _check_read(read: str) -> None:
    if read not in ("auto", "all"):
        raise SchemeError("Unknown read", expected="auto or all", got=repr(read))


def _read(
    checkpoint: Checkpoint,
    key: OwnerKey,
    found: FoundClaim | None,
    alpha: float,
    read: str,
    progress: Progress | None,
    aligner: Aligner | None,
) -> tuple[dict[str, Any], str]:
    scheme, carriers = what_to_read(checkpoint, found)
    progressive = read == "auto" and scheme.statistic == "spread"
    aligned = () if aligner is None else aligner.positions
    shapes = checkpoint.shapes()
    plan = Plan.make(carriers, shapes, progressive=progressive, aligned=aligned)
    projection = Projection(key, scheme, carriers)
    align = None if aligner is None else aligner.carrier
    seal = None if found is None else found.claim.seal
    sealed = None
    if seal is not None:
        sealed = Projection(key.sealed(seal.nonce), Scheme.from_name(seal.scheme), carriers)
    finding = read_suspect(checkpoint, projection, plan, alpha, progress, align, sealed)
    if seal is not None and finding.how.startswith("aligned"):
        scheme = Scheme.from_name(seal.scheme)
    return {
        "verdict": "found" if finding.log10_p <= math.log10(alpha) else "not found",
        "log10_p": finding.log10_p,
        "bits": finding.reading.bits,
        "matched": finding.reading.matched,
        "tries": plan.tries,
        "reading": finding.how,
        "scheme": scheme.name,
        "carriers": finding.carriers,
        "key_fingerprint": key.fingerprint,
    }, finding.note


def what_to_read(
    checkpoint: Checkpoint, found: FoundClaim | None
) -> tuple[Scheme, tuple[Carrier, ...]]:
    """The scheme and the carriers that a suspect is read by.

    Args:
        checkpoint: The suspect.
        found: The claim to read by; None takes the default ones.

    Raises:
        CarrierError: If there is no claim and the default rule finds no carriers.
    """
    if found is None:
        scheme = Scheme()
        return scheme, _default_carriers(checkpoint.shapes(), scheme)
    carriers = tuple(claimed.carrier for claimed in found.claim.carriers)
    return Scheme.from_name(found.claim.scheme), carriers


def _default_carriers(shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[Carrier, ...]:
    carriers = choose_carriers(shapes)
    room = scheme.bits * sum(4 * carrier.columns + carrier.rows for carrier in carriers)
    if room > _ROOM:
        largest = max(carriers, key=lambda carrier: carrier.weights)
        raise CarrierError(
            "The suspect's layers are too large for the default carriers",
            expected=f"at most {_ROOM:,} bytes to read them",
            got=f"{room:,}, for such as {largest.name[:120]!r} of shape {list(largest.shape)}",
            do="pass the owner's claim with --claim",
        )
    return carriers


def _public_checks(checkpoint: Checkpoint, found: FoundClaim | None) -> dict[str, Any]:
    if found is None:
        raise ClaimError(
            f"There is nothing to check in {checkpoint.files.name} without a key",
            expected=CLAIM_FILE,
            got="no claim",
            do="pass the owner's key with --key, or a claim with --claim",
        )
    claim = found.claim
    if claim.carriers_commitment is not None:  # anyone can put a list beside a commitment
        digests = "The claim keeps its carriers secret, so their digests were not checked."
    else:
        digests = f"All {check_digests(checkpoint, claim)} claimed tensors are here, unchanged."
    return {
        "verdict": "not checked",
        "log10_p": None,
        "bits": Scheme.from_name(claim.scheme).bits,
        "matched": None,
        "tries": 0,
        "reading": None,
        "scheme": claim.scheme,
        "carriers": tuple(claimed.name for claimed in claim.carriers),
        "key_fingerprint": None,
        "notes": (
            f"The claim's signature fits its public key {claim.public_key[:16]}...",
            digests,
            "Ownership was not tested: that takes the owner's key (--key).",
        ),
    }
