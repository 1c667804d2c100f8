"""Tables of attacks: the suite on the demo's model, disguises, layers that are drawn anew."""

from __future__ import annotations

from typing import Any

import survival_tables
from page_parts import load, paragraph, rounded_up, table

from hf_watermark.stress import attacks_of

HOSTS = {"basic": "ResNet", "ViT": "ViT", "ConvNext": "ConvNeXt", "Swin": "Swin"}
REDRAWN_HOSTS = ("resnet", "vit")


def stress_demo() -> str:
    """Those attacks of the quick suite."""
    return _stressed("quick")


def stress_demo_rest() -> str:
    """What the full suite has beside them."""
    return _stressed("rest")


def _stressed(part: str) -> str:
    record = load("stress_demo")
    runs = record["results"]
    trained, closed = runs["trained"], runs["closed form"]
    quick = {one.name for one in attacks_of("quick")}
    names = [name for name in trained["results"] if (name in quick) is (part == "quick")]
    judged = [name for name in names if trained["results"][name]["lost"] is not None]
    head = ("attack", "accuracy lost, points", "trained mark: log10 p", "in closed form: log10 p")
    rows = [("none", "", _outcome(trained["before"]), _outcome(closed["before"]))]
    for name in judged:
        row, other = (run["results"][name] for run in (trained, closed))
        lost = sorted({f"{100 * one['lost']:+.1f}" for one in (row, other)}, key=float)
        rows.append((name, " and ".join(lost), _outcome(row), _outcome(other)))
    said = trained["settings"]
    before = " and ".join(f"{100 * run['before']['accuracy']:.1f}%" for run in (trained, closed))
    removed = [
        ", ".join(n for n in names if run["results"][n]["removed"]) or "nothing"
        for run in (trained, closed)
    ]
    lost = [
        ", ".join(
            n for n in judged if not run["results"][n]["found"] and not run["results"][n]["removed"]
        )
        for run in (trained, closed)
    ]
    suite = "The quick suite" if part == "quick" else "What the full suite has beside it,"
    texts = [
        f"{suite} on the demo's ViT (accuracy {before} before, on {said['test_images']} images), "
        f"one seed. The attacker has the {said['attackers_images']} images that the owner "
        f"fine-tuned on; fine-tuning at 1x is {said['epochs']} epochs at the owner's own rate. The "
        "second mark was added in closed form, with another key, to the model that was trained "
        "with the first; aligned, the first is read by its seal. The trained mark was removed by "
        f"{removed[0]}; the one in closed form by {removed[1]} (`benchmarks/stress_demo.py`)."
    ]
    if part == "quick":
        rest = [name for name in trained["results"] if name not in quick]
        removing = [n for n in rest if any(run["results"][n]["removed"] for run in runs.values())]
        texts.append(
            f"Of the {len(rest)} further attacks of the full suite {' and '.join(removing)} remove "
            "marks ([all of them](docs/survival.md#the-rest-of-the-suite))."
        )
    if any(lost):
        texts.append(
            f"Lost with the accuracy: the trained mark to {lost[0] or 'nothing'}, the one in "
            f"closed form to {lost[1] or 'nothing'}."
        )
    skipped = [name for name in names if name not in judged]
    if skipped:
        texts.append(f"Not applicable here: {', '.join(skipped)}.")
    return f"{table(head, rows)}\n\n{paragraph(*texts)}"


