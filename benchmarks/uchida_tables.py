"""The tables and the picture of docs/uchida.md, from the files that hold their figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from page_parts import load, paragraph, table

LONG = "random, long"
_PRUNINGS = ("embedded layer", "embedded layer, at random", "every layer")


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _ber(value: float) -> str:
    return f"{value:.3f}" if value else "0"


def _p(row: dict[str, Any]) -> str:
    return f"{row['log10_p']:.0f}"


def _steps(row: dict[str, Any]) -> str:
    return "never" if row["steps_to_ber_0"] is None else f"{row['steps_to_ber_0']:,}"


def _name(record: dict[str, Any], host: str) -> str:
    return f"random, {record['settings']['long']} epochs" if host == LONG else host


def _noise(record: dict[str, Any]) -> str:
    """The largest standard error of a test error here, in points."""
    rows = record["results"]["matrices"].values()
    error = max(row["test_error"] for row in rows) / 100
    return f"{100 * math.sqrt(error * (1 - error) / record['settings']['test']):.1f}"


def setting() -> str:
    record = load("uchida")
    settings = record["settings"]
    minutes = sum(record["processor_seconds"].values()) / 60
    drops = ", ".join(f"{100 * drop:.0f}%" for drop in settings["drops"])
    return paragraph(
        f"{settings['host']} on {settings['train']:,} images of CIFAR-10, scaled to "
        f"{settings['size']} x {settings['size']} pixels, for {settings['epochs']} epochs (the "
        "paper: 50,000 images of 32 x 32 pixels, 200 epochs); test errors on "
        f"{settings['test']:,} images, whose standard error is at most {_noise(record)} points; "
        f"one seed ({settings['seed']}). As in the paper: batches of {settings['batch']}, SGD "
        f"with Nesterov's momentum {settings['momentum']:g}, weight decay "
        f"{settings['weight_decay']:g}, rate {settings['rate']:g} times {settings['factor']:g} "
        f"after {drops} of the epochs, lambda {settings['weight']:g}. Training took "
        f"{minutes:.0f} minutes of one core.",
    )


def _balance(settings: dict[str, Any]) -> float:
    """Where lambda sigma(-z) / 64 is weight decay times z, by bisection."""
    low, high = 0.0, 10.0
    while high - low > 1e-6:
        z = (low + high) / 2
        pull = settings["weight"] / (64 * (1 + math.exp(z)))
        low, high = (z, high) if pull > settings["weight_decay"] * z else (low, z)
    return low


def _reach(settings: dict[str, Any]) -> float:
    """How far lambda / 128, the gradient at z = 0, moves a weight over the whole schedule."""
    steps = settings["epochs"] * -(-settings["train"] // settings["batch"])
    ends = (0.0, *settings["drops"], 1.0)
    rates = (settings["rate"] * settings["factor"] ** i for i in range(len(ends) - 1))
    total = sum(rate * (b - a) for rate, a, b in zip(rates, ends, ends[1:], strict=False))
    return steps * total / (1 - settings["momentum"]) * settings["weight"] / 128


def _spread() -> float:
    """Glorot's standard deviation for 64 x 64 x 3 x 3, over 64 output channels."""
    return math.sqrt(2 / (2 * 576)) / math.sqrt(64)


def matrices() -> str:
    record = load("uchida")
    rows, paper = record["results"]["matrices"], record["paper"]
    head = ("key matrix", "test error, %", "E_R", "BER", "log10 p", "steps to BER 0")
    head += ("paper: test error, %", "paper: E_R")
    lines = []
    for name, row in rows.items():
        theirs = paper["matrices"].get(name, {})
        if name == "none":
            read = row["read_as"]["random"]
            mark = ("", _ber(read["ber"]), f"{read['log10_p']:.1f}", "")
        else:
            mark = (_loss(row["embedding_loss"]), _ber(row["ber"]), _p(row), _steps(row))
        lines.append(
            (
                "not embedded" if name == "none" else _name(record, name),
                f"{row['test_error']:.1f}",
                *mark,
                f"{theirs['test_error']:.2f}" if theirs else "",
                _loss(theirs.get("embedding_loss")),
            )
        )
    settings = record["settings"]
    balance = _balance(settings)
    text = paragraph(
        "E_R is the cross entropy of the bits, as a mean over them; the model without a mark is",
        f"read with the key of `random`. The paper's figures are {paper['source']}. E_R depends on",
        "the length of the training and on weight decay: `direct` has one weight a channel for",
        "every bit, and the mark's gradient, lambda sigma(-z) / 64, balances that of the decay at",
        f"z = {balance:.2f}, an E_R of {math.log1p(math.exp(-balance)):.2f}, however long one",
        "trains. The authors' published code shows no decay, and the paper's E_R is below that. In",
        f"this schedule that gradient moves z of `direct` by at most {_reach(settings):.3f}, where",
        f"the means of fresh weights have a standard deviation of {_spread():.4f}: what is wrong",
        "there was not given the time. `random` moves every weight for every bit.",
    )
    return f"{table(head, lines)}\n\n{text}"


