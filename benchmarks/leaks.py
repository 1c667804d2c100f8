"""Which of a thousand customers leaked? A hundred students, each of one customer's answers.

A teacher of CIFAR-10 serves a thousand customers, each with signs of their own. Customers drawn
from a seed distil a student each, from queries of their own choice. Like most who do so they do not
begin from nothing, but from a network that is public, here one that learnt the true labels of half
of the teacher's images. The owner reads all thousand customers out of one pass over the student's
answers to 2,000 probes. After the hundred of the teacher's architecture come some of another, and
clean students, who show how often an innocent is named.

    python benchmarks/leaks.py --out leaks.json
    python benchmarks/leaks.py --leaks 4 --train 4000 --queries 2000     # a look
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from students import Data, answers, host, train

from hf_watermark import OwnerKey
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.verify import verify_outputs

CUSTOMERS = 1000
PROBES = 2000
TEST = 1000
ARCHITECTURES = ("resnet", "regnet")
BANK = ("resnet", "bottleneck")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaks", type=int, default=100)
    parser.add_argument("--weak", type=int, default=20, help="leaks of another architecture")
    parser.add_argument("--innocents", type=int, default=10)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=15_000, help="to draw from")
    parser.add_argument("--drawn", type=float, default=0.5, help="the share a customer asks about")
    parser.add_argument("--calibration", type=int, default=5_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--public", type=int, default=10_000, help="images of public networks")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--eps", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.classes = 10
    data = Data(options)
    torch.manual_seed(options.seed)
    teacher = train(
        host("resnet", 10), *data.teacher, data, epochs=options.teacher_epochs, seed=options.seed
    )
    key = OwnerKey((9000 + options.seed).to_bytes(32, "big"))
    served = SoftLabelWatermark(teacher, key, options.eps)
    served.calibrate(data.seen(data.calibration[0]).cpu(), 500).eval()
    said = answers(teacher, data.reference[0], data).exp()
    public = {name: _begun(name, data, options) for name in dict.fromkeys((*ARCHITECTURES, *BANK))}
    bank = [_student(public[name], data.reference[0], said, data, options, 1) for name in BANK]
    images = data.probes[0][:PROBES]
    references = [answers(one, images, data).numpy() for one in bank]
    probes = served.probes(data.seen(images).cpu(), 500).with_references(references)
    names = [f"customer-{i}" for i in range(CUSTOMERS)]
    draw = np.random.default_rng(options.seed)
    leaks, innocents = [], []
    guilty_ones = options.leaks + options.weak
    for i in range(guilty_ones + options.innocents):
        guilty = names[int(draw.integers(CUSTOMERS))] if i < guilty_ones else None
        count = round(options.drawn * options.queries)
        asked = data.queries[0][torch.from_numpy(draw.permutation(options.queries)[:count])]
        source = teacher if guilty is None else served.for_recipient(guilty)
        targets = answers(source, asked, data).exp()
        arch = ARCHITECTURES[i >= options.leaks and (i < guilty_ones or i % 2)]
        student = _student(public[arch], asked, targets, data, options, 100 + i)
        suspect = answers(student, images, data).exp().numpy()
        evidence = verify_outputs(suspect, None, probes, recipient=names)
        shown, labels = (part[:TEST] for part in data.test)
        right = (answers(student, shown, data).argmax(-1) == labels).float().mean()
        row: dict[str, Any] = {
            "architecture": arch,
            "accuracy": round(float(right), 4),
            "leaked_by": guilty,
            "named": evidence.recipient,
            "verdict": evidence.verdict,
            "t": round(evidence.t, 3),
            "log10_p": round(evidence.log10_p, 3),
        }
        (innocents if guilty is None else leaks).append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        _write(options, leaks, innocents, data, teacher)


def _begun(arch: str, data: Data, options: argparse.Namespace) -> torch.nn.Module:
    """A public network, of true labels."""
    torch.manual_seed(options.seed)
    images, labels = (part[: options.public] for part in data.teacher)
    return train(host(arch, 10), images, labels, data, epochs=options.epochs, seed=7)


def _student(
    public: torch.nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    data: Data,
    options: argparse.Namespace,
    seed: int,
) -> torch.nn.Module:
    torch.manual_seed(1000 * options.seed + seed)
    model = copy.deepcopy(public)
    return train(model, images, targets, data, epochs=options.epochs, seed=seed, rate=options.rate)


def _write(
    options: argparse.Namespace, leaks: list[Any], innocents: list[Any], data: Data, teacher: Any
) -> None:
    shown, labels = (part[:TEST] for part in data.test)
    right = answers(teacher, shown, data).argmax(-1) == labels
    hidden = ("out", "threads", "device", "classes")
    record = {
        "question": "Which of a thousand customers leaked?",
        "settings": {k: v for k, v in vars(options).items() if k not in hidden}
        | {"customers": CUSTOMERS, "probes": PROBES, "bank": BANK, "test": TEST},
        "teacher_accuracy": round(float(right.float().mean()), 4),
        "summary": {
            arch: {
                "leaks": sum(row["architecture"] == arch for row in leaks),
                "named": sum(row["architecture"] == arch and _named(row) for row in leaks),
                "first": sum(
                    row["architecture"] == arch and row["named"] == row["leaked_by"]
                    for row in leaks
                ),
            }
            for arch in ARCHITECTURES
        },
        "leaks": leaks,
        "innocents_named": sum(row["verdict"] == "found" for row in innocents),
        "innocents": innocents,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def _named(row: dict[str, Any]) -> bool:
    return bool(row["verdict"] == "found" and row["named"] == row["leaked_by"])


if __name__ == "__main__":
    main()
