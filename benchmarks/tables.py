"""Write the figures of README.md from the files that hold them.

python benchmarks/tables.py            # rewrite README.md
python benchmarks/tables.py --check    # exit status 1 if it is not up to date
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

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


def served() -> str:
    record = json.loads((RESULTS / "served.json").read_text())
    settings, rows = record["settings"], record["results"]["flips"]
    head = ("classes", "answers", "other top class", "margin mode: swapped")
    head += ("not between the top two, or not closer than tau",)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for classes in ("2", "10", "100", "1000"):
        soft, firm = (
            [row for name, row in rows.items() if _is_cell(name, mode, classes)]
            for mode in ("soft", "margin")
        )
        shares = [100 * row["flips"] / row["inputs"] for row in firm]
        cells = (
            f"{int(classes):,}",
            f"{sum(row['inputs'] for row in soft):,}",
            f"{sum(row['flips'] for row in soft)}",
            f"{min(shares):.1f} to {max(shares):.1f}%",
            f"{sum(row['beyond_the_top_two'] + row['beyond_tau'] for row in firm)}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    strength, limit = settings["margin"]
    cost = record["results"]["cost"]
    shares = [100 * row["added_share"] for row in cost.values()]
    ratios = [row["median_forward_ratio"] for row in cost.values() if "ratios" in row]
    classes = " and ".join(f"{count:,}" for count in sorted({int(k.split("/")[0]) for k in cost}))
    lines += [
        "",
        f"A small ViT and a small ResNet with random weights on {settings['inputs']:,} images of "
        "CIFAR-10, features H\nand M, float32 and bfloat16. Random weights are unsure, so margin "
        f"mode (lambda {strength:g}, tau {limit:g})\nswaps more than on a trained model.",
        f"For a ViT-B at batch {settings['batch']} serving adds {min(shares):.2f} to "
        f"{max(shares):.2f}% to the forward pass (H and M, {classes} classes;\n"
        "timed alone, in processor time on one thread); whole passes, turn by turn, take "
        f"{' and '.join(f'{ratio:.3f}' for ratio in ratios)}\n"
        f"times as long (median of {settings['pairs']} pairs, `benchmarks/served.py`).",
    ]
    return "\n".join(lines)


def _is_cell(name: str, mode: str, classes: str) -> bool:
    parts = name.split("/")
    return parts[0] == mode and parts[2] == classes


def usp() -> str:
    record = json.loads((RESULTS / "usp.json").read_text())
    settings, keys = record["settings"], record["results"]["keys"]
    head = ("answers at", "paired test", "taken for marked: clean", "independent")
    head += ("clean student", "log10 p of 10 answers", "trained network")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for decimals in ("full", "6", "4", "3", "2"):
        rows = [key["paired"][decimals] for key in keys]
        nets = [key["network"]["single"][decimals] for key in keys]
        false = [
            max(row["false_positives"][name] for row in rows)
            for name in ("clean", "independent", "clean student")
        ]
        cells = (
            "full precision" if decimals == "full" else f"{decimals} decimals",
            f"{100 * min(row['balanced_accuracy'] for row in rows):.2f}%",
            *(f"{100 * share:.2f}%" for share in false),
            f"{max(row['log10_p_of_sets']['10'] for row in rows):.1f}",
            f"{100 * min(row['balanced_accuracy'] for row in nets):.2f}%",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lost = max(key["task_accuracy_lost_points"] for key in keys)
    paper = record["paper"]
    warm = [key["network"]["single"]["temperature 2"] for key in keys]
    null = [one for key in keys for one in key["network"]["sets"].values()]
    student = [
        key["network"]["sets"]["marked student"]["p"]
        for key in keys
        if "marked student" in key["network"]["sets"]
    ]
    lines += [
        "",
        f"A small ResNet of CIFAR-10 ({100 * record['results']['accuracy']['clean']:.1f}%), "
        f"{settings['inputs']:,} test images, the worst of {len(keys)} fresh keys. Accuracies are\n"
        "balanced between marked answers and the owner's clean ones. Task accuracy lost: "
        f"{lost:.2f} points. Chien &\nShen (2022) report {100 * paper['balanced_accuracy']:.2f}% "
        f"and {paper['task_accuracy_lost_points']:g} points.",
        f"Of answers that were reheated (temperature 2) the network tells "
        f"{100 * min(row['balanced_accuracy'] for row in warm):.1f}%, the paired test "
        f"{100 * min(row['paired_balanced_accuracy'] for row in warm):.1f}%.",
        f"Sets of {settings['set']}, ranked by the network among {settings['fresh']} fresh keys: a "
        f"student of marked answers p {max(student):g};\n{settings['wrong']} wrong keys in the "
        f"owner's place on {len(null)} suspects: KS p "
        f"{min(one['wrong_keys_ks_p'] for one in null):.2g} or more (`benchmarks/usp.py`).",
    ]
    return "\n".join(lines)


def transcript(name: str) -> str:
    text = (RESULTS / f"{name}.txt").read_text().rstrip()
    return f"```text\n{text}\n```"


SECTIONS = {
    "demo": lambda: transcript("demo"),
    "verify": lambda: transcript("verify"),
    "embedding": embedding,
    "embedding_choice": embedding_choice,
    "overhead": overhead,
    "architectures": architectures,
    "verify_cost": verify_cost,
    "tracing": tracing,
    "served": served,
    "usp": usp,
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
