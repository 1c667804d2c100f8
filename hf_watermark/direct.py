"""A mark without data or training: the closed form, written into a checkpoint on disk.

Only the carriers' bytes change. The checkpoint is read by rows and written by rows, so memory is
bounded whatever the model's size, and the result appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from hf_watermark.carriers import Carrier, check_capacity, choose_carriers, named_carriers
from hf_watermark.checkpoint import Checkpoint, FolderFiles
from hf_watermark.claims import CLAIM_LIMIT, make_claim
from hf_watermark.errors import (
    CarrierError,
    CheckpointError,
    ClaimError,
    KeyFileError,
    ModelTooSmallError,
    SchemeError,
)
from hf_watermark.evidence import CLAIM_FILE, Claim
from hf_watermark.hub import open_files
from hf_watermark.key import OwnerKey
from hf_watermark.margins import (
    TOLERANCE,
    Grams,
    Mark,
    Response,
    Sums,
    growth,
    lift,
    responses_after,
    rounded,
)
from hf_watermark.projections import Doubles, Floats
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.scheme import Scheme
from hf_watermark.significance import log10_normal_tail

__all__ = ["Embedded", "embed_checkpoint", "scheme_for"]

Progress = Callable[[int, int], None]

_PIECE = 2**20  # weights at a time
_CLOSED_FORM = 0.05  # nothing trains afterwards: half the distortion that training absorbs
_ROUNDS = 6  # of asking for more where rounding swallowed a part: bfloat16 takes 2 or 3
_WRITTEN = ("F32", "F16", "BF16")
_SKIPPED = (".git", ".cache")
# What may hold the same weights again, and what is called so but holds none.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_NO_WEIGHTS = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")


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
    is kept beside ours as `watermark-FINGERPRINT.json`, the fingerprint being that of its key.

    The copy is made in a hidden folder beside `output_dir`, which takes its name when complete.
    Law: on the same machine the same arguments give the same bytes, and the marked copy marked
    again is the same copy.

    Args:
        source: A folder, or `org/name` on the Hub, which is downloaded.
        key: The owner's.
        output_dir: A new or empty folder, outside of the source.
        scheme: None chooses by size (`scheme_for`). Its embedding must be `projection`.
        carriers: Names of the tensors that carry the mark; kept out of the public claim. None
            chooses.
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
    output = _free(output_dir)
    folder = _folder_of(source, revision, token)
    if folder.resolve() in (output, *output.parents):
        raise CheckpointError(
            f"The output {quoted(str(output), 300)} lies in the source",
            do="choose a folder outside of it",
        )
    files = FolderFiles(folder)
    checkpoint = Checkpoint.open(files)
    there = _claim_in(files)
    ours = there if there is not None and _is_ours(there, key) else None
    chosen = _carriers(checkpoint, ours, carriers)
    scheme = _scheme(chosen, ours, scheme)
    keys = [key] if recipient is None else [key, key.for_recipient(recipient)]
    _check_capacity(chosen, scheme, len(keys))
    _check_dtypes(checkpoint, chosen)
    work = _Work(checkpoint, Mark(keys, scheme, chosen), progress)
    work.measure()
    work.solve()
    kept = _kept_name(files, there) if there is not None and ours is None else None
    with _appearing(output) as unfinished:
        paths = _copy(folder, unfinished)
        if kept is not None:
            os.replace(unfinished / CLAIM_FILE, unfinished / kept)
        work.write(unfinished)
        names = [carrier.name for carrier in chosen]
        written = Checkpoint.open(FolderFiles(unfinished))
        claim = make_claim(written, key, scheme, names, secret_carriers=carriers is not None)
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
        unmarked=tuple(p for p in paths if p not in checkpoint.weight_files and _is_weights(p)),
    )


# What was asked for -------------------------------------------------------------------------------


def _folder_of(
    source: str | os.PathLike[str], revision: str | None, token: str | bool | None
) -> Path:
    files = open_files(source, revision, token)
    if files.revision is not None:
        from hf_watermark.hub import download

        return download(files.name, files.revision, token)
    folder = Path(files.name).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"{quoted(files.name, 300)} is a file", expected="the folder of the checkpoint"
        )
    return folder


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


def _is_ours(claim: Claim, key: OwnerKey) -> bool:
    """Whether the key signed a claim; one that it did not sign is a stranger's, whatever it says."""
    try:
        claim.check("")
    except ClaimError:
        return False
    return claim.commits_to(key)


def _kept_name(files: FolderFiles, claim: Claim) -> str:
    """A name for another owner's claim that nothing in the folder has."""
    fingerprint = hashlib.sha256(bytes.fromhex(claim.public_key)).hexdigest()[:16]
    stem, suffix = CLAIM_FILE.split(".")
    name, number = f"{stem}-{fingerprint}.{suffix}", 2
    while name in files.sizes:
        name, number = f"{stem}-{fingerprint}-{number}.{suffix}", number + 1
    return name


