"""Write the figures of README.md from the files that hold them.

python benchmarks/tables.py            # rewrite README.md
python benchmarks/tables.py --check    # exit status 1 if it is not up to date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

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
    ]
    return "\n".join(lines)


def architectures() -> str:
    record = json.loads((RESULTS / "architectures.json").read_text())
    classifiers, heads = record["summary"]["classifiers"], record["summary"]["heads"]
    skipped = ", ".join(classifiers["skipped"])
    return (
        f"{classifiers['good']} of the {classifiers['architectures']} image classifiers of "
        f"transformers {record['settings']['transformers']} (not built here, for want of their\n"
        f"packages: {skipped}) and {heads['good']} of {heads['architectures']} models with other "
        "heads (detection, segmentation, vision and text):\nbuilt small, marked in training and on "
        "disk, found with the key alone, loaded with plain\n`from_pretrained` "
        "(`benchmarks/architectures.py`)."
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


SECTIONS = {
    "demo": lambda: transcript("demo"),
    "verify": lambda: transcript("verify"),
    "embedding": embedding,
    "architectures": architectures,
    "verify_cost": verify_cost,
    "tracing": tracing,
}


def updated(readme: str) -> str:
    for name, render in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(readme)) != 1:
            raise SystemExit(f"README.md must hold {begin} ... {end} once")
        readme = pattern.sub(lambda _, r=render, b=begin, e=end: f"{b}\n{r()}\n{e}", readme)
    return readme


def main() -> None:
    path = ROOT / "README.md"
    old = path.read_text()
    new = updated(old)
    if "--check" in sys.argv:
        sys.exit(int(old != new))
    path.write_text(new)


if __name__ == "__main__":
    main()
