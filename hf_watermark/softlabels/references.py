"""Clean students of one's own model, made before any dispute: what an innocent would answer.

A weak suspect differs from the owner's model in ways that have nothing to do with a mark. Students
distilled from the clean model, in the architectures that a thief might take, differ likewise, and
a check takes out whatever they explain. They are made once, on images like a customer's queries,
and their digests recorded, so that nobody can choose them after looking.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_watermark.errors import SoftLabelError
from hf_watermark.softlabels.answers import logits_of
from hf_watermark.softlabels.probes import Probes, image_digests

__all__ = ["BANK_FORMAT", "ReferenceBank"]

BANK_FORMAT = "hf-watermark-references/1"
Progress = Callable[[int, int], None]
_WARM = 0.1  # of the steps
_SAME = 1e-2  # nats: what another machine may change in a student's answers


class ReferenceBank:
    """A folder of clean students: `<name>.pt` each, and `bank.json` with their digests.

    Args:
        folder: Made if missing.
        students: How to make each student, untrained, by name: with the same classes, in the same
            order, as the owner's model.

    Raises:
        SoftLabelError: If the folder holds a bank that is unreadable.
    """

    def __init__(
        self, folder: str | os.PathLike[str], students: Mapping[str, Callable[[], nn.Module]]
    ) -> None:
        self.folder = Path(folder)
        self.students = dict(students)
        for name in self.students:
            if not name or not all(sign.isalnum() or sign in "-_." for sign in name):
                raise SoftLabelError(
                    "A student's name cannot be a file's",
                    expected="letters, digits, '-', '_' or '.'",
                    got=repr(name),
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries = self._read()

    def distil(
        self,
        model: nn.Module,
        pixel_values: Tensor,
        *,
        epochs: int = 10,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
        seed: int = 0,
        hard_labels: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Train every student that the bank lacks on the clean soft labels of `model`.

        Interrupted, it goes on from the last whole epoch. Law: to the same students, on a CPU.

        Args:
            model: The owner's, not the wrapper: a marked reference would hide the mark.
            pixel_values: (n, C, H, W), unlabelled, like the queries of a customer.
            epochs: Per student.
            batch_size: Images a step.
            learning_rate: Of AdamW, at its peak.
            seed: Of weights and order.
            hard_labels: Teach the most likely class alone, as to a thief who keeps nothing else:
                what margin mode is read against.
            progress: Called with epochs done and planned.

        Raises:
            SoftLabelError: If `model` is marked, or a student has other classes.
        """
        from hf_watermark.softlabels.wrapper import SoftLabelWatermark

        if any(isinstance(module, SoftLabelWatermark) for module in model.modules()):
            raise SoftLabelError(
                "References must be clean", do="distil from the model inside: served.model"
            )
        missing = [name for name in self.students if name not in self.entries]
        if not missing:
            return
        logits = _answers(model, pixel_values, batch_size)
        targets = logits.argmax(1) if hard_labels else logits.softmax(1)
        setting = {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
            "classes": logits.shape[1],
            "labels": "hard" if hard_labels else "soft",
            "images": len(pixel_values),
            "images_sha256": _sum(pixel_values),
        }
        for place, name in enumerate(missing):

            def tell(done: int, place: int = place) -> None:
                if progress is not None:
                    progress(place * epochs + done, len(missing) * epochs)

            with torch.random.fork_rng():
                self._train(name, pixel_values, targets, setting, tell)

    def _train(
        self,
        name: str,
        x: Tensor,
        targets: Tensor,
        setting: dict[str, Any],
        tell: Callable[[int], None],
    ) -> None:
        torch.manual_seed(setting["seed"])
        student = self.students[name]().to(x.device).train()
        optimizer = torch.optim.AdamW(student.parameters(), weight_decay=5e-4)
        partial = self.folder / f"{name}.partial"
        epochs, size = setting["epochs"], min(setting["batch_size"], len(x))
        first = 0
        if partial.exists():
            state = _load(partial)
            if state.get("setting") == setting:
                student.load_state_dict(state["student"])
                optimizer.load_state_dict(state["optimizer"])
                first = state["epoch"]
        steps = len(x) // size
        for epoch in range(first, epochs):
            torch.manual_seed(setting["seed"] * 100_003 + epoch + 1)
            order = torch.randperm(len(x)).to(x.device)
            for step in range(steps):
                batch = order[step * size : (step + 1) * size]
                rate = _rate((epoch * steps + step + 0.5) / (epochs * steps))
                for group in optimizer.param_groups:
                    group["lr"] = setting["learning_rate"] * rate
                logits = logits_of(student(pixel_values=_flipped(x[batch])), labelled=False)
                if logits.shape[1] != setting["classes"]:
                    raise SoftLabelError(
                        f"The student {name!r} has other classes than the model",
                        expected=setting["classes"],
                        got=logits.shape[1],
                    )
                loss = nn.functional.cross_entropy(logits, targets[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            _save(state | {"epoch": epoch + 1, "setting": setting}, partial)
            tell(epoch + 1)
        final = self.folder / f"{name}.pt"
        _save(student.state_dict(), final)
        self.entries[name] = {**setting, "sha256": hashlib.sha256(final.read_bytes()).hexdigest()}
        self._write()
        partial.unlink(missing_ok=True)

    def answers(
        self, pixel_values: Tensor, batch_size: int = 256
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Every student's log-probabilities on probes, (n, K) each, for `Probes.with_references`.

        Raises:
            SoftLabelError: If a student is missing, or is not the one that was recorded.
        """
        found = {}
        for name, make in self.students.items():
            path = self.folder / f"{name}.pt"
            if name not in self.entries or not path.exists():
                raise SoftLabelError(f"The bank has no student {name!r}", do="call distil first")
            if hashlib.sha256(path.read_bytes()).hexdigest() != self.entries[name]["sha256"]:
                raise SoftLabelError(
                    f"The student {name!r} is not the one that was recorded",
                    do=f"restore {path}: references must be fixed before looking",
                )
            student = make()
            student.load_state_dict(_load(path))
            logits = _answers(student.to(pixel_values.device), pixel_values, batch_size)
            found[name] = logits.log_softmax(1).cpu().numpy()
        return found

    def added_to(self, probes: Probes, pixel_values: Tensor, batch_size: int = 256) -> Probes:
        """The probes with every student's answers among their references, each once.

        Law: `bank.added_to(bank.added_to(probes, x), x)` holds no more than `bank.added_to(probes,
        x)`, so that a command which was interrupted can be repeated.

        Args:
            probes: About these images.
            pixel_values: (n, C, H, W), as the students take them.
            batch_size: Images a step.

        Raises:
            SoftLabelError: As `answers`, or if the images are not as many as the probes.
        """
        answers = self.answers(pixel_values, batch_size).values()
        new = [
            one
            for one in answers
            if not any(
                one.shape == there.shape and np.allclose(one, there, atol=_SAME)
                for there in probes.references
            )
        ]
        return probes.with_references(new)

    def _read(self) -> dict[str, Any]:
        path = self.folder / "bank.json"
        if not path.exists():
            return {}
        try:
            fields = json.loads(path.read_bytes())
            if fields["format"] == BANK_FORMAT:
                return {name: dict(entry) for name, entry in fields["students"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
        raise SoftLabelError(
            f"The bank in {self.folder} is unreadable", expected=f"bank.json of {BANK_FORMAT}"
        )

    def _write(self) -> None:
        fields = {"format": BANK_FORMAT, "students": self.entries}
        temporary = self.folder / ".bank.json"
        temporary.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, self.folder / "bank.json")


def _rate(share: float) -> float:
    """The learning rate after a share of the steps: up in a line, down as a cosine."""
    if share < _WARM:
        return share / _WARM
    return 0.5 * (1.0 + math.cos(math.pi * (share - _WARM) / (1.0 - _WARM)))


def _flipped(x: Tensor) -> Tensor:
    """Half of the images mirrored."""
    mirror = torch.rand(len(x), 1, 1, 1).to(x.device) < 0.5
    return torch.where(mirror, x.flip(3), x)


@torch.no_grad()
def _answers(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Logits (n, K) float32, in eval mode."""
    training = model.training
    model.eval()
    parts = [logits_of(model(pixel_values=part), False).float() for part in _split(x, batch_size)]
    model.train(training)
    return torch.cat(parts)


def _split(x: Tensor, size: int) -> list[Tensor]:
    return [x[start : start + size] for start in range(0, len(x), size)]


def _sum(x: Tensor) -> str:
    return hashlib.sha256(image_digests(x.float().cpu().numpy()).tobytes()).hexdigest()


def _save(state: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many kinds
        raise SoftLabelError(
            f"The student in {path} cannot be read", got=type(error).__name__
        ) from None
    return state
