"""What a training step costs with the mark, beside the same step without.

Two equal models take turns, so both see the same machine at the same time; ratios are reported.
The first projection, which embeds, is part of the mean and not of the median.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json
    python benchmarks/overhead.py --model vit-b --batch 256 --device cuda --dtype bf16
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_watermark import OwnerKey, Scheme
from hf_watermark.embedding import WatermarkLoss

MODELS = {"vit-ti": (192, 12, 3), "vit-s": (384, 12, 6), "vit-b": (768, 12, 12)}


def make_step(
    options: argparse.Namespace, key: OwnerKey | None
) -> tuple[Callable[[], None], WatermarkLoss | None]:
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(options.seed)
    hidden, layers, heads = MODELS[options.model]
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            num_labels=1000,
        )
    ).to(options.device)
    model.train()
    images = torch.randn(options.batch, 3, 224, 224, device=options.device)
    labels = torch.randint(0, 1000, (options.batch,), device=options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    watermark = (
        None
        if key is None
        else WatermarkLoss(model, key, Scheme(embedding=options.embedding), every=options.every)
    )
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bf16")

    def step() -> None:
        with autocast:
            loss = model(pixel_values=images, labels=labels).loss
        if watermark is not None:
            loss = watermark(loss)
        loss.backward()
        optimizer.step()
        if watermark is not None:
            watermark.step()
        optimizer.zero_grad()

    return step, watermark


def timed(step: Callable[[], None], device: str) -> tuple[float, int]:
    """Seconds of a step, and the most memory that it took on a GPU beyond what was there."""
    before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - started, torch.cuda.max_memory_allocated() - before
    return time.perf_counter() - started, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="vit-s")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--embedding", choices=["projection", "hinge"], default="projection")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    plain, _ = make_step(options, None)
    marked, watermark = make_step(options, OwnerKey(options.seed.to_bytes(32, "big")))
    timed(plain, options.device)  # allocates the optimizer's state
    pairs, memory = [], []
    for step in range(options.steps):
        first, second = (plain, marked) if step % 2 else (marked, plain)
        one, other = timed(first, options.device), timed(second, options.device)
        with_mark, without = (other, one) if step % 2 else (one, other)
        pairs.append((with_mark[0], without[0]))
        memory.append((with_mark[1], without[1]))
        print(f"step {step}: ratio {pairs[-1][0] / pairs[-1][1]:.4f}", file=sys.stderr)
    assert watermark is not None  # made with a key
    ratios = [with_mark / without for with_mark, without in pairs]
    results: dict[str, Any] = {
        "median_step_ratio": statistics.median(ratios),
        "ratio_of_medians": statistics.median(p[0] for p in pairs)
        / statistics.median(p[1] for p in pairs),
        "ratio_of_sums": sum(p[0] for p in pairs) / sum(p[1] for p in pairs),
        "ratios": ratios,
        "ber": watermark.measure().ber,
        "margin": watermark.measure().margin,
        "kept_bytes": watermark.kept_bytes,
        "model_bytes": sum(p.numel() * p.element_size() for p in watermark.model.parameters()),
    }
    if options.device == "cuda":
        results["device"] = torch.cuda.get_device_name()
        results["seconds_without"] = statistics.median(p[1] for p in pairs)
        results["seconds_with"] = statistics.median(p[0] for p in pairs)
        results["peak_bytes_with"] = max(p[0] for p in memory)
        results["peak_bytes_without"] = max(p[1] for p in memory)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    record = {
        "question": "What does a training step cost with the mark?",
        "settings": settings,
        "results": results,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
