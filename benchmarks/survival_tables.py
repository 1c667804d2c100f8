"""Tables and pictures of what survives, from the file that `survival.py` writes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from page_parts import load, paragraph, rounded_up, table

HOSTS = {
    "resnet": "ResNet",
    "resnet18": "ResNet-18",
    "vit": "ViT",
    "wrn-10-4": "WRN-10-4",
}
SCHEMES = {
    "uchida": "Uchida's mean",
    "loss": "spread, by loss",
    "projection": "spread, projected step, no seal",
    "sealed": "spread, projected step, sealed",
    "closed form": "spread, closed form",
}
_COLOURS = ("tab:red", "tab:olive", "tab:cyan", "tab:blue", "tab:green")
# Of what every scheme survived, what people ask about.
_ASKED = ("prune-80", "int4", "fine-tune-10x", "svd-half", "overwrite-10x", "average-sibling")
_JUDGED = ("read", "unreadable")
_KEY = (
    "Each figure is the worst log10 p, corrected for all tries: the mark counts as found at "
    "{alpha:g} or less. † k/n: removed in k of n runs, that is not found while accuracy fell by "
    "less than five points. ‡ k/n: not found, with the accuracy gone too. Points lost: smallest "
    "to largest over all runs of the row, negative where accuracy rose. Aligned: the disguise was "
    "undone before reading. What is empty was not run."
)


@dataclass(frozen=True)
class Grid:
    """A record by host, scheme and seed.

    Attributes:
        record: As it was written.
        runs: (host, scheme, seed) to what is known of it.
    """

    record: dict[str, Any]
    runs: dict[tuple[str, str, int], dict[str, Any]]

    @classmethod
    def of(cls, record: dict[str, Any]) -> Grid:
        """By the labels of a record's results."""
        parts = {label: label.split("/") for label in record["results"]}
        runs = {(h, s, int(n)): record["results"][label] for label, (h, s, n) in parts.items()}
        return cls(record, runs)

    @property
    def hosts(self) -> list[str]:
        """Those that there are."""
        return [name for name in HOSTS if any(host == name for host, _, _ in self.runs)]

    @property
    def schemes(self) -> list[str]:
        """Those that there are."""
        return [name for name in SCHEMES if any(one == name for _, one, _ in self.runs)]

    def models(self, scheme: str, hosts: Iterable[str]) -> list[dict[str, Any]]:
        """All marked models of a scheme."""
        hosts = list(hosts)
        return [row for (h, s, _), row in self.runs.items() if s == scheme and h in hosts]

    def cells(self, attack: str, scheme: str, hosts: Iterable[str]) -> list[dict[str, Any]]:
        """What came of an attack on all models of a scheme, where it could be judged."""
        found = [row["cells"].get(attack) for row in self.models(scheme, hosts)]
        return [row for row in found if row is not None and row["status"] in _JUDGED]

    def attacks(self, hosts: Iterable[str]) -> list[str]:
        """Those that could be judged anywhere."""
        hosts = list(hosts)
        names = self.record["attacks"]
        return [n for n in names if any(self.cells(n, s, hosts) for s in self.schemes)]

    def skipped(self, host: str) -> list[str]:
        """The attacks that a host has nothing for."""
        cells = [row["cells"] for (h, _, _), row in self.runs.items() if h == host]
        return [
            name
            for name in self.record["attacks"]
            if any(found.get(name, {}).get("status") == "not applicable" for found in cells)
        ]

    def failures(
        self, scheme: str, hosts: Iterable[str], *, removed: bool
    ) -> dict[str, tuple[int, int]]:
        """The attacks after which a scheme's mark was not found: in how many of how many runs.

        Args:
            scheme: Whose.
            hosts: On these.
            removed: Those that left the accuracy, or those that took it too.
        """
        hosts = list(hosts)
        counts = {}
        for name in self.attacks(hosts):
            cells = self.cells(name, scheme, hosts)
            failed = sum(not cell["found"] and cell["removed"] is removed for cell in cells)
            if failed:
                counts[name] = (failed, len(cells))
        return counts


# Tables -------------------------------------------------------------------------------------------


def before() -> str:
    return _before(Grid.of(load("survival")))


def survival() -> str:
    return _survival(Grid.of(load("survival")))


def survival_short() -> str:
    return _short(Grid.of(load("survival")))


def survival_wrn() -> str:
    grid = Grid.of(load("survival_wrn"))
    rates = {
        name: max(cell["ber"] for cell in grid.cells(name, "uchida", grid.hosts))
        for name in ("prune-65", "prune-80", "prune-95")
    }
    text = "Bit error rates of Uchida's mean after pruning, largest of the runs: "
    text += ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())
    return f"{_before(grid)}\n\n{_survival(grid)}\n\n{paragraph(text + '.')}"


