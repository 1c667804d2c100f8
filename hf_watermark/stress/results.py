"""What a run leaves in its folder beside stress.json: the table and the picture."""

from __future__ import annotations

from pathlib import Path

from hf_watermark.errors import WatermarkError
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.stress.outcomes import Record
from hf_watermark.stress.plot import plot
from hf_watermark.stress.table import markdown

__all__ = ["write_results"]


def write_results(record: Record, folder: Path) -> None:
    """Write stress.md and stress.png.

    Raises:
        WatermarkError: If the folder cannot be written.
    """
    try:
        (folder / "stress.md").write_text(markdown(record), encoding="utf-8")
        plot(record, folder / "stress.png")
    except OSError as error:
        raise WatermarkError(
            f"{quoted(str(folder), 200)} cannot be written",
            got=error.strerror,
            do="choose another folder with --out",
        ) from None
