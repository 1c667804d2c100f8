"""Write the figures of README.md and of the pages in docs from the files that hold them.

python benchmarks/tables.py            # rewrite them, and the pictures
python benchmarks/tables.py --check    # exit status 1 if they are not up to date
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import attack_tables
import soft_tables
import survival_tables
import uchida_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def verify_cost() -> str:
    record = json.loads((RESULTS / "verify_cost.json").read_text())
    head = ("model", "bytes read", "of the weights", "time / loading", "peak memory", "log10 p")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    names = {"tiny": "tiny ViT", "vit-b": "ViT-B/16", "vit-l": "ViT-L/16"}
    for name, found in record["results"].items():
        cells = (
            f"{names[name]}, {found['bytes_total'] / 1e6:.0f} MB",
            f"{found['bytes_read'] / 1e6:.2f} MB",
            f"{100 * found['share_read']:.2f}%",
            f"{found['wall_ratio_median']:.3f}",
            f"{found['peak_mib']:.0f} MiB",
            f"{found['log10_p']:.1f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    runs = record["settings"]["runs"]
    rows += [
        "",
        f"Whole commands, turn by turn against a loopback Hub, median of {runs} turns:",
        "`benchmarks/verify_cost.py`.",
        "Reading stops once p passes 10^-6; `--read all` reads every carrier, for a smaller p.",
    ]
    return "\n".join(rows)


def embedding() -> str:
    record = json.loads((RESULTS / "embedding.json").read_text())
    rows, settings = record["results"], record["settings"]
    head = ("host, optimizer", "accuracy without, %", "with the mark, %", "mean difference")
    head += ("BER", "log10 p after fine-tuning at 10x")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    names = {"resnet": "ResNet", "vit": "ViT", "sgd": "SGD", "adamw": "AdamW"}
    for host in settings["hosts"]:
        for optimizer in settings["optimizers"]:
            seeds = range(settings["seeds"])
            plain = [rows[f"{host}/{optimizer}/none/{seed}"] for seed in seeds]
            marked = [rows[f"{host}/{optimizer}/projection/{seed}"] for seed in seeds]
            before, after = ([100 * row["accuracy"] for row in some] for some in (plain, marked))
            cells = (
                f"{names[host]}, {names[optimizer]}",
                ", ".join(f"{value:.1f}" for value in before),
                ", ".join(f"{value:.1f}" for value in after),
                f"{(sum(after) - sum(before)) / len(after):+.2f}",
                f"{max(row['ber'] for row in marked):g}",
                f"{max(row['ft_10x_log10_p'] for row in marked):.0f} or less",
            )
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Small hosts on CIFAR-10, {settings['train']:,} images, {settings['epochs']} epochs, "
        f"{settings['seeds']} seeds, each",
        "marked run beside an unmarked twin; every figure is on 2,000 test images, whose standard",
        "error is about 1.1 points (`benchmarks/embedding.py`).",
        _more_seeds(),
    ]
    return "\n".join(lines)


def _more_seeds() -> str:
    """The row with the largest difference, run again with more seeds."""
    record = json.loads((RESULTS / "embedding_nine_seeds.json").read_text())
    rows, seeds = record["results"], range(record["settings"]["seeds"])
    gains = [
        100
        * (
            rows[f"resnet/adamw/projection/{seed}"]["accuracy"]
            - rows[f"resnet/adamw/none/{seed}"]["accuracy"]
        )
        for seed in seeds
    ]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return (
        f"With {len(gains)} seeds in place of three, ResNet under AdamW differs by "
        f"{statistics.mean(gains):+.2f} (standard\nerror {error:.2f})."
    )


EMBEDDINGS = {
    "projection": "projected step (default)",
    "hinge": "hinge, lambda .01",
    "bce": "cross entropy, lambda .01",
    "uchida": "Uchida's mean, cross entropy, lambda .01",
}
LOOKS = ("rms", "kurtosis", "top_singular", "column_means")


def embedding_choice() -> str:
    record = json.loads((RESULTS / "embedding.json").read_text())
    rows, settings = record["results"], record["settings"]
    seeds = range(settings["seeds"])
    places = [f"{h}/{o}" for h in settings["hosts"] for o in settings["optimizers"]]
    head = ("embedding", "accuracy against the twins", "BER 0", "steps to it, median (most)")
    head += ("size against the twins", "seen without the key", "BER after fine-tuning at 10x")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, title in EMBEDDINGS.items():
        pairs = [
            (rows[f"{place}/none/{seed}"], rows[f"{place}/{name}/{seed}"])
            for place in places
            for seed in seeds
        ]
        gains = [100 * (marked["accuracy"] - plain["accuracy"]) for plain, marked in pairs]
        steps = sorted(marked["steps_to_ber_0"] or math.inf for _, marked in pairs)
        sizes = [
            new["rms"] / old["rms"]
            for plain, marked in pairs
            for old, new in zip(plain["looks"], marked["looks"], strict=True)
        ]
        seen = {look: _roc_area(rows, places, name, seeds, look) for look in LOOKS}
        told = max(seen, key=lambda look: abs(seen[look] - 0.5))
        cells = (
            title,
            f"{statistics.mean(gains):+.2f} ({min(gains):+.1f} to {max(gains):+.1f})",
            f"{sum(marked['ber'] == 0.0 for _, marked in pairs)} of {len(pairs)}",
            " ".join(_steps(value) for value in (steps[len(steps) // 2], steps[-1])),
            f"{statistics.median(sizes):.2f}",
            f"{seen[told]:.2f} ({told.replace('_', ' ')})",
            f"{max(marked['ft_10x_ber'] for _, marked in pairs):.2f} or less",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The same hosts, optimizers and seeds. Accuracies in points: the mean over all cells and",
        "its range. Seen without the key: the area under the ROC curve by which the most telling",
        "of four looks at the carriers (size, kurtosis, top singular value, column means) tells",
        "marked ones from their twins; 0.5 is not at all.",
    ]
    return "\n".join(lines)


def _steps(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:g}"


def _roc_area(rows: Any, places: list[str], name: str, seeds: range, look: str) -> float:
    """How often a marked carrier looks larger than its unmarked twins of all seeds."""
    wins = []
    for place in places:
        plain = [rows[f"{place}/none/{seed}"]["looks"] for seed in seeds]
        marked = [rows[f"{place}/{name}/{seed}"]["looks"] for seed in seeds]
        for carrier in range(len(plain[0])):
            for one in marked:
                for other in plain:
                    a, b = one[carrier][look], other[carrier][look]
                    wins.append(0.5 if a == b else float(a > b))
    return statistics.mean(wins)


def overhead() -> str:
    record = json.loads((RESULTS / "overhead.json").read_text())
    found, settings = record["results"], record["settings"]
    names = {"vit-ti": "ViT-Ti", "vit-s": "ViT-S", "vit-b": "ViT-B"}
    share = 100 * found["kept_bytes"] / found["model_bytes"]
    return (
        f"A training step of a {names[settings['model']]} at batch {settings['batch']} takes "
        f"{found['median_step_ratio']:.3f} times as long with the mark (median of\n"
        f"{settings['steps']} pairs, turn by turn on a {settings['device'].upper()}; "
        f"{found['ratio_of_sums']:.3f} in the sum, with the projections\nof every tenth step), and "
        f"what the mark keeps is {share:.1f}% of the model's size (`benchmarks/overhead.py`)."
    )


def architectures() -> str:
    record = json.loads((RESULTS / "architectures.json").read_text())
    classifiers, heads = record["summary"]["classifiers"], record["summary"]["heads"]
    skipped = ", ".join(classifiers["skipped"])
    return (
        f"{classifiers['good']} of the {classifiers['architectures']} image classifiers of "
        f"transformers {record['settings']['transformers']} (not built here, for want of their\n"
        f"packages: {skipped}) and {heads['good']} of {heads['architectures']} models with other "
        "heads (detection, segmentation, vision and text):\nbuilt small, marked in training and on "
        "disk, found with the key alone, loaded with plain\n`from_pretrained`: "
        "[every one of them](docs/architectures.md)."
    )


def tracing() -> str:
    record = json.loads((RESULTS / "tracing.json").read_text())
    right, wrong = record["results"]["right_one"], record["results"]["wrong_ones"]
    settings = record["settings"]
    recipients, trials = f"{settings['recipients']:,}", settings["trials"]
    head = ("copy", "named", "log10 p of the best name", "bytes read", "processor time")
    chances = wrong["corrected_log10_p_all"]
    share = right["bytes_read"] / right["bytes_total"]
    rows = (
        (
            f"a ViT-B/16 of one of {recipients} recipients",
            "the right one" if right["named"] == right["handed_to"] else "**a wrong one**",
            f"{right['log10_p']:.1f}",
            f"{right['bytes_read'] / 1e6:.2f} MB, {100 * share:.1f}%",
            f"{right['processor_seconds_median']:.1f} s",
        ),
        (
            f"{trials} copies that none of {recipients} was handed",
            f"nobody in {trials - wrong['false_names']} of {trials}",
            f"{min(chances):.1f} to {max(chances):.1f}",
            "all carriers",
            f"{wrong['processor_seconds_median']:.1f} s each",
        ),
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    lines += [
        "",
        "All recipients and looks are counted in log10 p. The copies that nobody was handed are",
        "small (two layers of a ViT-S), half with the owner's mark (`benchmarks/tracing.py`).",
    ]
    return "\n".join(lines)


def transcript(name: str) -> str:
    text = (RESULTS / f"{name}.txt").read_text().rstrip()
    return f"```text\n{text}\n```"


PAGES = ("README.md", "docs/softlabels.md", "docs/survival.md", "docs/uchida.md")
SECTIONS = {
    "demo": lambda: transcript("demo"),
    "verify": lambda: transcript("verify"),
    "embedding": embedding,
    "embedding_choice": embedding_choice,
    "overhead": overhead,
    "architectures": architectures,
    **attack_tables.SECTIONS,
    "verify_cost": verify_cost,
    "tracing": tracing,
    **survival_tables.SECTIONS,
    **soft_tables.SECTIONS,
    **uchida_tables.SECTIONS,
}
_MARKED = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", re.DOTALL)


def updated(page: str) -> str:
    """A page with what lies between its markers written anew."""

    def fresh(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- {name}:begin -->\n{SECTIONS[name]()}\n<!-- {name}:end -->"

    return _MARKED.sub(fresh, page)


def main() -> None:
    old = {name: (ROOT / name).read_text() for name in PAGES}
    shown = {name for page in old.values() for name in _MARKED.findall(page)}
    if shown != set(SECTIONS):
        raise SystemExit(f"on no page, or unknown: {', '.join(sorted(shown ^ set(SECTIONS)))}")
    new = {name: updated(page) for name, page in old.items()}
    if "--check" in sys.argv:
        sys.exit(int(old != new))
    for name, page in new.items():
        (ROOT / name).write_text(page)
    survival_tables.pictures(ROOT / "docs")
    soft_tables.pictures(ROOT / "docs")
    uchida_tables.pictures(ROOT / "docs")


if __name__ == "__main__":
    main()