SECTIONS = {
    "survival_before": before,
    "survival": survival,
    "survival_short": survival_short,
    "survival_wrn": survival_wrn,
}


def _before(grid: Grid) -> str:
    head = ("host", "scheme", "runs", "accuracy, %", "unmarked twins, %", "BER", "log10 p")
    head += ("of the twins",)
    rows = []
    for host in grid.hosts:
        for scheme in grid.schemes:
            models = grid.models(scheme, [host])
            if models:
                cells = (
                    HOSTS[host],
                    SCHEMES[scheme],
                    f"{len(models)}",
                    ", ".join(f"{100 * one['accuracy']:.1f}" for one in models),
                    ", ".join(f"{100 * one['accuracy_unmarked']:.1f}" for one in models),
                    f"{max(one['ber'] for one in models):g}",
                    f"{rounded_up(max(one['log10_p'] for one in models))}",
                    f"{rounded_up(min(one['twin_log10_p'] for one in models))}",
                )
                rows.append(cells)
    said = grid.record["settings"]
    text = paragraph(
        f"CIFAR-10{_size(said)}: every host learns {said['train']:,} images for {said['epochs']} "
        "epochs (AdamW, one cycle), its twin the same in the same order. Accuracy is that on "
        f"{said['test_images']:,} other images; its standard error is about "
        f"{100 * (0.24 / said['test_images']) ** 0.5:.1f} points. BER and log10 p are the worst of "
        "the runs, those of the twins, read with the same key and claim, the least that chance "
        "gave.",
    )
    return f"{table(head, rows)}\n\n{text}"


def _survival(grid: Grid) -> str:
    parts = []
    for host in grid.hosts:
        schemes = [scheme for scheme in grid.schemes if grid.models(scheme, [host])]
        counts = ", ".join(
            f"{len(grid.models(scheme, [host]))} of {SCHEMES[scheme]}" for scheme in schemes
        )
        rows = [_row(grid, name, schemes, [host]) for name in grid.attacks([host])]
        head = ("attack", "points lost", *(SCHEMES[scheme] for scheme in schemes))
        notes = [f"Models: {counts}."]
        skipped = grid.skipped(host)
        if skipped:
            notes.append(f"Not applicable to this host: {', '.join(skipped)}.")
        listed = [_failures(grid, scheme, [host]) for scheme in schemes]
        parts += [f"### {HOSTS[host]}", table(head, rows), paragraph(*notes), "\n".join(listed)]
    return "\n\n".join([paragraph(_conditions(grid), _key(grid)), *parts])


def _short(grid: Grid) -> str:
    hosts, schemes = grid.hosts, grid.schemes
    names = [
        name
        for name in grid.attacks(hosts)
        if name in _ASKED
        or any(not cell["found"] for s in schemes for cell in grid.cells(name, s, hosts))
    ]
    head = ("attack", "points lost", *(SCHEMES[scheme] for scheme in schemes))
    rows = [_row(grid, name, schemes, hosts) for name in names]
    stood = len(grid.attacks(hosts)) - len(names)
    notes = [
        _conditions(grid),
        _key(grid),
        f"Left out here are {stood} attacks that every scheme stood in every run "
        "([all of them](docs/survival.md)).",
    ]
    return "\n\n".join(
        [
            table(head, rows),
            paragraph(*notes),
            "\n".join(_failures(grid, scheme, hosts) for scheme in schemes),
        ]
    )


def _row(grid: Grid, name: str, schemes: list[str], hosts: list[str]) -> list[str]:
    columns = [grid.cells(name, scheme, hosts) for scheme in schemes]
    lost = [100 * cell["lost"] for cells in columns for cell in cells]
    ends = list(dict.fromkeys(f"{value:+.1f}" for value in (min(lost) + 0, max(lost) + 0)))
    return [name, " to ".join(ends), *(_cell(cells) for cells in columns)]


