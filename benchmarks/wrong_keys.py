"""Do 100,000 wrong keys raise as many false alarms as the p-value says, no more and no fewer?

Every key is fresh and reads every model through `Projection` and `Extraction`, as `verify` does.
The models have a single carrier that one look reads whole, so the plan counts one try and its
p-value is that of the reading; `verify_hub_model` itself reads one of them with the first keys, as
a check. The models: random weights; trained on CIFAR-10; trained with another owner's mark; that
one with nine tenths pruned and one row a hundred times too large; and nothing but ones. Under the
null hypothesis weights do not matter, so nasty ones are as good as any. One key reads all models:
the keys are independent of one another, the rows of the result are not.

    python benchmarks/wrong_keys.py --out benchmarks/results/wrong_keys.json
    python benchmarks/wrong_keys.py --keys 1000 --train 640      # a look
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedding import load
from safetensors.torch import save_file
from scipy.stats import binom, binomtest, kstest
from torch import Tensor, nn

from hf_watermark import OwnerKey, Scheme
from hf_watermark.carriers import choose_carriers
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.extraction import Extraction, Rows
from hf_watermark.projections import Projection
from hf_watermark.verify import verify_hub_model

ALPHAS = (1e-2, 1e-3, 1e-4)
CONFIDENCE = 0.99
SCHEMES = {
    "spread": Scheme(),
    "mean": Scheme(statistic="mean", embedding="bce"),  # Uchida et al. 2017
}
BATCH, RATE = 64, 0.05


class Block(nn.Module):
    """Two convolutions, the second of which is the carrier: 64 bits need 4,096 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 32, h / 2, w / 2)."""
        return self.second(self.first(x).relu()).relu()


class Small(nn.Module):
    """The smallest network that has a carrier by the default rule."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.classifier(self.blocks[0](x).mean(dim=(2, 3)))


def key_of(label: str) -> OwnerKey:
    return OwnerKey(hashlib.sha256(label.encode()).digest(), "benchmark")


def trained(data: tuple[Tensor, Tensor], epochs: int, seed: int, owner: OwnerKey | None) -> Small:
    torch.manual_seed(seed)
    model = Small().train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    watermark = None if owner is None else WatermarkLoss(model, owner)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[0])).split(BATCH):
            loss = nn.functional.cross_entropy(model(data[0][batch]), data[1][batch])
            (loss if watermark is None else watermark(loss)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if watermark is not None:
                watermark.step()
    if watermark is not None:
        watermark.detach()
    return model.eval()


def models(options: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """The suspects' weights."""
    data = load("train", options.train)
    torch.manual_seed(options.seed)
    found = {
        "random weights": Small(),
        "trained": trained(data, options.epochs, options.seed, None),
        "another owner's mark": trained(
            data, options.epochs, options.seed, key_of("another owner")
        ),
    }
    weights = {
        name: {k: v.clone() for k, v in one.state_dict().items()} for name, one in found.items()
    }
    name = "blocks.0.second.weight"
    pruned = {k: v.clone() for k, v in weights["another owner's mark"].items()}
    size = pruned[name].abs()
    pruned[name][size < size.flatten().quantile(0.9)] = 0.0
    pruned[name][0] *= 100.0
    weights["another's mark, pruned, one row x 100"] = pruned
    weights["nothing but ones"] = {k: torch.ones_like(v) for k, v in pruned.items()}
    return weights


def judged(log10_p: np.ndarray) -> dict[str, Any]:
    """Counts of false alarms beside what a binomial allows, and the whole distribution."""
    n = len(log10_p)
    rows = {}
    for alpha in ALPHAS:
        count = int((log10_p <= np.log10(alpha)).sum())
        low, high = (int(x) for x in binom.interval(CONFIDENCE, n, alpha))
        rate = binomtest(count, n, alpha).proportion_ci(CONFIDENCE, "exact")
        rows[f"{alpha:g}"] = {
            "count": count,
            "expected": n * alpha,
            "interval": [low, high],
            "inside": low <= count <= high,
            "rate_interval": [float(rate.low), float(rate.high)],
        }
    return {
        "alphas": rows,
        "ks_p": float(kstest(10.0**log10_p, "uniform").pvalue),
        "smallest_log10_p": float(log10_p.min()),
    }


def same_as_verify(weights: dict[str, Tensor], log10_p: np.ndarray, seed: int) -> dict[str, Any]:
    """What `verify_hub_model` says of a model to the first keys, against what was counted."""
    apart, tries = [], set()
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / "model.safetensors")
        for i, ours in enumerate(log10_p):
            evidence = verify_hub_model(folder, key_of(f"wrong/{seed}/{i}"))
            assert evidence.log10_p is not None
            apart.append(abs(evidence.log10_p - ours))
            tries.add(evidence.tries)
    return {"keys": len(apart), "tries": sorted(tries), "largest_difference": float(max(apart))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--train", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES),
                        help="with spread among them")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    began, used = time.perf_counter(), time.process_time()
    suspects = models(options)
    shapes = {k: tuple(v.shape) for k, v in suspects["trained"].items()}
    carriers = choose_carriers(shapes)
    (carrier,) = carriers
    rows = [Rows.of(one[carrier.name].numpy(), carrier.columns) for one in suspects.values()]
    schemes = {name: SCHEMES[name] for name in options.schemes}
    found = np.empty((len(schemes), len(rows), options.keys))
    for i in range(options.keys):
        key = key_of(f"wrong/{options.seed}/{i}")
        for s, scheme in enumerate(schemes.values()):
            projection = Projection(key, scheme, carriers)
            for m, block in enumerate(rows):
                extraction = Extraction(projection)
                extraction.add(0, 0, block)
                found[s, m, i] = extraction.reading().log10_p
        if (i + 1) % 10_000 == 0:
            print(
                f"{i + 1:,} keys, {time.process_time() - used:.0f} s", file=sys.stderr, flush=True
            )
    owner = Extraction(Projection(key_of("another owner"), SCHEMES["spread"], carriers))
    owner.add(0, 0, rows[list(suspects).index("another owner's mark")])
    default = found[options.schemes.index("spread"), list(suspects).index("trained")]
    record = {
        "question": "Do wrong keys raise as many false alarms as the p-value says?",
        "settings": {
            **{k: v for k, v in vars(options).items() if k not in ("out", "threads")},
            "carrier": list(carrier.shape),
            "confidence": CONFIDENCE,
            "schemes": {name: scheme.name for name, scheme in schemes.items()},
        },
        "results": {
            name: {label: judged(found[s, m]) for m, label in enumerate(suspects)}
            for s, name in enumerate(schemes)
        },
        "the_owner_of_the_mark": owner.reading().log10_p,
        "verify": same_as_verify(suspects["trained"], default[:20], options.seed),
        "processor_seconds": time.process_time() - used,
        "seconds": time.perf_counter() - began,
    }
    print(json.dumps(record, indent=2), file=sys.stderr)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
