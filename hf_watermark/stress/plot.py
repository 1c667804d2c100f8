"""The outcomes of a run as a picture: accuracy lost against log10 p."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hf_watermark.errors import WatermarkError
from hf_watermark.stress.outcomes import MOST_LOST, Outcome, Record

__all__ = ["check_matplotlib", "plot"]

_MARKERS = {
    "pruning": ("o", "tab:blue"),
    "quantization": ("s", "tab:cyan"),
    "fine-tuning": ("^", "tab:green"),
    "erasure": ("D", "tab:purple"),
    "overwriting": ("v", "tab:orange"),
    "merging": ("P", "tab:brown"),
    "disguises": ("X", "tab:pink"),
}
_WIDTH, _HEIGHT = 11.0, 5.0
_LINE = 0.155  # inches that a label takes
_LABELS = 1.02  # where they begin, in widths of the axes


def check_matplotlib() -> None:
    """Say it now rather than after an hour.

    Raises:
        WatermarkError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise WatermarkError(
            "The picture needs one more package",
            got="no matplotlib",
            do="pip install hf-watermark[stress]",
        ) from None


def plot(record: Record, path: Path) -> None:
    """Write the picture: one point an attack; the mark is removed in the shaded corner.

    Names stand in a column beside it, in the order of the points, so that none covers another.

    Args:
        record: The run.
        path: A `.png`, or whatever else matplotlib writes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    alpha = -math.log10(record.settings["alpha"])
    points = [_Point.of(outcome) for outcome in record.outcomes.values() if _is_shown(outcome)]
    points.sort(key=lambda point: (-point.y, point.x))
    figure = Figure(figsize=(_WIDTH, max(_HEIGHT, _LINE * len(points) + 1.6)))
    FigureCanvasAgg(figure)
    inch = 1.0 / figure.get_figheight()
    axes = figure.add_axes((0.07, 0.9 * inch, 0.7, 1.0 - 1.3 * inch))
    removed, before = 100 * MOST_LOST, _strength(record.before["log10_p"])
    left = min([-removed, *(point.x for point in points)]) * 1.3
    right = max([2 * removed, *(point.x for point in points)]) * 1.3
    top = max([2 * alpha, before, *(point.y for point in points)]) * 1.5
    axes.set_xscale("symlog", linthresh=removed, linscale=1.5)
    axes.set_yscale("symlog", linthresh=alpha, linscale=0.6)
    axes.set_xlim(left, right)
    axes.set_ylim(-0.5, top)
    axes.set_xticks([t for t in (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50) if left < t < right])
    axes.set_yticks([t for t in (0, 2, 4, 6, 10, 20, 50, 100, 200, 500, 1000) if t < top])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())
    axes.fill_between([left, removed], -0.5, alpha, color="tab:red", alpha=0.12, lw=0)
    axes.text(
        0.01,
        0.015,
        "removed: not found, and worth having",
        color="tab:red",
        fontsize=9,
        transform=axes.transAxes,
    )
    axes.axhline(alpha, color="0.4", lw=0.8, ls="--")
    axes.axvline(removed, color="0.4", lw=0.8, ls="--")
    axes.axhline(before, color="0.6", lw=0.8, ls=":")
    for place, point in enumerate(points):
        marker, colour = _MARKERS[point.family]
        axes.scatter(point.x, point.y, marker=marker, c=colour, s=45, zorder=3)
        axes.annotate(
            point.name,
            (point.x, point.y),
            xytext=(_LABELS, 1.0 - (place + 0.5) / len(points)),
            textcoords="axes fraction",
            fontsize=8.5,
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.35,
                "lw": 0.6,
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
    for family in dict.fromkeys(point.family for point in points):
        marker, colour = _MARKERS[family]
        axes.scatter([], [], marker=marker, c=colour, s=45, label=family)
    axes.set_xlabel("accuracy lost, points (dashed: the limit)")
    axes.set_ylabel("-log10 p (dashed: the limit; dotted: before)")
    kind = record.settings["model_type"]
    axes.set_title(f"What survives of a mark in a {kind}: {len(points)} attacks", fontsize=11)
    if points:
        figure.legend(loc="lower left", fontsize=8, frameon=False, ncols=len(_MARKERS))
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class _Point:
    """An attack in the picture."""

    name: str
    family: str
    x: float
    y: float

    @classmethod
    def of(cls, outcome: Outcome) -> _Point:
        """Weights that nothing could be read from stand where nothing was found."""
        name = outcome.name
        if outcome.log10_p is None:
            name += " (unreadable)"
        return cls(
            name, outcome.family, 100 * (outcome.lost or 0.0), _strength(outcome.log10_p or 0.0)
        )


def _is_shown(outcome: Outcome) -> bool:
    return outcome.status in ("read", "unreadable") and outcome.lost is not None


def _strength(log10_p: float) -> float:
    return min(max(-log10_p, 0.0), 1e6)
