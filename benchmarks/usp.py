"""How often is the unified perturbation's detector right about single answers, and about sets?

A small ResNet of CIFAR-10 answers 10,000 test images under three fresh keys. The paired test judges
every answer at several precisions, and so does the trained network; sets of answers get a chance.
False alarms are counted on the owner's own clean model, on an independent one and on a student of
the clean one. What the network makes of sets is ranked among fresh keys; wrong keys in the owner's
place show that these ranks are even. Beside them stand the two figures of Chien & Shen 2022.

    python benchmarks/usp.py --out benchmarks/results/usp.json
    python benchmarks/usp.py --train 2000 --epochs 2 --calibration 1000 --queries 1000 --inputs 500
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedding import augmented, load
from students import host
from torch import Tensor, nn

from hf_watermark import OwnerKey
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.chips import chip_signs
from hf_watermark.softlabels.usp import Pair, paired_test
from hf_watermark.softlabels.usp_detector import UspDetector, detect, train_detector

PAPER = {"balanced_accuracy": 0.9868, "task_accuracy_lost_points": 0.59}
DECIMALS = (None, 6, 4, 3, 2)
SETS = (10, 200)


def large(images: Tensor) -> Tensor:
    """As the models take them."""
    seen = nn.functional.interpolate(images, size=64, mode="bilinear")
    return seen.contiguous(memory_format=torch.channels_last)


def trained(images: Tensor, targets: Tensor, epochs: int, seed: int) -> nn.Module:
    """On labels (n,) or soft labels (n, K): SGD, one cycle, flips and shifts."""
    from transformers import set_seed

    set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = host("resnet", 10).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(128):
            logits = model(pixel_values=large(augmented(images[batch], generator))).logits
            nn.functional.cross_entropy(logits, targets[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Probabilities (n, K), in batches of another size than the owner's recomputation."""
    parts = [model(pixel_values=large(part)).logits.softmax(-1) for part in images.split(250)]
    return torch.cat(parts)


def rounded(p: np.ndarray, decimals: int | None) -> np.ndarray:
    return p if decimals is None else p.round(decimals)


def first(pair: Pair, count: int) -> Pair:
    parts = {name: getattr(pair, name)[:count] for name in ("clean", "marked", "psi")}
    return dataclasses.replace(pair, **parts)


def paired(marked: np.ndarray, innocents: dict[str, np.ndarray], pair: Pair) -> dict[str, Any]:
    """The paired test at every precision."""
    rows = {}
    for decimals in DECIMALS:
        told = paired_test(rounded(marked, decimals), None, pair)
        others = {
            name: paired_test(rounded(p, decimals), None, pair) for name, p in innocents.items()
        }
        false = {name: float(other.marked.mean()) for name, other in others.items()}
        share = float(told.marked.mean())
        rows["full" if decimals is None else str(decimals)] = {
            "called_marked": share,
            "false_positives": false,
            "balanced_accuracy": 0.5 * (share + 1.0 - false["clean"]),
            "undecided": told.undecided / len(marked),
            "log10_p_of_sets": {
                str(n): paired_test(rounded(marked[:n], decimals), None, first(pair, n)).log10_p
                for n in SETS
            },
            "log10_p_of_innocents": {name: other.log10_p for name, other in others.items()},
        }
    return rows


