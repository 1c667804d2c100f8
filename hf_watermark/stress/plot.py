"""The outcomes of a run as a picture: accuracy lost against log10 p."""

from __future__ import annotations

import math
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
_SIZE = (10.0, 6.5)
_GAP = 0.026  # of the height, between labels


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

    Args:
        record: The run.
        path: A `.png`, or whatever else matplotlib writes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    alpha = -math.log10(record.settings["alpha"])
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    read = [o for o in record.outcomes.values() if o.log10_p is not None and o.lost is not None]
    points = [(100 * (o.lost or 0.0), _height(o), o) for o in read]
    left = min([-2.0, *(x for x, _, _ in points)]) - 1.0
    right = max([10.0, *(x for x, _, _ in points)]) * 1.25
    top = max([2 * alpha, _strength(record.before["log10_p"]), *(y for _, y, _ in points)]) * 1.6
    axes.set_yscale("symlog", linthresh=alpha, linscale=0.6)
    axes.set_xlim(left, right)
    axes.set_ylim(-0.4, top)
    removed = 100 * MOST_LOST
    axes.fill_between([left, removed], -0.4, alpha, color="tab:red", alpha=0.12, lw=0)
    axes.text(left + 0.15, 0.2, "removed", color="tab:red", fontsize=9)
    axes.axhline(alpha, color="0.4", lw=0.8, ls="--")
    axes.axvline(removed, color="0.4", lw=0.8, ls="--")
    axes.axhline(_strength(record.before["log10_p"]), color="0.7", lw=0.8, ls=":")
    for family, (marker, colour) in _MARKERS.items():
        chosen = [(x, y) for x, y, o in points if o.family == family]
        if chosen:
            xs, ys = ([point[i] for point in chosen] for i in (0, 1))
            axes.scatter(xs, ys, marker=marker, c=colour, s=42, label=family)
    figure.draw_without_rendering()
    to_share = axes.transAxes.inverted().transform
    placed = [(*to_share(axes.transData.transform((x, y))), x, y, o) for x, y, o in points]
    for (share, height), (x, y, outcome) in _spread(placed):
        axes.annotate(
            outcome.name,
            (x, y),
            xytext=(share, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.75", "lw": 0.6, "shrinkB": 4},
        )
    axes.set_xlabel("accuracy lost, points")
    axes.set_ylabel("-log10 p, corrected (more is surer)")
    axes.set_title(
        f"What survives: {len(read)} attacks on a {record.settings['model_type']}; "
        f"dashed: p = {record.settings['alpha']:g} and {removed:g} points; "
        "dotted: before",
        fontsize=10,
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=7, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _strength(log10_p: float) -> float:
    return min(max(-log10_p, 0.0), 1e6)


def _height(outcome: Outcome) -> float:
    return _strength(outcome.log10_p or 0.0)


Placed = tuple[float, float, float, float, Outcome]


def _spread(
    placed: list[Placed],
) -> list[tuple[tuple[float, float], tuple[float, float, Outcome]]]:
    """A place for each label, to the right of its point and clear of the other labels."""
    taken: list[tuple[float, float, float]] = []
    found = []
    for share, height, x, y, outcome in sorted(placed, key=lambda one: (-one[1], one[0])):
        width = 0.0085 * len(outcome.name) + 0.01
        free = _free_place(share, height, width, taken)
        taken.append((*free, width))
        found.append((free, (x, y, outcome)))
    return found


def _free_place(
    share: float, height: float, width: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float]:
    for step in range(60):
        for column in (0.015, 0.06, 0.12, 0.2, 0.3):
            for side in (1, -1):
                place = (share + column, height + side * step * _GAP / 2)
                inside = 0.01 < place[1] < 0.99 and place[0] + width < 1.0
                if inside and all(
                    abs(place[1] - y) >= _GAP or place[0] > x + w or x > place[0] + width
                    for x, y, w in taken
                ):
                    return place
    return share + 0.015, height
