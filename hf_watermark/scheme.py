"""What is embedded and how it is read: a frozen `Scheme` with a name that loses nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hf_watermark.errors import SchemeError

__all__ = ["Scheme"]

_FLOAT = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_NAME = re.compile(
    rf"(?P<statistic>spread|mean)-(?P<key_matrix>random|direct|diff)-(?P<bits>\d{{1,5}})"
    rf"-(?P<embedding>projection|hinge|bce)(?:@(?P<weight>{_FLOAT}))?"
    rf"-(?P<strength>auto|s{_FLOAT})-(?P<decides>soft|bits)"
)
_MAX_BITS = 4096
_LOSS_WEIGHT = 0.01  # Uchida et al. 2017, lambda; used for every loss unless the user says else
_FLOOR_MARGIN = 4.0  # natural sigmas, so that bits survive on small models
_READABLE = 50.0  # the soft statistic that `auto` aims at
_SLIGHT, _STRONG = 0.01, 0.10  # bounds of the relative distortion that `auto` chooses
_WEIGHTS_PER_BIT = 64  # below it the floor margin changes the carriers by more than half their size


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The parameters of a mark. Everything that changes its output is in `name`.

    Attributes:
        statistic: `spread` (default): every bit has secret signs for the output rows of every
            carrier, z_t = sum_i X_i[t] . (u_it^T W_i / sqrt(out_i)) / rms(W_i).
            `mean`: Uchida et al. 2017, section 3: z = X w, w the mean of W over output channels.
        key_matrix: X of the paper: `random` Gaussians (the only choice for `spread`), `direct` one
            weight a bit, `diff` the difference of two weights a bit.
        bits: T, the length of the message.
        embedding: `projection` changes the carriers after the optimizer's step by the least that
            brings every bit to its margin; `hinge` and `bce` are terms added to the loss.
        strength: For `spread`, the relative distortion d of the carriers, ||dW|| / ||W||; for
            `mean`, the margin in natural sigmas. None chooses by size: see `margin`.
        weight: lambda of the loss term, for `hinge` and `bce` only; None is 0.01, as in the paper.
        decides: The statistic that the verdict rests on: `soft` (N(0, 1), sees how far every bit
            leans) or `bits` (binomial, counts matches). None takes `soft` for Gaussian X.

    Raises:
        SchemeError: If a value, or a combination, makes no sense.
    """

    statistic: str = "spread"
    key_matrix: str = "random"
    bits: int = 64
    embedding: str = "projection"
    strength: float | None = None
    weight: float | None = None
    decides: str | None = None

    def __post_init__(self) -> None:
        self._one_of("statistic", ("spread", "mean"))
        self._one_of("key_matrix", ("random", "direct", "diff"))
        self._one_of("embedding", ("projection", "hinge", "bce"))
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise SchemeError("bits is not a whole number", got=type(self.bits).__name__)
        if not 1 <= self.bits <= _MAX_BITS:
            raise SchemeError("bits is out of range", expected=f"1 to {_MAX_BITS}", got=self.bits)
        if self.statistic == "spread" and self.key_matrix != "random":
            raise SchemeError(
                "The spread statistic needs Gaussian projections",
                expected="key_matrix='random'",
                got=repr(self.key_matrix),
                do="use statistic='mean' for the paper's direct and diff matrices",
            )
        if self.decides is None:
            object.__setattr__(self, "decides", "soft" if self.key_matrix == "random" else "bits")
        self._one_of("decides", ("soft", "bits"))
        if self.decides == "soft" and self.key_matrix != "random":
            raise SchemeError(
                "The soft statistic is normal only for Gaussian projections",
                expected="decides='bits' with direct and diff",
            )
        if self.embedding == "projection":
            if self.weight is not None:
                raise SchemeError("A projection has no loss weight", expected="weight=None")
        elif self.weight is None:
            object.__setattr__(self, "weight", _LOSS_WEIGHT)
        for field in ("strength", "weight"):
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SchemeError(f"{field} is not a number", got=type(value).__name__)
            try:
                value = float(value)
            except OverflowError:  # an int beyond the range of floats
                value = math.inf
            if not 0 < value < math.inf:
                raise SchemeError(f"{field} is out of range", expected="a number > 0", got=value)
            object.__setattr__(self, field, value)

    def _one_of(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            raise SchemeError(f"Unknown {field}", expected=" or ".join(choices), got=repr(value))

    @property
    def name(self) -> str:
        """The lossless name. Law: `Scheme.from_name(scheme.name) == scheme`."""
        weight = "" if self.weight is None else f"@{self.weight!r}"
        strength = "auto" if self.strength is None else f"s{self.strength!r}"
        return (
            f"{self.statistic}-{self.key_matrix}-{self.bits}-{self.embedding}{weight}"
            f"-{strength}-{self.decides}"
        )

    @classmethod
    def from_name(cls, name: str) -> Scheme:
        """The scheme of that name.

        Raises:
            SchemeError: If the name is not one that `name` can give.
        """
        match = _NAME.fullmatch(name) if isinstance(name, str) and len(name) < 200 else None
        if match is None:
            raise SchemeError("Not a scheme's name", expected=cls().name, got=repr(name)[:80])
        part = match.groupdict()
        scheme = cls(
            statistic=part["statistic"],
            key_matrix=part["key_matrix"],
            bits=int(part["bits"]),
            embedding=part["embedding"],
            strength=None if part["strength"] == "auto" else float(part["strength"][1:]),
            weight=None if part["weight"] is None else float(part["weight"]),
            decides=part["decides"],
        )
        if scheme.name != name:  # leading zeros, other digits: one scheme has one name
            raise SchemeError("Not a scheme's name", expected=scheme.name, got=repr(name)[:80])
        return scheme

    def capacity(self, weights: int, columns: int) -> int:
        """The most bits that carriers of this size can hold.

        Args:
            weights: N, the number of weights of all carriers.
            columns: M, the sum of the carriers' columns (inputs of one output row).
        """
        if self.statistic == "spread":
            return weights // _WEIGHTS_PER_BIT
        return columns // 2 if self.key_matrix == "diff" else columns

    def margin(self, weights: int) -> float:
        """The response that every bit should reach, in natural sigmas.

        For `spread`, m = max(4, d sqrt(N / T)): a relative distortion d of N weights gives a soft
        statistic of d sqrt(N) whatever T is. `auto` aims at 50 with d between 1% (large models:
        then the bytes that a reader needs stop growing with the model) and 10% (small ones).

        Args:
            weights: N, the number of weights of all carriers.
        """
        if self.statistic == "mean":
            return 1.0 if self.strength is None else self.strength
        distortion = self.strength
        if distortion is None:
            distortion = min(max(_READABLE / math.sqrt(weights), _SLIGHT), _STRONG)
        return max(_FLOOR_MARGIN, distortion * math.sqrt(weights / self.bits))