def situations() -> str:
    record = load("uchida")
    head = ("situation", "test error without, %", "with the mark, %", "E_R", "BER", "log10 p")
    lines = [
        (
            situation,
            f"{pair['without']['test_error']:.1f}" if "without" in pair else "not run",
            f"{pair['with']['test_error']:.1f}",
            _loss(pair["with"]["embedding_loss"]),
            _ber(pair["with"]["ber"]),
            _p(pair["with"]),
        )
        for situation, pair in record["results"]["situations"].items()
    ]
    text = paragraph(
        "Key matrix `random`, the same schedule each time. Fine-tuning starts from the unmarked",
        "model of the first row; the student starts from other random weights and learns from that",
        "model's probabilities.",
    )
    return f"{table(head, lines)}\n\n{text}"


def tuning() -> str:
    record = load("uchida")
    head = ("fine-tuned without the key on", "rate", "test error, %", "E_R", "BER", "log10 p")
    lines = [
        (
            "nothing: before" if name == "before" else name.split(",")[0],
            f"{row['rate']:g}" if "rate" in row else "",
            f"{row['test_error']:.1f}",
            _loss(row["embedding_loss"]),
            _ber(row["ber"]),
            _p(row),
        )
        for name, row in record["results"]["tuning"].items()
    ]
    epochs = max(1, record["settings"]["epochs"] // 4)
    text = paragraph(
        f"Key matrix `random`, {epochs} epochs, with the training's drops of the rate. The paper",
        "fine-tunes on the same images, and from Caltech-101 to CIFAR-10; the mark stays too.",
    )
    return f"{table(head, lines)}\n\n{text}"


def pruning() -> str:
    record = load("uchida")
    rows = record["results"]["pruning"]
    best = LONG if LONG in rows else "random"
    smallest, chance, every = (rows[best][how] for how in _PRUNINGS)
    head = ["pruned, %", *(f"BER: {_name(record, host)}" for host in rows)]
    head += ["test error, %", "at random: BER", "test error, %", "every layer: BER"]
    head += ["test error, %"]
    lines = [
        (
            str(smallest[i]["percent"]),
            *(_ber(rows[host]["embedded layer"][i]["ber"]) for host in rows),
            f"{smallest[i]['test_error']:.1f}",
            _ber(chance[i]["ber"]),
            f"{chance[i]['test_error']:.1f}",
            _ber(every[i]["ber"]),
            f"{every[i]['test_error']:.1f}",
        )
        for i in range(len(smallest))
    ]
    text = paragraph(
        "The smallest weights of the embedded layer are set to zero, as in the paper, where the",
        f"mark is complete after {record['paper']['pruned_without_an_error']}%. One bit is",
        f"{_ber(1 / 256)}: the shorter training leaves some bits close to the border. The columns",
        f"on the right are of `{_name(record, best)}`: the same, with",
        "weights of that layer drawn at random, and with the smallest of every layer.",
    )
    return f"{table(head, lines)}\n\n{text}"


def capacity() -> str:
    record = load("uchida")
    groups = record["results"]["capacity"]
    names = {"conv2": "conv2, M = 576", "conv3": "conv3, M = 1,152", "conv4": "conv4, M = 2,304"}
    head = ["T"]
    for group in groups:
        head += [f"{names[group]}: test error, %", "BER", "E_R"]
    lines = []
    for bits in next(iter(groups.values())):
        line = [f"{int(bits):,}"]
        for rows in groups.values():
            row = rows[bits]
            line += (
                ["refused", "", ""]
                if "refused" in row
                else [f"{row['test_error']:.1f}", _ber(row["ber"]), _loss(row["embedding_loss"])]
            )
        lines.append(line)
    settings = record["settings"]
    epochs = max(1, round(settings["epochs"] * settings["capacity_share"]))
    text = paragraph(
        f"Key matrix `random`, from scratch, {epochs} epochs each. More bits than M, the inputs of",
        "one output channel, cannot all be set: `WatermarkLoss` refuses them.",
    )
    return f"{table(head, lines)}\n\n{text}"


def summary() -> str:
    """For README.md."""
    record = load("uchida")
    results = record["results"]
    matrix = ", ".join(
        f"{_ber(row['ber'])} ({_name(record, host)})"
        for host, row in results["matrices"].items()
        if host != "none"
    )
    at = record["paper"]["pruned_without_an_error"]
    pruned = ", ".join(
        f"{_ber(next(row['ber'] for row in ways['embedded layer'] if row['percent'] == at))} "
        f"({_name(record, host)})"
        for host, ways in results["pruning"].items()
        if host.startswith("random")
    )
    settings = record["settings"]
    return paragraph(
        f"The scheme of Uchida et al. in its own experiments, in small: {settings['host']},",
        f"{settings['train']:,} images, {settings['epochs']} epochs. BER after training, by key",
        f"matrix: {matrix}; after pruning {at}% of the embedded layer, where the paper's mark is",
        f"complete: {pruned}. All of it, [beside the paper's figures](docs/uchida.md):",
        "`benchmarks/uchida.py`.",
    )


def wrong_keys() -> str:
    """For README.md."""
    record = load("wrong_keys")
    rows = record["results"]["spread"]
    at = [row["alphas"]["0.001"] for row in rows.values()]
    low, high = at[0]["interval"]
    inside = sum(one["inside"] for one in at)
    counts = sorted(one["count"] for one in at)
    return paragraph(
        f"{record['settings']['keys']:,} wrong keys on each of {len(rows)} models, random, trained",
        f"and nasty: {counts[0]} to {counts[-1]} false alarms at 10^-3, where a binomial gives",
        f"{low} to {high} in 99 of 100 cases ({inside} of {len(at)} inside;",
        "[other limits](docs/uchida.md#wrong-keys), `benchmarks/wrong_keys.py`).",
    )


def wrong_keys_table() -> str:
    record = load("wrong_keys")
    names = {"spread": "spread (default)", "mean": "Uchida's mean"}
    limits = list(next(iter(record["results"]["spread"].values()))["alphas"])
    head = ["statistic, model", *(f"p <= {limit}" for limit in limits), "KS p", "smallest p"]
    lines, cells = [], []
    for name, rows in record["results"].items():
        for model, row in rows.items():
            found = list(row["alphas"].values())
            cells += found
            counts = [f"{one['count']:,}" + ("" if one["inside"] else " (!)") for one in found]
            tail = (f"{row['ks_p']:.2f}", f"{10.0 ** row['smallest_log10_p']:.1e}")
            lines.append([f"{names[name]}: {model}", *counts, *tail])
    intervals = "; ".join(
        f"{low:,} to {high:,} at {limit}"
        for limit, (low, high) in zip(
            limits, (one["interval"] for one in cells[: len(limits)]), strict=True
        )
    )
    outside = sum(not one["inside"] for one in cells)
    check, settings = record["verify"], record["settings"]
    text = paragraph(
        f"{settings['keys']:,} fresh keys, each of which reads every model (a carrier of shape",
        f"{settings['carrier']}, 64 bits). What a binomial stays within in 99 of 100 cases:",
        f"{intervals}; {outside} of {len(cells)} counts lie outside, marked (!), where",
        f"{0.01 * len(cells):.2g} would on average. `verify_hub_model` says the same to the first",
        f"{check['keys']} keys, to {check['largest_difference']:g} in log10 p, and counts",
        f"{check['tries'][0]} try. The owner of the mark in the third model reads log10 p",
        f"{record['the_owner_of_the_mark']:.0f} there. It took {record['processor_seconds']:.0f}",
        "seconds of one core.",
    )
    return f"{table(head, lines)}\n\n{text}"


def pictures(folder: Path) -> None:
    """BER and test error against the share of weights that is pruned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = load("uchida")
    rows, at = record["results"]["pruning"], record["paper"]["pruned_without_an_error"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    colours = ("tab:green", "tab:orange", "tab:cyan", "tab:blue")
    best = LONG if LONG in rows else "random"
    for host, colour in zip(rows, colours, strict=False):
        for how, style in zip(_PRUNINGS[:2], ("o-", "x:"), strict=True):
            found = rows[host][how]
            label = _name(record, host) if how == _PRUNINGS[0] else None
            left.plot([row["percent"] for row in found], [row["ber"] for row in found], style,
                      color=colour, ms=4, label=label)  # fmt: skip
    for how, style in zip(_PRUNINGS, ("o-", "x:", "s--"), strict=True):
        found = rows[best][how]
        right.plot([row["percent"] for row in found], [100 - row["test_error"] for row in found],
                   style, color="tab:blue", ms=4, label=how)  # fmt: skip
    for axes in (left, right):
        axes.axvline(at, color="0.6", lw=0.8)
        axes.set(xlabel="weights set to zero, %")
    left.text(at - 1, left.get_ylim()[1] * 0.94, f"the paper: BER 0 at {at}%", ha="right",
              color="0.4", fontsize=9)  # fmt: skip
    left.set(ylabel="bit error rate")
    left.set_title("The mark in the pruned layer (dotted: pruned at random)")
    right.set(ylabel="accuracy, %")
    right.set_title(f"Accuracy of {_name(record, best)}, by what is pruned")
    left.legend(frameon=False, loc="center left")
    right.legend(frameon=False, loc="lower left")
    figure.savefig(folder / "uchida.png", dpi=110)


SECTIONS = {
    "uchida": summary,
    "uchida_setting": setting,
    "uchida_matrices": matrices,
    "uchida_situations": situations,
    "uchida_tuning": tuning,
    "uchida_pruning": pruning,
    "uchida_capacity": capacity,
    "wrong_keys": wrong_keys,
    "wrong_keys_table": wrong_keys_table,
}