def _carriers(
    checkpoint: Checkpoint, ours: Claim | None, names: Sequence[str] | None
) -> tuple[Carrier, ...]:
    shapes = checkpoint.shapes()
    if names is not None:
        return named_carriers(shapes, names)
    if ours is not None and ours.hides_carriers:
        raise CarrierError(
            "The source is marked with this key already, in carriers that its claim keeps secret",
            expected="their names",
            do=f"pass them, or remove {CLAIM_FILE} to mark the default carriers too",
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


# Reading, solving, writing ------------------------------------------------------------------------


class _Work:
    """One embedding: `measure`, then `solve`, then `write`."""

    def __init__(self, checkpoint: Checkpoint, mark: Mark, progress: Progress | None) -> None:
        self._checkpoint, self._mark, self._progress = checkpoint, mark, progress
        self._done = 0
        self.planned = 2 * sum(carrier.weights for carrier in mark.carriers)
        self._grams = Grams(mark)
        self._before: list[Response] = []
        self._after: list[Response] = []
        self._wanted = np.full(len(mark.signs), mark.margin)
        # A little more than is demanded, so that another machine's rounding finds it there.
        self._asked = self._wanted * (1.0 + TOLERANCE)
        self.v: Doubles = np.zeros(len(mark.signs))
        self.changes = [0.0]

    def count(self, done: int) -> None:
        """Tell how many weights are done."""
        done = min(done, self.planned)
        if self._progress is not None and done > self._done:
            self._progress(done, self.planned)
        self._done = max(done, self._done)

    @property
    def reached(self) -> Doubles:
        """s_t z_t as it stands, (T,)."""
        total: Doubles = self._mark.signs * np.sum([r.z for r in self._after], axis=0)
        return total

    @property
    def _lacking(self) -> Doubles:
        lacking: Doubles = self._wanted - self.reached
        return lacking

    def log10_p(self) -> float:
        """log10 p of the first key's soft statistic."""
        own = self._mark.own
        v = float(np.sum([r.variance for r in self._after], axis=0)[own].sum())
        return log10_normal_tail(float(self.reached[own].sum()) / math.sqrt(v))

    def measure(self) -> None:
        """Read all carriers once."""
        for i, carrier in enumerate(self._mark.carriers):
            directions = self._mark.directions(i)
            sums = Sums(directions)
            for start, w in self._pieces(carrier):
                sums.add(start, w)
                self.count(self._done + w.size)
            self._before.append(_response(sums, carrier))
            self._grams.add(i, directions)
        self._after = self._before

    def solve(self) -> None:
        """Find the least change, zero if the mark is there."""
        if float(self._lacking.max()) <= TOLERANCE * self._mark.margin:
            return
        z = np.stack([r.z for r in self._before])
        mark = self._mark
        self.v = lift(z, self._grams, mark.weights, mark.signs, self._asked)
        predicted = mark.signs * responses_after(self.v, z, self._grams, mark.weights)
        if float((self._asked - predicted).max()) > 2.0 * TOLERANCE * self._asked.max():
            self._refuse(predicted, "use fewer bits or less strength")

    def write(self, target: Path) -> None:
        """Write the changed carriers into the copy; ask for more where rounding swallowed a part.

        Raises:
            CarrierError: If rounding keeps the margin out of reach.
        """
        if not self.v.any():
            return
        z = np.stack([r.z for r in self._before])
        mark = self._mark
        start = mark.signs * z.sum(axis=0)
        for round_ in range(_ROUNDS):
            if round_:
                # What is left of the raise tells how much more must be asked for.
                raised = mark.signs * responses_after(self.v, z, self._grams, mark.weights) - start
                share = float((self.reached - start) @ raised) / float(raised @ raised)
                self._asked = self._asked + np.maximum(self._lacking, 0.0) / min(
                    max(share, 0.1), 1.0
                )
                self.v = lift(z, self._grams, mark.weights, mark.signs, self._asked)
            scales = 1.0 / growth(self.v, z, self._grams, mark.weights)
            written = [self._rewrite(i, float(scale), target) for i, scale in enumerate(scales)]
            self._after = [response for response, _ in written]
            self.changes = [change for _, change in written]
            if float(self._lacking.max()) <= TOLERANCE * mark.margin:
                return
        self._refuse(
            self.reached,
            "use fewer bits or more strength, or mark the checkpoint in F32 before casting it",
        )

    def _refuse(self, got: Doubles, do: str) -> NoReturn:
        raise CarrierError(
            "The carriers cannot hold the margin",
            expected=f"every bit at {self._mark.margin:.2f} sigmas",
            got=f"{float(got.min()):.2f} at the weakest",
            do=do,
        )

    def _pieces(self, carrier: Carrier) -> Iterator[tuple[int, Floats]]:
        step = max(1, _PIECE // carrier.columns)
        for start in range(0, carrier.rows, step):
            stop = min(start + step, carrier.rows)
            yield start, self._checkpoint.read_rows(carrier.name, start, stop)

    def _rewrite(self, i: int, scale: float, target: Path) -> tuple[Response, float]:
        """Write one carrier into the copy; what a reader finds there, and how far it moved."""
        carrier, rms = self._mark.carriers[i], self._before[i].rms
        span = self._checkpoint.tensors[carrier.name]
        directions = self._mark.directions(i)
        u = directions.scaled(self.v, rms)
        sums = Sums(directions)
        moved = 0.0
        with open(target / span.file, "r+b") as file:
            for start, w in self._pieces(carrier):
                changed = u[start : start + len(w)] @ directions.x
                changed += w
                changed *= np.float32(scale)
                stored, changed = rounded(changed, span.dtype)
                file.seek(span.start + start * span.row_bytes)
                file.write(stored.data)
                sums.add(start, changed)
                w -= changed
                moved += float(np.einsum("ij,ij->", w, w, dtype=np.float64))
                self.count(self._done + w.size)
        return _response(sums, carrier), math.sqrt(moved / carrier.weights) / rms


def _response(sums: Sums, carrier: Carrier) -> Response:
    response = sums.response()
    if response is None:
        raise CarrierError(
            f"The carrier {quoted(carrier.name, 120)} cannot be marked",
            expected="weights well within the range of their dtype",
            got="nothing but zeros, or numbers next to infinity",
            do="name other carriers",
        )
    return response
