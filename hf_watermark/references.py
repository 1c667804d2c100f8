"""The owner's reference: where the original lies, and the few of its tensors that align a suspect.

What a suspect is compared with is the owner's own checkpoint, read by range where his claim lies:
the repo or folder that `--claim` names, or the folder of the claim's file. Nothing more has to be
kept or published. A folder with `watermark.json` and a safetensors file of the tensors that
`reference_tensors` lists is enough.

The claim holds a digest of these tensors for every carrier, so the reference was fixed when the
mark was claimed. It must be: somebody free to choose the order of the reference's channels
afterwards could fit it to any key and any model.

Only marks in closed form have such digests: those of `embed_checkpoint`, and seals. What the null
rests on is that the key is independent of the tensors that are compared; the closed form leaves
them as they were. They know of a mark that they were trained beside: each unit's output weights
answer to its input weights, mark and all, so that matching by the former picks units that look
marked. So a model that was trained with its mark gets a second one when training has ended, the
seal, with a key that is derived anew every time (`WatermarkLoss.seal`); aligned readings look for
it alone. A model that was trained without sealing can be given one in closed form, with another
key: `hf-watermark embed`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import reference_digest, reference_tensors
from hf_watermark.errors import AlignmentError, CheckpointError, WatermarkError
from hf_watermark.evidence import Claim
from hf_watermark.files import Files, FolderFiles
from hf_watermark.found_claims import FoundClaim
from hf_watermark.key import OwnerKey
from hf_watermark.safetensors_ranges import decode_rows, quoted
from hf_watermark.symmetry import Alignment, Layout, Side, closest, layout_of, layouts_of

__all__ = ["Aligner", "aligner_of"]

_ROOM = 2**28  # bytes of one tensor of the reference; 256 MiB


def aligner_of(
    checkpoint: Checkpoint,
    reader: OwnerKey,
    found: FoundClaim | None,
    given: Claim | str | os.PathLike[str] | None,
) -> tuple[Aligner | None, str]:
    """What can undo disguises, or why nothing can; nothing is read for it yet.

    Args:
        checkpoint: The suspect.
        reader: The key that it is read with.
        found: The claim that it is read by, if there is one.
        given: What was passed as the claim.
    """
    only = "Only the raw weights were read: "
    layouts = layouts_of(checkpoint.shapes())
    if not layouts:
        return None, f"{only}disguises of this architecture cannot be undone."
    original = _reference_files(found, given, checkpoint.files)
    if found is None or original is None:
        return None, (
            f"{only}to undo disguises too, pass the repo or folder of the owner's original "
            "with --claim."
        )
    if not any(claimed.reference for claimed in found.claim.carriers):
        return None, (
            f"{only}the claim fixes nothing to compare disguised weights with, as a mark that was "
            "trained and not sealed cannot; one in closed form can (hf-watermark embed, with "
            "another key)."
        )
    if found.claim.seal is not None and not found.claim.commits_to(reader):
        return None, f"{only}the original was trained with its mark, and the seal is its owner's."
    return Aligner(original, found.claim, checkpoint, layouts), ""


def _reference_files(
    found: FoundClaim | None, given: Claim | str | os.PathLike[str] | None, suspect: Files
) -> Files | None:
    """Where the owner's original lies, by where his claim does; None if that is not known.

    Args:
        found: The claim that was found.
        given: What was passed as the claim.
        suspect: The suspect, which is no reference for itself.
    """
    if found is None or given is None or isinstance(given, Claim):
        return None
    if found.files is not None:
        return found.files if found.files is not suspect else None
    folder = Path(os.path.abspath(given)).parent
    try:
        # A claim may lie anywhere, at home among a thousand folders: look before listing them.
        return FolderFiles(folder) if any(folder.glob("*.safetensors")) else None
    except (CheckpointError, OSError):
        return None


class Aligner:
    """Aligns a suspect with the owner's original, carrier by carrier; opened when first used.

    Args:
        files: Where the original lies.
        claim: The owner's claim, which holds the digests of what is compared.
        suspect: The suspect.
        layouts: The layouts that the suspect may have.
    """

    def __init__(
        self, files: Files, claim: Claim, suspect: Checkpoint, layouts: tuple[Layout, ...]
    ) -> None:
        self.files = files
        self._claim = claim
        self._suspect = suspect
        self._layouts = layouts
        self._original: Checkpoint | None = None
        self._alignment: Alignment | None = None
        self._digests: dict[str, str] = {}
        self._arrays: dict[str, npt.NDArray[np.float32]] = {}

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the carriers that the claim fixed something to compare by."""
        return tuple(i for i, claimed in enumerate(self._claim.carriers) if claimed.reference)

    def carrier(self, position: int) -> tuple[str, npt.NDArray[np.float32]]:
        """The suspect's layer in place of a carrier.

        Args:
            position: The carrier's, in the claim.

        Returns:
            Its name in the suspect, and its weights aligned, (rows, columns).

        Raises:
            AlignmentError: If the original is not there, is not what was claimed, or does not fit.
            CarrierError: If a tensor of the suspect cannot be read, or is not finite.
        """
        if self._original is None or self._alignment is None:
            self._open()
        assert self._original is not None  # made by _open
        assert self._alignment is not None
        claimed = self._claim.carriers[position]
        self._load(self._original, position)
        w = self._alignment.carrier(claimed.name)
        name = self._alignment.name(claimed.name)
        if w is None or name is None:
            raise AlignmentError(
                "The suspect cannot be aligned with the owner's original",
                expected=f"layers around {quoted(claimed.name)} that compare with the original's",
                got="other shapes",
            )
        return name, w

    def _open(self) -> None:
        try:
            original = Checkpoint.open(self.files)
        except WatermarkError as error:
            raise AlignmentError(
                "The owner's original cannot be opened beside the claim",
                got=str(error),
                do="pass his own repo or folder with --claim",
            ) from None
        layout = layout_of(original.shapes())
        theirs = None if layout is None else closest(self._layouts, layout)
        if layout is None or theirs is None:
            raise AlignmentError(
                "The suspect is no relative of the owner's original",
                expected="a model of its family" if layout is None else f"a {layout.family}",
                got=" or ".join(sorted({f"a {other.family}" for other in self._layouts})),
            )
        suspect = Side(theirs, self._suspect.shapes(), self._read)
        ours = Side(layout, original.shapes(), self._arrays.__getitem__)
        names = [claimed.name for claimed in self._claim.carriers]
        self._alignment = Alignment(ours, suspect, names)
        self._supports = reference_tensors(original.shapes(), names)
        self._original = original

    def _read(self, name: str) -> npt.NDArray[np.float32]:
        return self._suspect.read_rows(name, 0, self._suspect.tensors[name].rows)

    def _load(self, original: Checkpoint, position: int) -> None:
        """Read the tensors that align a carrier, and check that they are those of the claim."""
        claimed = self._claim.carriers[position]
        names = self._supports.get(claimed.name, ())
        for name in set(self._arrays) - set(names):
            del self._arrays[name]
        try:
            for name in names:
                if name not in self._arrays:
                    self._arrays[name] = self._fetch(original, name)
        except AlignmentError:
            raise
        except WatermarkError as error:
            raise AlignmentError(
                "The owner's original cannot be read beside the claim", got=str(error)
            ) from None
        digest = reference_digest({name: self._digests[name] for name in names})
        if digest != claimed.reference:
            raise AlignmentError(
                f"The weights in {quoted(self.files.name, 300)} are not the claim's original",
                expected=f"{len(names)} tensors of digest {str(claimed.reference)[:16]}...",
                got=f"{digest[:16]}...",
                do="pass the repo or folder that holds the marked model as it was claimed",
            )

    def _fetch(self, original: Checkpoint, name: str) -> npt.NDArray[np.float32]:
        span = original.tensors[name]
        if span.stop - span.start > _ROOM:
            raise AlignmentError(
                f"Tensor {quoted(name)} of the owner's original is too large to compare",
                expected=f"at most {_ROOM:,} bytes",
                got=f"{span.stop - span.start:,}",
            )
        raw = b"".join(original.iter_bytes(name))
        self._digests[name] = hashlib.sha256(raw).hexdigest()
        return decode_rows(raw, span, span.rows)
