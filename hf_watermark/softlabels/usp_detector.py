"""A trained detector for the unified perturbation: a small network that looks at single outputs.

It is trained on the owner's own clean and marked answers under thousands of random signs, rounded,
cooled, noisy and half learnt, so it knows no key: it sees how far an answer moves along the shift g
that given signs would cause. Where answers are passed on as they are, the paired test of `usp` is
as good and needs no training; where they were processed, this one sees more.

The network's own score has no distribution that anyone knows. A set's p-value therefore comes from
ranks: under H0 the owner's signs are one draw among fresh ones, so p = (1 + fresh scores at least
as high) / (1 + fresh ones) is exact, and never below 1 / (1 + fresh ones).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_watermark.errors import SoftLabelError
from hf_watermark.key import OwnerKey
from hf_watermark.projections import Doubles
from hf_watermark.softlabels.chips import chip_signs
from hf_watermark.softlabels.perturbation import Bend, bend
from hf_watermark.softlabels.usp import Pair, residuals

if TYPE_CHECKING:
    from hf_watermark.softlabels.wrapper import SoftLabelWatermark

__all__ = ["DetectorEvidence", "UspDetector", "detect", "train_detector"]

FILE_FORMAT = "hf-watermark-usp-detector/1"
Progress = Callable[[int, int], None]
_INPUTS, _WIDTH = 6, 48
_CLIP = 6.0  # nats
_DECIMALS = (None, None, 6, 4, 3, 2)


class UspDetector(nn.Module):
    """From shift and residual of single outputs to the log-odds that they are marked.

    Every class is looked at by the same layers and the classes are averaged, so any K will do. It
    holds no key, but stays with the owner all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(
            nn.Linear(_INPUTS, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, _WIDTH), nn.GELU()
        )
        self.together = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, 1))

    def forward(self, g: Tensor, residual: Tensor, log_p: Tensor) -> Tensor:
        """Log-odds (B,).

        Args:
            g: (B, K), the shift that the signs cause in log-probabilities, in standard deviations.
            residual: (B, K), answer less clean answer, nats; 0 where nothing was shown.
            log_p: (B, K), the clean answer.
        """
        p = log_p.exp()
        # Blending moves a row as a whole: what counts is g and the residual relative to the mean.
        g = g - (p * g).sum(1, keepdim=True)
        r = (residual - residual.mean(1, keepdim=True)).clamp(-_CLIP, _CLIP)
        norm = r.norm(dim=1, keepdim=True)
        unit = r / norm.clamp(min=1e-3) * math.sqrt(r.shape[1])
        size = (norm.clamp(min=1e-3)).log().expand_as(r)
        values = [g, r, unit * (g - g.mean(1, keepdim=True)), r * g, log_p / 10.0, size / 5.0]
        seen = self.each(torch.stack(values, dim=2)).mean(dim=1)
        logit: Tensor = self.together(seen)[:, 0]
        return logit

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write safetensors. Law: `UspDetector.load(path)` gives the same."""
        from safetensors.torch import save_file

        save_file(self.state_dict(), os.fspath(path), {"format": FILE_FORMAT})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UspDetector:
        """Read a file that `save` wrote.

        Raises:
            SoftLabelError: If it is missing or something else.
        """
        from safetensors.torch import load

        detector = cls()
        try:
            detector.load_state_dict(load(Path(path).read_bytes()))
        except Exception as error:  # safetensors and torch have errors of their own
            raise SoftLabelError(
                f"The detector in {path} cannot be read",
                expected=FILE_FORMAT,
                got=getattr(error, "strerror", None) or type(error).__name__,
            ) from None
        return detector.eval()


@dataclass(frozen=True, kw_only=True)
class DetectorEvidence:
    """What the network makes of a set of answers.

    Attributes:
        p: The share of keys, the owner's and fresh ones, that score at least as high: exact.
        score: The mean log-odds with the owner's signs. No p-value.
        fresh: (m,), the same with fresh keys.
        marked: (n,) bool, the verdict on every output, of an accuracy to be measured.
        scores: (n,), log-odds.
    """

    p: float
    score: float
    fresh: Doubles = field(repr=False)
    marked: npt.NDArray[np.bool_] = field(repr=False)
    scores: Doubles = field(repr=False)


def train_detector(
    served: SoftLabelWatermark,
    pixel_values: Any,
    *,
    steps: int = 1500,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> UspDetector:
    """Train on images of yours, under random signs; the owner's own are never used.

    Args:
        served: The calibrated watermark.
        pixel_values: (n, C, H, W), unlabelled; not those that suspects will be asked about.
        steps: Of Adam.
        batch_size: Outputs a step, half of them marked.
        seed: Of weights, signs and order.
        progress: Called with steps done and planned.
    """
    pair = Pair.of(served, pixel_values)
    log_p, psi = torch.from_numpy(pair.clean).float(), torch.from_numpy(pair.psi).float()
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        detector = UspDetector()
        optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for step in range(steps):
            rows = torch.from_numpy(rng.integers(len(log_p), size=batch_size))
            labels = torch.from_numpy(rng.random(batch_size) < 0.5)
            g, other = (_shift(psi[rows], log_p.shape[1], rng) for _ in range(2))
            residual = _example(log_p[rows], g, other, labels, served.how, rng)
            logits = detector(g, residual, log_p[rows])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps)
    return detector.eval()


def detect(
    detector: UspDetector, answers: Any, pair: Pair, fresh_keys: int = 999
) -> DetectorEvidence:
    """Judge a set of answers with the owner's signs, and with fresh keys for comparison.

    Args:
        detector: Trained.
        answers: (n, K) probabilities or logarithms, as in `usp.paired_test`.
        pair: What the owner recomputes for the inputs.
        fresh_keys: How many keys that bent nothing to compare with; p is at least 1 / (1 + m).

    Raises:
        OutputsError: As in `usp.paired_test`.
    """
    residual = torch.from_numpy(residuals(answers, pair)).float()
    log_p, psi = torch.from_numpy(pair.clean).float(), torch.from_numpy(pair.psi).float()

    def scores(signs: npt.NDArray[np.int8]) -> Doubles:
        g = psi @ torch.from_numpy(signs).float() / math.sqrt(psi.shape[1])
        with torch.inference_mode():
            found: Doubles = detector(g, residual, log_p).double().numpy()
        return found

    own = scores(pair.signs)
    fresh = [
        scores(chip_signs(OwnerKey.generate(), *pair.signs.shape)).mean() for _ in range(fresh_keys)
    ]
    higher = sum(one >= own.mean() for one in fresh)
    return DetectorEvidence(
        p=(1 + int(higher)) / (1 + fresh_keys),
        score=float(own.mean()),
        fresh=np.array(fresh, np.float64),
        marked=own > 0.0,
        scores=own,
    )


def _shift(psi: Tensor, classes: int, rng: np.random.Generator) -> Tensor:
    """G of signs of its own for every row, (B, K)."""
    signs = 2.0 * rng.integers(2, size=(len(psi), psi.shape[1], classes), dtype=np.int8) - 1.0
    g: Tensor = torch.einsum("bf,bfk->bk", psi, torch.from_numpy(signs).float())
    return g / math.sqrt(psi.shape[1])


def _example(
    log_p: Tensor, g: Tensor, other: Tensor, labels: Tensor, how: Bend, rng: np.random.Generator
) -> Tensor:
    """Residuals of answers that were bent by g where labelled, else by others or not at all."""
    size = (len(log_p), 1)
    wrong = torch.from_numpy(rng.random(size) < 0.5)
    marked, _ = bend(log_p, g, how)
    stranger, _ = bend(log_p, other, how)
    y = torch.where(labels[:, None], marked, torch.where(wrong, stranger, log_p))
    # As it is, or learnt by a student: a part of the bend, and opinions of its own.
    learnt = torch.from_numpy(rng.random(size) < 0.4)
    share = torch.from_numpy(rng.uniform(0.2, 1.0, size)).float()
    noise = torch.from_numpy(rng.uniform(0.0, 0.8, size) * rng.normal(size=log_p.shape)).float()
    y = torch.where(learnt, log_p + share * (y - log_p) + noise, y)
    heat = torch.from_numpy(rng.choice([1.0, 1.0, 1.0, 2.0], size)).float()
    p = (y / heat).softmax(1).double().numpy()
    decimals = rng.choice(len(_DECIMALS), len(p))
    clean = log_p.double().exp().numpy()
    r = np.zeros(p.shape)
    for place, digits in enumerate(_DECIMALS):
        rows = decimals == place
        floor = 1e-12 if digits is None else 0.5 * 10.0**-digits
        a, b = (x[rows] if digits is None else x[rows].round(digits) for x in (p, clean))
        r[rows] = np.log(np.maximum(a, floor)) - np.log(np.maximum(b, floor))
    return torch.from_numpy(r).float()
