"""The tables and pictures of marked soft labels, from the files that hold their figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from page_parts import load, paragraph, table

_READ = "fresh"
_TEST = 5000  # images that the accuracy of `distillation.py`'s students is measured on


def _each(values: Iterable[float], form: str = ".1f") -> str:
    texts = (format(value, form) for value in values)
    return ", ".join(
        text.lstrip("-") if float(text.replace(",", "")) == 0 else text for text in texts
    )


def _of(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A suspect's rows, one of every seed that has it."""
    seeds = record["results"].values()
    return [seed["suspects"][name] for seed in seeds if name in seed["suspects"]]


def _accuracy(rows: list[dict[str, Any]]) -> str:
    return _each(100 * row["accuracy"] for row in rows)


def _t(rows: list[dict[str, Any]], how: str = "as it is", probes: int = 2000) -> str:
    return _each(row[_READ][how][str(probes)]["t"] for row in rows)


def _p(rows: list[dict[str, Any]], how: str = "as it is", probes: int = 2000) -> str:
    return _each(row[_READ][how][str(probes)]["log10_p"] for row in rows)


def _settings(record: dict[str, Any]) -> str:
    settings, seeds = record["settings"], record["results"].values()
    teacher = _each(100 * seed["teacher_accuracy"] for seed in seeds)
    return (
        f"CIFAR-10, {settings['classes']} classes; teacher trained on {settings['train']:,} images "
        f"(accuracy {teacher}%), students on {settings['queries']:,} others "
        f"(the weak ones on two thirds of them), eps {settings['eps']:g}, features "
        f"{settings['features']}; seeds and keys {_each(map(int, record['results']), 'd')}"
    )


def students() -> str:
    """The main figures: who is found, and how surely."""
    rows = []
    names = {
        "distillation": "10 classes, H",
        "distillation_two_classes": "2 classes, H",
    }
    for file, said in names.items():
        record = load(file)
        for name in ("strong", "weak"):
            found = _of(record, name)
            rows.append(
                (
                    f"{said}: {name} student",
                    _accuracy(found),
                    _each(row["teacher_only"]["t"] for row in found),
                    _t(found),
                    *(_p(found, probes=count) for count in (300, 2000, 5000)),
                )
            )
    head = ("suspect", "accuracy, %", "t, without references", "t")
    head += ("log10 p, 300 probes", "2,000", "5,000")
    record = load("distillation")
    spoilt = [seed["distortion"] for seed in record["results"].values()]
    two = load("distillation_two_classes")["settings"]
    told = paragraph(
        f"{_settings(record)}. Two classes are animals and vehicles, at eps {two['eps']:g}, with "
        f"images of {two['size']} pixels and {two['epochs']} epochs (with ten classes "
        f"{record['settings']['size']} pixels, {record['settings']['epochs']} epochs).",
        "t with 2,000 probes, in standard deviations of a wrong key's.",
        "A strong student has the teacher's architecture, a weak one another, which no reference",
        "has. What the mark costs with 10 classes and H: total variation",
        f"{_each((one['tv'] for one in spoilt), '.3f')}, top classes changed",
        f"{_each((one['flips'] for one in spoilt), 'd')}, calibration error",
        f"{_each((one['ece'][0] for one in spoilt), '.3f')} to",
        f"{_each((one['ece'][1] for one in spoilt), '.3f')} (`benchmarks/distillation.py`).",
    )
    return f"{table(head, rows)}\n\n{told}"