def network(
    detector: UspDetector,
    marked: np.ndarray,
    suspects: dict[str, np.ndarray],
    pair: Pair,
    key: OwnerKey,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The trained network on single outputs and on a set, and its ranks under wrong keys."""
    from scipy import stats

    single = {}
    for name, change in {
        **{"full" if d is None else str(d): lambda p, d=d: rounded(p, d) for d in DECIMALS},
        "temperature 2": lambda p: p**0.5 / (p**0.5).sum(1, keepdims=True),
    }.items():
        of_marked, of_clean = (
            float(detect(detector, change(p), pair, 0).marked.mean())
            for p in (marked, suspects["clean"])
        )
        single[name] = {
            "called_marked": of_marked,
            "false_positives": of_clean,
            "balanced_accuracy": 0.5 * (of_marked + 1.0 - of_clean),
            "paired_balanced_accuracy": 0.5
            * (
                paired_test(change(marked), None, pair).marked.mean()
                + 1.0
                - paired_test(change(suspects["clean"]), None, pair).marked.mean()
            ),
        }
    few = first(pair, options.set)
    sets = {}
    for name, p in {"marked": marked, **suspects}.items():
        found = detect(detector, p[: options.set], few, options.fresh)
        wrong = []
        for i in range(options.wrong):
            signs = chip_signs(key.for_recipient(f"wrong-{i}"), *pair.signs.shape)
            stranger = dataclasses.replace(few, signs=signs)
            score = detect(detector, p[: options.set], stranger, 0).score
            wrong.append((1 + int((found.fresh >= score).sum())) / (1 + options.fresh))
        sets[name] = {
            "p": found.p,
            "score": found.score,
            "fresh_mean": float(found.fresh.mean()),
            "fresh_sd": float(found.fresh.std()),
            "wrong_keys_ks_p": float(stats.kstest(wrong, "uniform").pvalue),
            "wrong_keys_smallest_p": min(wrong),
        }
    return {"single": single, "sets": sets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=8_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=5_000)
    parser.add_argument("--queries", type=int, default=5_000, help="of students")
    parser.add_argument("--student-epochs", type=int, default=6)
    parser.add_argument("--students", type=int, default=1, help="of the first keys' marked answers")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--eps", type=float, default=1.0)
    parser.add_argument("--set", type=int, default=200, help="outputs that the network sees")
    parser.add_argument("--fresh", type=int, default=999, help="keys to rank among")
    parser.add_argument("--wrong", type=int, default=200, help="keys in the owner's place")
    parser.add_argument("--steps", type=int, default=1500, help="of the network's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {what}", file=sys.stderr)

    counts = [options.train, options.calibration, options.queries]
    images, labels = load("train", sum(counts))
    teaching, calibration, queries = images.split(counts)
    taught, _, asked = labels.split(counts)
    x, y = load("test", options.inputs)
    teacher = trained(teaching, taught, options.epochs, options.seed)
    clean = answers(teacher, x)
    right = float((clean.argmax(-1) == y).float().mean())
    tell(f"teacher {right:.1%}")
    innocents = {"clean": clean}
    innocents["independent"] = answers(trained(queries, asked, options.student_epochs, 100), x)
    learnt = trained(queries, answers(teacher, queries), options.student_epochs, 101)
    innocents["clean student"] = answers(learnt, x)
    known = {name: float((p.argmax(-1) == y).float().mean()) for name, p in innocents.items()}
    tell(f"innocents {known}")
    arrays = {name: p.double().numpy() for name, p in innocents.items()}
    record: dict[str, Any] = {
        "question": "How often is the unified perturbation's detector right?",
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "paper": PAPER,
        "results": {"accuracy": known, "keys": []},
    }
    for number in range(options.keys):
        key = OwnerKey((9000 + 100 * options.seed + number).to_bytes(32, "big"))
        served = SoftLabelWatermark(teacher, key, options.eps).calibrate(large(calibration)).eval()
        pair = Pair.of(served, large(x))
        said = answers(served, x)
        marked = said.double().numpy()
        row: dict[str, Any] = {
            "task_accuracy_lost_points": 100
            * (right - float((said.argmax(-1) == y).float().mean())),
            "flips": int((said.argmax(-1) != clean.argmax(-1)).sum()),
            "paired": paired(marked, arrays, pair),
        }
        tell(f"key {number}: {row['paired']['full']['balanced_accuracy']:.2%}")
        detector = train_detector(
            served, large(calibration), steps=options.steps, seed=options.seed + number
        )
        suspects = dict(arrays)
        if number < options.students:
            targets = answers(served, queries)
            stolen = answers(trained(queries, targets, options.student_epochs, 200 + number), x)
            row["student_accuracy"] = float((stolen.argmax(-1) == y).float().mean())
            suspects["marked student"] = stolen.double().numpy()
        row["network"] = network(detector, marked, suspects, pair, key, options)
        tell(f"key {number}: network {row['network']['single']['full']['balanced_accuracy']:.2%}")
        record["results"]["keys"].append(row)
        served.detach()
    text = json.dumps(record, indent=2)
    if options.out is None:
        print(text)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    tell("done")


if __name__ == "__main__":
    main()
