"""What serving with marked soft labels costs, and whether it ever changes the top class.

`cost`: a ViT-B and the same model wrapped take turns on one batch, so both see the same machine;
beside the ratio of whole forward passes, which any machine shakes by more than that, stands the
added part alone, timed on a pass's own features and logits, as a share of the forward. `flips`:
small models with random weights answer 10,000 images of CIFAR-10, clean and marked, for every
number of classes, kind of features and precision; and in margin mode, where only the top two may
change places, and only if they are closer than tau.

    python benchmarks/served.py --out benchmarks/results/served.json
    python benchmarks/served.py --inputs 500 --batch 4 --pairs 2                 # a look
    python benchmarks/served.py --parts cost --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from embedding import load
from torch import Tensor, nn

from hf_watermark import OwnerKey
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.answers import logits_of

MARGIN = (0.2, 0.3)
CLASSES = (2, 10, 100, 1000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# What it costs ----------------------------------------------------------------------------------


class Stand(nn.Module):
    """A small body under a large model's own head: calibration needs thousands of passes."""

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.body = nn.Linear(192, classifier.in_features)
        self.classifier = classifier

    def forward(self, pixel_values: Tensor) -> Tensor:  # noqa: D102
        small = nn.functional.adaptive_avg_pool2d(pixel_values, 8)
        return self.classifier(torch.tanh(self.body(small.flatten(1))))


def wrapped(model: nn.Module, features: str, key: OwnerKey) -> SoftLabelWatermark:
    """A ViT in its watermark. The arithmetic of serving is the same whatever was learnt."""
    stand = SoftLabelWatermark(Stand(model.classifier).to(model.device), key, features=features)
    images = torch.randn(4000, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    stand.calibrate(images, batch_size=500)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watermark"
        stand.save(path)
        stand.detach()
        return SoftLabelWatermark.load(path, model, key)


def seconds(call: Callable[[], Any], device: str) -> float:
    """Processor time, which other work on the machine hardly changes; on a GPU, a clock's."""
    if device == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def cost(classes: int, features: str, options: argparse.Namespace) -> dict[str, Any]:
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(options.seed)
    model = ViTForImageClassification(ViTConfig(num_labels=classes)).to(options.device).eval()
    served = wrapped(model, features, OwnerKey(options.seed.to_bytes(32, "big"))).eval()
    x = torch.randn(options.batch, 3, 224, 224, device=options.device)
    _, tap = served.lens.require()
    tap.listen()
    logits = logits_of(model(pixel_values=x), labelled=False)
    own = tap.heard()
    added = [seconds(lambda: served._bend(own, logits, x), options.device) for _ in range(32)][2:]
    pairs: list[tuple[float, float]] = []
    for turn in range(options.pairs if features == "H" else 0):
        order = [served, model] if turn % 2 else [model, served]
        times = {id(m): seconds(lambda m=m: m(pixel_values=x), options.device) for m in order}
        pairs.append((times[id(served)], times[id(model)]))
        print(f"K {classes} {features}: {pairs[-1][0] / pairs[-1][1]:.4f}", file=sys.stderr)
    found: dict[str, Any] = {"added_seconds": statistics.median(added), "load": os.getloadavg()[0]}
    if pairs:
        forward = statistics.median(plain for _, plain in pairs)
        found |= {
            "median_forward_ratio": statistics.median(marked / plain for marked, plain in pairs),
            "ratio_of_sums": sum(p[0] for p in pairs) / sum(p[1] for p in pairs),
            "ratios": [marked / plain for marked, plain in pairs],
            "forward_seconds": forward,
        }
    served.detach()
    return found


# What it changes --------------------------------------------------------------------------------


def small(family: str, classes: int) -> nn.Module:
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    if family == "vit":
        return ViTForImageClassification(
            ViTConfig(
                image_size=32,
                patch_size=8,
                hidden_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=192,
                num_labels=classes,
            )
        )
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 96], depths=[1] * 3, num_labels=classes
        )
    )


@torch.no_grad()
def sharpened(model: nn.Module, images: Tensor) -> nn.Module:
    """In eval mode, with a head whose logits are centred and vary by about two."""
    model.eval()
    *_, head = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    head.weight.mul_(2.0 / model(images).logits.std(0).mean())
    head.bias.sub_(model(images).logits.mean(0))
    return model


@torch.no_grad()
def compared(served: SoftLabelWatermark, images: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The clean model beside the marked one, image by image."""
    found = {"inputs": 0, "changed": 0, "flips": 0, "beyond_the_top_two": 0, "beyond_tau": 0}
    distance = widest = 0.0
    for batch in images.to(dtype).split(500):
        clean, marked = (m(pixel_values=batch).logits for m in (served.model, served))
        p, q = clean.float().softmax(-1), marked.float().softmax(-1)
        one, other = clean.argmax(-1), marked.argmax(-1)
        flipped = one != other
        best = clean.float().topk(2).values
        gap = p.gather(1, one[:, None])[:, 0] - p.gather(1, other[:, None])[:, 0]
        found["inputs"] += len(batch)
        found["changed"] += int((clean != marked).any(-1).sum())
        found["flips"] += int(flipped.sum())
        # By value: classes that tie for the second place are both second.
        second = clean.float().gather(1, other[:, None])[:, 0] == best[:, 1]
        found["beyond_the_top_two"] += int((flipped & ~second).sum())
        found["beyond_tau"] += int((flipped & (gap >= MARGIN[1])).sum())
        widest = max([widest, *gap[flipped].tolist()])
        distance += float(0.5 * (p - q).abs().sum())
    return found | {"widest_gap": widest, "mean_tv": distance / found["inputs"]}


def flips(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import set_seed

    images, _ = load("test", options.inputs)
    calibration, _ = load("train", 2000)
    rows: dict[str, Any] = {}
    for family, classes, features in itertools.product(("vit", "resnet"), CLASSES, ("H", "M")):
        for mode, margin in (("soft", None), ("margin", MARGIN)):
            for name, dtype in DTYPES.items():
                set_seed(options.seed)
                model = sharpened(small(family, classes), calibration[:500])
                eps = 2.0 if classes == 2 else 1.0
                key = OwnerKey((options.seed + 1).to_bytes(32, "big"))
                served = SoftLabelWatermark(model, key, eps, features, margin)
                served.calibrate(calibration).eval().to(dtype)
                cell = f"{mode}/{family}/{classes}/{features}/{name}"
                rows[cell] = compared(served, images, dtype)
                print(cell, rows[cell], file=sys.stderr)
    return rows


def write(record: dict[str, Any], path: Path | None) -> None:
    text = json.dumps(record, indent=2)
    if path is None:
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=["cost", "flips"], default=["cost", "flips"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="for the cost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="what it holds of other parts stays")
    options = parser.parse_args()
    record: dict[str, Any] = {"question": "What does serving marked soft labels cost and change?"}
    if options.out is not None and options.out.exists():
        record = json.loads(options.out.read_text())
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "parts")}
    record["settings"] = settings | {"margin": MARGIN, "threads": torch.get_num_threads()}
    results = record.setdefault("results", {})
    if "cost" in options.parts:
        results["cost"] = {}
        for classes in (1000, 10):
            own, mixed = (cost(classes, features, options) for features in ("H", "M"))
            for features, found in (("H", own), ("M", mixed)):
                found["added_share"] = found["added_seconds"] / own["forward_seconds"]
                results["cost"][f"{classes}/{features}"] = found
            write(record, options.out)
    if "flips" in options.parts:
        results["flips"] = flips(options)
    write(record, options.out)


if __name__ == "__main__":
    main()