def innocents() -> str:
    """What wrong keys and innocent models say."""
    seeds = [
        seed
        for file in ("distillation", "distillation_two_classes")
        for seed in load(file)["results"].values()
    ]
    sets = [
        found
        for seed in seeds
        for row in seed["suspects"].values()
        for found in row.get("wrong_keys", {}).values()
    ]
    pooled = [seed["wrong_keys"] for seed in seeds]
    again = load("distillation_more_keys")["results"]
    own = [
        found["log10_p"]
        for seed in seeds
        for row in seed["suspects"].values()
        if row["kind"] == "innocent"
        for found in row["fresh"]["as it is"].values()
    ]
    failed = sum(one["ks_p"] <= 0.01 for one in sets)
    return paragraph(
        f"Wrong keys, others for every suspect: {sum(one['count'] for one in sets):,} readings in",
        f"{len(sets)} sets of a thousand; smallest log10 p",
        f"{min(one['smallest_log10_p'] for one in sets):.2f}; standard deviation of t, by run,",
        f"{_each((one['sd'] for one in pooled), '.3f')}; Kolmogorov-Smirnov against the normal",
        "distribution, all sets of a run together: p",
        f"{_each((one['ks_p'] for one in pooled), '.2g')} ({failed} of the {len(sets)} single sets",
        f"are below .01; chance would give {0.01 * len(sets):.1f}).",
        f"The two-class run of seed {', '.join(again)} stood out and was read again with",
        f"{_each((one['wrong_keys']['count'] for one in again.values()), ',d')} keys, these among",
        "them:",
        f"p {_each((one['wrong_keys']['ks_p'] for one in again.values()), '.2f')}.",
        f"Innocents read with the owner's own key, {len(own)} readings: smallest log10 p",
        f"{min(own):.2f}.",
    )


def margin() -> str:
    """Students of labels alone."""
    rows = []
    for file, said in (
        ("distillation", "10 classes"),
        ("distillation_two_classes", "2 classes"),
    ):
        record = load(file)
        for name in ("margin, hard labels", "margin, weak, hard labels", "margin, soft labels"):
            found = _of(record, name)
            if not found:
                continue
            rows.append(
                (
                    f"{said}: {name.removeprefix('margin, ')}",
                    _accuracy(found),
                    _p(found, probes=5000),
                    _p(found, "labels", 5000),
                    *(
                        _each(row["logged"][how]["log10_p"] for row in found)
                        for how in ("as it is", "labels")
                    ),
                )
            )
        found = _of(record, "hard labels")
        rows.append(
            (
                f"{said}: hard labels, margin mode off",
                _accuracy(found),
                _p(found, probes=5000),
                "",
                *(
                    _each(row["logged"][how]["log10_p"] for row in found)
                    for how in ("as it is", "labels")
                ),
            )
        )
    head = ("student", "accuracy, %", "fresh images, soft", "fresh, labels")
    head += ("its own queries, soft", "queries, labels")
    settings = load("distillation")["settings"]
    more = paragraph(
        "log10 p, both readings counted. Fresh: 5,000 images that nobody was asked about. Queries:",
        f"all that the student's account asked. Features {settings['margin_features']}; among the",
        "references is one that learnt the clean model's labels of those queries.",
        _price(),
    )
    return f"{table(head, rows)}\n\n{more}"


def _price() -> str:
    """What margin mode costs the teachers."""
    record, two = load("price"), load("distillation_two_classes")
    found = list(record["results"].values())
    paid = [one["margin_distortion"]["accuracy"] for one in two["results"].values()]
    expected = [100 * one["margin_expected_price"] for one in two["results"].values()]

    def each(name: str) -> str:
        return _each((one[name] for one in found), ".2f")

    def settings(record: dict[str, Any]) -> str:
        return f"margin=({', '.join(f'{one:g}' for one in record['settings']['margin'])})"

    return (
        f"Price, in points of the teacher's accuracy: 10 classes, {settings(record)}, on the "
        f"{found[0]['images']:,} images that the teacher did not learn from, {each('own')} for the "
        f"owner's key (standard errors {each('own_standard_error')}), {each('customers_mean')} in "
        f"the mean over {record['settings']['customers']} customers' "
        f"({each('customers_standard_error')}), {each('expected')} as expected beforehand "
        f"(`benchmarks/price.py`); 2 classes, {settings(two)}, on 10,000 test images, "
        f"{_each((100 * (a - b) for a, b in paid), '.2f')}, expected {_each(expected, '.2f')}."
    )


