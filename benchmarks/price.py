"""What margin mode costs the teachers of `distillation.py`, on every image they did not learn from.

The price that is expected beforehand takes the model's probabilities at their word. Here accuracy
is counted, before and after, for the owner's own key and ten customers, on the 40,000 images of
CIFAR-10 that the teacher was not trained on. The standard error is over images.

    python benchmarks/price.py --cache runs/distillation --out benchmarks/results/price.json
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from distillation import MARGIN, Run, add_options
from students import Data, answers
from torch import Tensor

CUSTOMERS = 10
PARTS = ("queries", "calibration", "reference", "probes", "test")


def price(run: Run) -> dict[str, Any]:
    """Points of accuracy lost, with standard errors, by one seed's teacher."""
    images, labels = (torch.cat([getattr(run.data, part)[i] for part in PARTS]) for i in range(2))

    def right(model: Any) -> Tensor:
        return answers(model, images, run.data).argmax(-1).eq(labels).double()

    before = right(run.teacher)
    keys = [run.firm, *(run.firm.for_recipient(f"customer-{i}") for i in range(CUSTOMERS))]
    lost = 100.0 * torch.stack([before - right(one) for one in keys])
    customers = lost[1:].mean(0)
    found = {
        "images": len(labels),
        "accuracy": before.mean().item(),
        "expected": 100.0 * (run.firm.expected_price or 0.0),
        "own": lost[0].mean().item(),
        "own_standard_error": lost[0].std().item() / len(labels) ** 0.5,
        "customers": [one.mean().item() for one in lost[1:]],
        "customers_mean": customers.mean().item(),
        "customers_standard_error": customers.std().item() / len(labels) ** 0.5,
    }
    print(f"seed {run.seed}: {found}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    hidden = ("out", "cache", "threads", "device")
    settings = {k: v for k, v in vars(options).items() if k not in hidden}
    data = Data(options)
    record = {
        "question": "What does margin mode cost?",
        "settings": settings
        | {"margin": options.margin or MARGIN[options.classes], "customers": CUSTOMERS},
        "results": {str(seed): price(Run(seed, data, options)) for seed in options.seeds},
    }
    text = json.dumps(record, indent=1) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
