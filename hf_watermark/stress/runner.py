"""One cell after the other: attack a copy, save it, read it as `verify` does, keep the outcome."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_watermark.errors import WatermarkError
from hf_watermark.evidence import CLAIM_FILE, Claim, Evidence
from hf_watermark.key import OwnerKey
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.stress.attacks import Attack, Means, NotApplicableError
from hf_watermark.stress.disguises import saved_tensors
from hf_watermark.stress.examples import Examples
from hf_watermark.stress.outcomes import Outcome, Record, was_removed
from hf_watermark.stress.training import answers
from hf_watermark.stress.victims import Victim
from hf_watermark.verify import DEFAULT_ALPHA, check_alpha, check_key, verify_hub_model

__all__ = ["Settings", "Stress"]

Say = Callable[[Outcome, int, int], None]
_FLOOR = -1e308  # JSON has no infinity


@dataclass(frozen=True)
class Settings:
    """How hard the attacker tries, and how the mark is judged.

    Attributes:
        seed: Of every attack; the split of the images has it too.
        epochs: Passes over the attacker's images that one fine-tuning takes.
        learning_rate: AdamW's at "1x": the one that the model was trained with.
        batch_size: Images a step.
        alpha: The chance of a false alarm that is accepted.
    """

    seed: int = 0
    epochs: int = 5
    learning_rate: float = 1e-4
    batch_size: int = 64
    alpha: float = DEFAULT_ALPHA


class Stress:
    """A run: one victim, one key, one set of images.

    Args:
        victim: The marked model.
        key: Its owner's.
        training: The attacker's images.
        test: Held out.
        settings: How hard the attacker tries.
        claim: The owner's claim; None takes the one in the victim's folder. An aligned reading
            needs the folder, which holds the original.

    Raises:
        WatermarkError: If the key does not find its mark in the victim.
    """

    def __init__(
        self,
        victim: Victim,
        key: OwnerKey,
        training: Examples,
        test: Examples,
        settings: Settings | None = None,
        claim: Claim | str | os.PathLike[str] | None = None,
    ) -> None:
        self.settings = Settings() if settings is None else settings
        check_key(key)
        check_alpha(self.settings.alpha)
        self.victim, self._key, self._test = victim, key, test
        has_own = (victim.folder / CLAIM_FILE).exists()
        self._claim = victim.folder if claim is None and has_own else claim
        self.means = Means(
            training.images,
            training.labels,
            self.settings.seed,
            self.settings.epochs,
            self.settings.learning_rate,
            self.settings.batch_size,
        )
        read = self._read(victim.folder)
        if not read.found:
            raise WatermarkError(
                f"The key does not find its mark in {quoted(victim.name, 200)}",
                expected=f"a corrected p of at most {self.settings.alpha:g}",
                got=f"log10 p {read.log10_p:.2f}",
                do="take the key that marked it, or pass the owner's claim with --claim",
            )
        self._accuracy = self._measured(victim.model)
        self.before: dict[str, Any] = {
            "accuracy": self._accuracy,
            "ber": read.ber,
            "log10_p": _finite(read.log10_p),
            "tries": read.tries,
            "reading": read.reading,
        }

    @property
    def described(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        config = self.victim.model.config
        return {
            **dataclasses.asdict(self.settings),
            "model_type": config.model_type,
            "parameters": sum(p.numel() for p in self.victim.model.parameters()),
            "attackers_images": len(self.means.images),
            "test_images": len(self._test),
            "key_fingerprint": self._key.fingerprint,
            "model_sha256": self.victim.digest,
            "attackers_sha256": Examples(self.means.images, self.means.labels).digest,
            "test_sha256": self._test.digest,
        }

    def run(self, attacks: Sequence[Attack], folder: Path, say: Say | None = None) -> Record:
        """All attacks that the folder has no outcome of; each is on disk once it is done.

        Args:
            attacks: In this order.
            folder: Of the results.
            say: Called with each new outcome, its number, and how many there are in all.

        Raises:
            WatermarkError: If the folder holds the results of another run.
        """
        described = self.described
        record = Record.resumed(folder, described) or Record(described, self.before)
        for number, attack in enumerate(attacks, 1):
            if attack.name not in record.outcomes:
                outcome = record.outcomes[attack.name] = self.cell(attack)
                record.save(folder)
                if say is not None:
                    say(outcome, number, len(attacks))
        record.save(folder)
        return record

    def cell(self, attack: Attack) -> Outcome:
        """One attack: what it leaves of the accuracy and of the mark."""
        about: dict[str, Any] = {
            "name": attack.name,
            "family": attack.family,
            "source": attack.source,
            "parameters": attack.parameters,
        }
        started = time.perf_counter()
        try:
            attacked: Any = attack(self.victim.model, self.means)
            seconds = round(time.perf_counter() - started, 3)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                attacked.save_pretrained(folder)
                if attack.names is not None:
                    _rename(folder, attack)
                accuracy = self._measured(attacked)
                about |= {
                    "accuracy": accuracy,
                    "lost": round(self._accuracy - accuracy, 6),
                    "seconds": seconds,
                }
                return Outcome(**about, **self._judged(folder, attack, about["lost"]))
        except NotApplicableError as error:
            return Outcome(**about, status="not applicable", note=str(error))
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Outcome(**about, status="failed", note=told)

    def _judged(self, folder: Path, attack: Attack, lost: float) -> dict[str, Any]:
        try:
            read = self._read(folder)
        except WatermarkError as error:  # weights of NaN, or no tensor to read
            removed = was_removed(False, lost)
            return {"status": "unreadable", "found": False, "removed": removed, "note": str(error)}
        return {
            "status": "read",
            "ber": read.ber,
            "log10_p": _finite(read.log10_p),
            "tries": read.tries,
            "reading": read.reading,
            "found": read.found,
            "raw_log10_p": self._raw(folder) if attack.keeps_function else None,
            "removed": was_removed(read.found, lost),
            "note": "" if read.found else " ".join(read.notes),
        }

    def _raw(self, folder: Path) -> float | None:
        """log10 p of the raw weights alone; None if there is nothing to read it from."""
        try:
            return _finite(self._read(folder, align="never").log10_p)
        except WatermarkError:
            return None

    def _read(self, folder: Path, align: str = "auto") -> Evidence:
        """The owner's own check, all carriers read; the thief has deleted the claim."""
        return verify_hub_model(
            folder,
            self._key,
            claim=self._claim,
            alpha=self.settings.alpha,
            align=align,
            read="all",
        )

    @torch.no_grad()
    def _measured(self, model: Any) -> float:
        said = answers(model, self._test.images).argmax(1)
        return round(float((said == self._test.labels).double().mean()), 6)


def _rename(folder: Path, attack: Attack) -> None:
    assert attack.names is not None
    tensors = attack.names(saved_tensors(folder))
    for path in folder.iterdir():
        path.unlink()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def _finite(log10_p: float | None) -> float | None:
    return _FLOOR if log10_p is not None and log10_p == -math.inf else log10_p
