"""What came of an attack: one row of the table, and all rows of a run with their settings."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_watermark.errors import WatermarkError
from hf_watermark.safetensors_ranges import quoted

__all__ = ["FORMAT", "MOST_LOST", "Outcome", "Record", "was_removed"]

FORMAT = "hf-watermark-stress/1"
MOST_LOST = 0.05  # accuracy that an attack may cost and still count: Lukas et al., S&P 2022
_FILE = "stress.json"


@dataclass(frozen=True)
class Outcome:
    """One attack on one model.

    Attributes:
        name: The attack's.
        family: The attack's.
        source: The attack's.
        parameters: The attack's.
        status: `read`; `unreadable`, where the verifier refused the attacked weights; `not
            applicable`; or `failed`, where the attack itself went wrong.
        accuracy: On the held-out part, 0 to 1, after the attack.
        lost: Accuracy lost, 0 to 1; negative if it rose.
        ber: Bit error rate, 0 to 1.
        log10_p: Corrected for all tries.
        tries: How many readings the verifier allowed for.
        reading: The reading that decided: raw, renamed, aligned.
        found: Whether the mark was found at the run's alpha.
        raw_log10_p: The same without alignment, where the attack keeps the function; None if no
            tensor has a carrier's shape.
        removed: Not found, while accuracy fell by less than 5 points.
        seconds: Of the attack, not of measuring it.
        note: Why there is no figure, or what the verifier remarked.
    """

    name: str
    family: str
    source: str
    parameters: Mapping[str, Any]
    status: str
    accuracy: float | None = None
    lost: float | None = None
    ber: float | None = None
    log10_p: float | None = None
    tries: int | None = None
    reading: str | None = None
    found: bool | None = None
    raw_log10_p: float | None = None
    removed: bool = False
    seconds: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"parameters": dict(self.parameters)}


def was_removed(found: bool, lost: float) -> bool:
    """The criterion of Lukas et al.: the mark is gone and the model is worth having."""
    return not found and lost < MOST_LOST


@dataclass
class Record:
    """A run as it stands, on disk after every cell.

    Attributes:
        settings: Everything that the figures depend on; a run with others is another run.
        before: The victim, unattacked.
        outcomes: By the attack's name.
    """

    settings: Mapping[str, Any]
    before: Mapping[str, Any]
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def removed(self) -> tuple[str, ...]:
        """The attacks that removed the mark."""
        return tuple(name for name, outcome in self.outcomes.items() if outcome.removed)

    @property
    def failed(self) -> tuple[str, ...]:
        """The attacks of which nothing is known."""
        return tuple(n for n, outcome in self.outcomes.items() if outcome.status == "failed")

    def of(self, names: tuple[str, ...]) -> Record:
        """The same run with these attacks alone, in this order."""
        kept = {name: self.outcomes[name] for name in names if name in self.outcomes}
        return Record(self.settings, self.before, kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "before": dict(self.before),
            "results": {name: outcome.to_dict() for name, outcome in self.outcomes.items()},
            "removed_by": list(self.removed),
        }

    def save(self, folder: Path) -> None:
        """Write stress.json, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        try:
            temporary = folder / f".{_FILE}"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, folder / _FILE)
        except OSError as error:
            raise _unwritable(folder, error) from None

    @classmethod
    def resumed(cls, folder: Path, settings: Mapping[str, Any]) -> Record | None:
        """What an earlier run of the same settings left in a folder, if one did.

        Cells that failed are run again.

        Raises:
            WatermarkError: If another run's results are there, or nothing can be written.
        """
        path = folder / _FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                return None
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError("another format")
            outcomes = {name: Outcome(**row) for name, row in content["results"].items()}
            record = cls(content["settings"], content["before"], outcomes)
        except OSError as error:
            raise _unwritable(folder, error) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WatermarkError(
                f"{quoted(str(path), 200)} is not what a stress run writes",
                expected=FORMAT,
                do="choose another folder with --out",
            ) from None
        wanted = json.loads(json.dumps(dict(settings)))
        odd = [name for name in wanted if record.settings.get(name) != wanted[name]]
        if odd or set(record.settings) != set(wanted):
            first = odd[0] if odd else "settings"
            raise WatermarkError(
                f"{quoted(str(folder), 200)} holds the results of another run",
                expected=f"{first} {wanted.get(first)}",
                got=f"{record.settings.get(first)}",
                do="choose another folder with --out, or the settings of that run",
            )
        done = {name: o for name, o in record.outcomes.items() if o.status != "failed"}
        return cls(record.settings, record.before, done)


def _unwritable(folder: Path, error: OSError) -> WatermarkError:
    return WatermarkError(
        f"{quoted(str(folder), 200)} cannot be written",
        got=error.strerror,
        do="choose another folder with --out",
    )