def erasures() -> str:
    """What an attacker who knows the scheme pays."""
    record = load("distillation")
    names = [
        name
        for name, row in next(iter(record["results"].values()))["suspects"].items()
        if row["kind"] == "erasure"
    ]
    honest = [
        ("nothing, from unmarked answers", "clean strong"),
        ("nothing: the strong student", "strong"),
    ]
    rows = []
    for said, name in [*honest, *((one, one) for one in names), ("hard labels", "hard labels")]:
        found = _of(record, name)
        strong = _of(record, "strong")[: len(found)]
        loss = [100 * (b["accuracy"] - a["accuracy"]) for a, b in zip(found, strong, strict=True)]
        rows.append(
            (
                said,
                _accuracy(found),
                f"{statistics.mean(loss):+.1f}" if name != "strong" else "",
                _t(found),
                _p(found),
            )
        )
    head = ("what the thief does", "accuracy, %", "points lost", "t", "log10 p")
    strong = statistics.mean(row["accuracy"] for row in _of(record, "strong"))
    noise = 100 * (strong * (1.0 - strong) / _TEST) ** 0.5
    few = sorted({len(_of(record, name)) for name in (*names, "strong")})
    more = paragraph(
        f"2,000 probes; {_seeds(few)}. The standard error of an accuracy is about {noise:.1f}",
        "points (`benchmarks/distillation.py`).",
    )
    return f"{table(head, rows)}\n\n{more}"


def _seeds(counts: list[int]) -> str:
    return f"{' to '.join(map(str, sorted({counts[0], counts[-1]})))} seeds a row"


def variants() -> str:
    """Students who learnt, or answer, in other ways."""
    record = load("distillation")
    every = [row for seed in record["results"].values() for row in seed["suspects"].items()]
    names = {name: None for name, row in every if row["kind"] == "variant" and not _shared(row)}
    rows = []
    for name in ("strong", *names):
        found = _of(record, name)
        said = "as it is: the strong student" if name == "strong" else name
        rows.append((said, _accuracy(found), _t(found), _p(found)))
    return table(("the student", "accuracy, %", "t", "log10 p"), rows)


def _shared(row: dict[str, Any]) -> bool:
    return "customers" in row


def answers() -> str:
    """What the suspect's owner may do to its answers."""
    record = load("distillation")
    strong, weak = (_of(record, name) for name in ("strong", "weak"))
    both = (strong, weak)
    rows = [
        (how, *(_t(one, how) for one in both), *(_p(one, how) for one in both))
        for how in strong[0][_READ]
    ]
    head = ("answers of the suspect", "t, strong", "t, weak", "log10 p, strong", "log10 p, weak")
    return table(head, rows)


def colluders() -> str:
    """Customers who learn from the mean of their answers."""
    record = load("distillation")
    rows = []
    for name, said in (
        ("another customer's", "1"),
        ("2 customers together", "2"),
        ("3 customers together", "3"),
    ):
        for found in _of(record, name):
            traced = found["customers"]
            rows.append(
                (
                    said,
                    f"{100 * found['accuracy']:.1f}",
                    _each(traced["t"].values()),
                    f"{traced['best_other_t']:.1f}",
                    "yes" if traced["all_ahead"] else "no",
                )
            )
    head = ("colluders", "accuracy, %", "t of each", "best other of 1,000", "all named first")
    return table(head, rows)


def leaks() -> str:
    """A hundred leaks."""
    record = load("leaks")
    settings = record["settings"]
    parts = []
    for (arch, found), said in zip(
        record["summary"].items(), ("of the teacher's architecture", "of another"), strict=True
    ):
        t = statistics.median(row["t"] for row in record["leaks"] if row["architecture"] == arch)
        parts.append(
            f"of {found['leaks']} students {said}, {found['first']} point at the right one first, "
            f"{found['named']} of them beyond alpha (median t {t:.1f})"
        )
    return paragraph(
        f"One of {settings['customers']:,} customers leaks, all of them are suspected and counted:",
        f"{'; '.join(parts)}. Of {len(record['innocents'])} clean students",
        f"{record['innocents_named']} named anybody. {settings['probes']:,} probes each, teacher",
        f"{100 * record['teacher_accuracy']:.1f}% (`benchmarks/leaks.py`).",
    )