def _cell(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return ""
    unreadable = any(cell["log10_p"] is None for cell in cells)
    text = "unreadable" if unreadable else rounded_up(max(cell["log10_p"] for cell in cells))
    if any(str(cell["reading"]).startswith("aligned") and cell["found"] for cell in cells):
        text += ", aligned"
    for sign, count in (
        ("†", sum(cell["removed"] for cell in cells)),
        ("‡", sum(not cell["found"] and not cell["removed"] for cell in cells)),
    ):
        if count:
            text += f" {sign} {count}/{len(cells)}"
    return text


def _conditions(grid: Grid) -> str:
    said = grid.record["settings"]
    counts = []
    for host in grid.hosts:
        runs = {len(grid.models(scheme, [host])) for scheme in grid.schemes}
        counts.append(f"{HOSTS[host]} {' to '.join(str(count) for count in sorted(runs))}")
    rates = ", ".join(
        f"{said['attackers_1x'] * said['peaks'][host]:g} for the {HOSTS[host]}"
        for host in grid.hosts
    )
    return (
        f"Small hosts trained on {said['train']:,} images of CIFAR-10{_size(said)}, runs of every "
        f"scheme, each with its own seed and key: {', '.join(counts)}. The attacker has "
        f"{said['attackers_images']:,} images that no host was trained on, fine-tunes for "
        f"{said['attack_epochs']} epochs of AdamW at {rates} (1x, a tenth of the owner's peak) or "
        f"ten times that; accuracy is that on {said['test_images']:,} others "
        "(`benchmarks/survival.py`)."
    )


def _size(said: dict[str, Any]) -> str:
    return "" if said["size"] == 32 else f" at {said['size']} pixels"


def _key(grid: Grid) -> str:
    return _KEY.format(alpha=grid.record["settings"]["alpha"])


def _failures(grid: Grid, scheme: str, hosts: list[str]) -> str:
    """Everything that took a scheme's mark away, as an item of a list."""
    names = []
    for removed in (True, False):
        failures = grid.failures(scheme, hosts, removed=removed).items()
        told = (name if k == n else f"{name} ({k} of {n} runs)" for name, (k, n) in failures)
        names.append(", ".join(told))
    text = f"- {SCHEMES[scheme]}: removed by {names[0] or 'nothing'}"
    text += f"; lost with the accuracy to {names[1]}." if names[1] else "."
    absent = sum(not model["found"] for model in grid.models(scheme, hosts))
    if absent:
        text += f" Not there before any attack in {absent} runs, which are left out."
    return textwrap.fill(text, 98, subsequent_indent="  ", break_on_hyphens=False)


# A page and a picture -----------------------------------------------------------------------------


def write_page(record: dict[str, Any], folder: Path) -> None:
    """The tables of any record, and its picture."""
    grid = Grid.of(record)
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# What survives\n\n{_before(grid)}\n\n![](survival.png)\n\n{_survival(grid)}\n"
    (folder / "survival.md").write_text(text)
    _picture(grid, folder / "survival.png")


def pictures(folder: Path) -> None:
    """Every run of every attack: how far the mark's p-value lies from chance."""
    record, wrn = load("survival"), load("survival_wrn")
    results = {**record["results"], **wrn["results"]}
    _picture(Grid.of({**record, "results": results}), folder / "survival.png")


def _picture(grid: Grid, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    alpha = -math.log10(grid.record["settings"]["alpha"])
    names = grid.attacks(grid.hosts)
    figure = Figure(figsize=(2.2 + 4.4 * len(grid.hosts), 2.0 + 0.29 * len(names)))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(grid.hosts), sharey=True, squeeze=False)[0]
    strongest = max(
        (-cell["log10_p"] for row in grid.runs.values() for cell in row["cells"].values()
         if cell["log10_p"] is not None), default=alpha,
    )  # fmt: skip
    for host, axes in zip(grid.hosts, panels, strict=True):
        axes.set_xscale("symlog", linthresh=alpha, linscale=0.8)
        axes.set_xlim(-0.5, 2.0 * max(strongest, 2 * alpha))
        axes.axvspan(-0.5, alpha, color="tab:red", alpha=0.08, lw=0)
        axes.axvline(alpha, color="0.4", lw=0.8, ls="--")
        for place, name in enumerate(names):
            if place % 2:
                axes.axhspan(place - 0.5, place + 0.5, color="0.5", alpha=0.07, lw=0)
            for number, scheme in enumerate(grid.schemes):
                colour = _COLOURS[list(SCHEMES).index(scheme)]
                height = place + 0.7 * ((number + 0.5) / len(grid.schemes) - 0.5)
                for cell in grid.cells(name, scheme, [host]):
                    worth = cell["lost"] < 0.05
                    axes.scatter(
                        max(-(cell["log10_p"] or 0.0), 0.0),
                        height,
                        s=24,
                        marker="X" if cell["removed"] else "o",
                        facecolors=colour if worth else "none",
                        edgecolors=colour,
                        linewidths=0.9,
                        alpha=0.85,
                        zorder=3,
                    )
        ticks = [t for t in (0, 2, 4, 6, 20, 100, 500, 2000, 10_000) if t < 2 * strongest]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("-log10 p (dashed: the limit)")
        runs = max(len(grid.models(scheme, [host])) for scheme in grid.schemes)
        axes.set_title(f"{HOSTS[host]}, {runs} run{'s' if runs > 1 else ''} of each", fontsize=11)
    handles = [
        Line2D([], [], ls="", marker="o", color=_COLOURS[list(SCHEMES).index(s)], label=SCHEMES[s])
        for s in grid.schemes
    ]
    handles += [
        Line2D([], [], ls="", marker="X", color="0.3", label="removed"),
        Line2D([], [], ls="", marker="o", color="0.3", markerfacecolor="none",
               label="five points of accuracy lost, or more"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