def aligned() -> str:
    record = load("aligned")
    head = ("in every disguise at once, then", "accuracy, %", "raw: log10 p", "aligned: log10 p")
    rows = []
    for row in record["survival"]:
        own, left = (100 * row[name] for name in ("accuracy_of_the_owner", "accuracy"))
        cells = (f"{HOSTS[row['host']]}: {row['copy']}", f"{own:.1f} to {left:.1f}")
        rows.append((*cells, *(f"{row[how]['log10_p']:.1f}" for how in ("raw", "aligned"))))
    texts = ["Does looking for an alignment favour a key?"]
    for row in record["null"]:
        wrong, seals = row["wrong_keys"], row["seals_own_keys"]["unrelated"]
        texts.append(
            f"{HOSTS[row['host']]}: {row['keys']:,} wrong keys on each of {row['models']} models, "
            f"random and trained, {100 * wrong['rate_at_1e-3']:.2f}% at a limit of .1%, "
            f"Kolmogorov-Smirnov p {wrong['ks_p']:.2g}; the seals of {row['owners']} owners on "
            f"models that never saw them, {seals['count']} readings, largest "
            f"{seals['largest']:.1f} standard deviations, p {seals['ks_p']:.2g}."
        )
    for row in load("aligned_more_keys")["null"]:
        wrong = row["wrong_keys"]
        texts.append(
            f"{HOSTS[row['host']]} again, with {row['keys']:,} other keys for each model: "
            f"{100 * wrong['rate_at_1e-3']:.3f}%, p {wrong['ks_p']:.2g}."
        )
    texts.append("Small models of digits, marks in closed form (`benchmarks/aligned.py`).")
    return f"{table(head, rows)}\n\n{paragraph(*texts)}"


def reinit() -> str:
    record = load("reinit")
    said = record["settings"]
    head = ("host", "drawn anew", "layers", "points lost")
    head += ("mark in the default carriers: log10 p", "in every layer: log10 p")
    rows = []
    for host in REDRAWN_HOSTS:
        runs = [row["marks"] for name, row in record["results"].items() if name.startswith(host)]
        for redrawn in ("none", "default", "every layer"):
            marked = {mark: _best(runs, mark, redrawn) for mark in ("default", "every layer")}
            shown = marked["every layer"] or marked["default"]
            rows.append(
                (
                    survival_tables.HOSTS[host],
                    redrawn.replace("default", "default carriers").replace("none", "nothing"),
                    f"{shown[0]['layers']}",
                    ", ".join(f"{100 * one['lost']:+.1f}" for one in shown),
                    *(_worst(found) for found in marked.values()),
                )
            )
    ways = "; ".join(f"{one['epochs']} epochs at {name}" for name, one in said["recipes"].items())
    text = paragraph(
        f"Hosts, images and rates of the tables above, {said['seeds']} runs each, in closed form. "
        f"After the layers were drawn anew the thief trains in {len(said['recipes'])} ways "
        f"({ways.replace('10x, longer', '10x')}), and keeps the best on the test images: that is "
        "what the accuracy is, a little in his favour. log10 p is the worst of all ways and runs "
        "(`benchmarks/reinit.py`)."
    )
    return f"{table(head, rows)}\n\n{text}"


def _best(runs: list[Any], mark: str, redrawn: str) -> list[dict[str, Any]]:
    """What the most successful way to train again leaves, in every run; nothing if not tried."""
    found = []
    for marks in runs:
        ways = marks[mark]["redrawn"].get(redrawn)
        if ways is not None:
            best = max(ways.values(), key=lambda one: one["accuracy"])
            lost = marks[mark]["accuracy"] - best["accuracy"]
            worst = max(one["log10_p"] for one in ways.values())
            found.append({"lost": lost, "layers": best["layers"], "log10_p": worst})
    return found


def _worst(found: list[dict[str, Any]]) -> str:
    return rounded_up(max(one["log10_p"] for one in found)) if found else ""


def _outcome(row: dict[str, Any]) -> str:
    told = "unreadable" if row["log10_p"] is None else f"{rounded_up(row['log10_p'])}"
    if row.get("removed"):
        return f"**removed** ({told})"
    if row.get("found") is False:
        return f"lost with the accuracy ({told})"
    return told if row["reading"] == "raw" else f"{told}, {row['reading']}"


SECTIONS = {
    "stress_demo": stress_demo,
    "stress_demo_rest": stress_demo_rest,
    "aligned": aligned,
    "reinit": reinit,
}