def served() -> str:
    record = load("served")
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
    record = load("usp")
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


def trained_in() -> str:
    """Published weights with both marks."""
    record = load("trained_in")
    seeds = list(record["results"].values())
    rows = []
    for name in seeds[0]["rows"]:
        found = [seed["rows"][name] for seed in seeds]
        rows.append(
            (
                name,
                _accuracy(found),
                _each(row["outputs"]["t"] for row in found),
                _each(row["outputs"]["log10_p"] for row in found),
                _each((row["weights_log10_p"] for row in found), ".0f"),
            )
        )
    head = ("the weights", "accuracy, %", "t of its answers", "log10 p", "log10 p of the weights")
    told = paragraph(
        f"Trained by `WatermarkTrainer` for {record['settings']['epochs']} epochs; teachers",
        f"{_each(100 * seed['teacher_accuracy'] for seed in seeds)}%;",
        f"{record['settings']['probes']:,} probes. Attacks as in `hf-watermark stress`, with",
        f"{record['settings']['calibration']:,} images and {record['settings']['attack_epochs']}",
        "epochs (`benchmarks/trained_in.py`).",
    )
    return f"{table(head, rows)}\n\n{told}"


SECTIONS: dict[str, Callable[[], str]] = {
    "students": students,
    "innocents": innocents,
    "margin": margin,
    "erasures": erasures,
    "variants": variants,
    "answers": answers,
    "colluders": colluders,
    "leaks": leaks,
    "trained_in": trained_in,
    "served": served,
    "usp": usp,
}


def pictures(folder: Path) -> None:
    """Statistics against the number of probes, and the p-values of innocents on a uniform scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from hf_watermark.significance import log10_rademacher_tail

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    record = load("distillation")
    for name, colour in (("strong", "tab:blue"), ("weak", "tab:orange")):
        for i, row in enumerate(_of(record, name)):
            counts = {int(k): v["t"] for k, v in row[_READ]["as it is"].items()}
            left.plot(list(counts), list(counts.values()), "o-", color=colour, alpha=0.7,
                      label=f"{name} student" if i == 0 else None)  # fmt: skip
    for i, name in enumerate(("clean strong", "clean weak", "own labels")):
        for j, row in enumerate(_of(record, name)):
            counts = {int(k): v["t"] for k, v in row[_READ]["as it is"].items()}
            label = "innocents" if i == j == 0 else None
            left.plot(list(counts), list(counts.values()), ".:", color="0.6", label=label)
    left.axhline(_needed(log10_rademacher_tail, -9.0), color="k", lw=0.8, ls="--")
    left.text(5200, _needed(log10_rademacher_tail, -9.0) - 0.6, "p = 1e-9", ha="right", fontsize=9)
    left.set(xscale="log", xlabel="probes", ylabel="t")
    left.set_title("Students and innocents, every seed")
    left.set_xticks([200, 500, 1000, 2000, 5000], ["200", "500", "1,000", "2,000", "5,000"])
    left.minorticks_off()
    left.legend(frameon=False)
    for i, (seed, found) in enumerate(record["results"].items()):
        n = found["wrong_keys"]["count"]
        ranks, t = zip(*found["wrong_keys"]["ranks"], strict=True)
        p = [statistics.NormalDist().cdf(-one) for one in t]
        right.plot([(rank - 0.5) / n for rank in ranks], p, ".-", color="tab:green",
                   alpha=0.4 + 0.2 * i, label=f"{n:,} wrong keys, seed {seed}")  # fmt: skip
    right.plot([5e-5, 1], [5e-5, 1], "k--", lw=0.8, label="uniform")
    right.set(xscale="log", yscale="log", xlabel="rank / number", ylabel="p of the normal tail")
    right.set_title("What wrong keys say, all suspects")
    right.legend(frameon=False)
    figure.savefig(folder / "softlabels.png", dpi=110)


def _needed(tail: Callable[[float], float], log10_p: float) -> float:
    t = 0.0
    while tail(t) > log10_p:
        t += 0.01
    return t
