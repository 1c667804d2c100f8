"""What can go wrong, and what to do about it.

Every error that a user can meet is a `WatermarkError`: one line that says what is wrong, what was
expected, what was found and what to do. No message ever carries key material.
"""

from __future__ import annotations

__all__ = [
    "AccessDeniedError",
    "AlignmentError",
    "AttachError",
    "CardConflictError",
    "CardError",
    "CarrierError",
    "CarrierMissingError",
    "CheckpointError",
    "ClaimError",
    "HubError",
    "KeyFileError",
    "MalformedCheckpointError",
    "ModelTooSmallError",
    "NetworkGaveUpError",
    "NotCalibratedError",
    "NotSafetensorsError",
    "OutputsError",
    "RepoMissingError",
    "RevisionMissingError",
    "SchemeError",
    "ShardedParameterError",
    "SoftLabelError",
    "WatermarkError",
]


class WatermarkError(Exception):
    """Base of all errors of this package.

    Args:
        what: What is wrong and where, a clause without a full stop.
        expected: What would have been right.
        got: What was found instead.
        do: What the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object | None = None,
        got: object | None = None,
        do: str | None = None,
    ) -> None:
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        message = "; ".join(str(part) for part in parts)
        if do is not None:
            message = f"{message}. {do[:1].upper()}{do[1:]}"
        super().__init__(" ".join(message.split()))
        self.what = what
        self.expected = expected
        self.got = got
        self.do = do


class KeyFileError(WatermarkError):
    """A key file is missing, garbled, of a newer version, or its passphrase is wrong."""


class SchemeError(WatermarkError, ValueError):
    """A scheme's parameters, or its name, make no sense."""


class CarrierError(WatermarkError):
    """The tensors that should carry the mark cannot."""


class ModelTooSmallError(CarrierError):
    """The carriers hold too few weights for the bits asked for."""


class CarrierMissingError(CarrierError):
    """A carrier that the claim or the user names is not in the model."""


class AlignmentError(CarrierError):
    """A suspect cannot be compared with the owner's reference."""


class AttachError(WatermarkError, RuntimeError):
    """A mark cannot be attached to, or detached from, this model now."""


class ShardedParameterError(AttachError):
    """A carrier's parameter is sharded in a way that is not supported yet."""


class CheckpointError(WatermarkError):
    """A checkpoint cannot be read."""


class NotSafetensorsError(CheckpointError):
    """The repo holds no safetensors (pickles are never opened)."""


class MalformedCheckpointError(CheckpointError):
    """A safetensors file or index is not what its format promises."""


class ClaimError(WatermarkError):
    """A claim is unreadable, was edited, or does not belong to the key."""


class HubError(WatermarkError):
    """The Hub, or what lies on it, could not be reached or read."""


class RepoMissingError(HubError):
    """No such repo, or a private one seen without a token."""


class AccessDeniedError(HubError):
    """The repo exists, but this token may not read or write it."""


class RevisionMissingError(HubError):
    """No such branch, tag or commit."""


class NetworkGaveUpError(HubError):
    """The server kept failing, answered nonsense, or cannot be reached."""


class CardConflictError(HubError):
    """The model card changed between reading and writing."""


class CardError(WatermarkError):
    """A model card cannot be edited without harm to the user's text."""


class SoftLabelError(WatermarkError):
    """A soft-label watermark cannot be set up, stored or read as asked."""


class NotCalibratedError(SoftLabelError, RuntimeError):
    """A soft-label watermark serves nothing before it has seen images."""


class OutputsError(WatermarkError, ValueError):
    """A suspect's outputs are not what a classifier of these classes gives."""
