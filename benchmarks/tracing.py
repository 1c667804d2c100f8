"""Whose copy is it, among 1,000: is the right one named, is anyone else, and what does it cost?

One ViT-B (random weights, marked on disk for its owner and one recipient) is traced, turn by turn
with loading its whole file into memory. Then copies that no recipient was handed, half with the
owner's mark and half with none, each with weights, key and names of its own, are traced. They are
small, two layers of a ViT-S, because an unmarked copy is judged to the end for every recipient; but
large enough for both looks, the first of which ends within a layer.

    python benchmarks/tracing.py --out benchmarks/results/tracing.json
    python benchmarks/tracing.py --host vit-s-2 --trials 2 --recipients 100     # for a look
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scipy.stats import beta, kstest, norm

from hf_watermark import OwnerKey, scan
from hf_watermark.direct import embed_checkpoint

MODELS: dict[str, dict[str, int]] = {
    "vit-s-2": {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6},
    "vit-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def make(name: str, seed: int, folder: Path) -> None:
    """A ViT with random weights: under no mark the statistic does not depend on them."""
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(seed)
    size = MODELS[name]
    config = ViTConfig(**size, intermediate_size=4 * size["hidden_size"], num_labels=1000)
    ViTForImageClassification(config).save_pretrained(folder)


def key_of(seed: int) -> OwnerKey:
    return OwnerKey(seed.to_bytes(32, "big"), "benchmark")


class Recorded(scan.Lineup):
    """Keeps every recipient's statistic that `trace` looks at."""

    seen: list[np.ndarray] = []  # noqa: RUF012

    def looks(self, *arguments: Any) -> Iterator[np.ndarray]:
        """As in `Lineup`."""
        for softs in super().looks(*arguments):
            self.seen.append(softs)
            yield softs


def right_one(host: str, recipients: int, runs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Trace a recipient's copy, and load it, in turns."""
    source, copy = folder / "source", folder / "copy"
    make(host, seed, source)
    key, names = key_of(seed), [f"customer-{i}" for i in range(recipients)]
    handed_to = names[recipients // 2]
    embedded = embed_checkpoint(source, key, copy, recipient=handed_to)
    shutil.rmtree(source)
    traced, processor, loading = [], [], []
    for run in range(runs + 1):
        started = time.perf_counter()
        load_file(copy / "model.safetensors")
        loaded = time.perf_counter()
        used = time.process_time()
        found = scan.trace(copy, key, names)
        if run:  # the first turn warms the disk's cache
            processor.append(time.process_time() - used)
            loading.append(loaded - started)
            traced.append(found.seconds)
        print(f"{host}: {found.recipient}, {found.seconds:.1f} s", file=sys.stderr)
    ratios = [a / b for a, b in zip(traced, loading, strict=True)]
    record = {
        "handed_to": handed_to,
        "named": found.recipient,
        "log10_p": found.log10_p,
        "runner_up_log10_p": found.runner_up_log10_p,
        "tries": found.tries,
        "scheme": embedded.claim.scheme,
        "largest_change": embedded.largest_change,
        "bytes_read": found.bytes_read,
        "bytes_total": (copy / "model.safetensors").stat().st_size,
        "seconds_median": statistics.median(traced),
        "processor_seconds_median": statistics.median(processor),
        "loading_seconds_median": statistics.median(loading),
        "ratio_to_loading_median": statistics.median(ratios),
        "ratio_to_loading_all": ratios,
    }
    shutil.rmtree(copy)
    return record


def wrong_ones(
    host: str, recipients: int, trials: int, alpha: float, seed: int, folder: Path
) -> dict[str, Any]:
    """Trace copies that nobody was handed; compare what is read with chance."""
    scan.Lineup = Recorded  # type: ignore[misc]
    looks: list[list[np.ndarray]] = []
    corrected, named, processor, seconds = [], [], [], []
    for trial in range(trials):
        source, copy = folder / "source", folder / "copy"
        make(host, seed + 1 + trial, source)
        key = key_of(seed + 1 + trial)
        if trial % 2:
            source.rename(copy)
        else:
            embed_checkpoint(source, key, copy)
            shutil.rmtree(source)
        names = [f"customer-{trial}-{i}" for i in range(recipients)]
        Recorded.seen = []
        used = time.process_time()
        found = scan.trace(copy, key, names, alpha=alpha)
        processor.append(time.process_time() - used)
        seconds.append(found.seconds)
        shutil.rmtree(copy)
        looks.append(Recorded.seen)
        corrected.append(found.log10_p)
        if found.recipient is not None:
            named.append({"trial": trial, "log10_p": found.log10_p})
        print(f"trial {trial}: {found.recipient}, {found.log10_p:.2f}, {found.seconds:.1f} s",
              file=sys.stderr)  # fmt: skip
    return {
        "copies_with_the_owners_mark": (trials + 1) // 2,
        "copies_without_any_mark": trials // 2,
        "false_names": len(named),
        "false_names_all": named,
        "smallest_corrected_log10_p": min(corrected),
        "corrected_log10_p_all": corrected,
        "corrected_p_at_most": {
            str(level): sum(value <= math.log10(level) for value in corrected)
            for level in (0.01, 0.05, 0.1, 0.2)
        },
        "looks": [chance(list(softs)) for softs in zip(*looks, strict=True)],
        "processor_seconds_median": statistics.median(processor),
        "seconds_median": statistics.median(seconds),
    }


def chance(trials: list[np.ndarray]) -> dict[str, Any]:
    """One look's uncorrected p-values, all of them and the smallest of each trial, beside theory.

    Recipients' keys are independent given the weights, so that their p-values are independent and
    uniform, and the smallest of R is Beta(1, R).
    """
    p = norm.sf(np.array(trials))
    every, smallest = kstest(p.ravel(), "uniform"), kstest(p.min(axis=1), beta(1, p.shape[1]).cdf)
    return {
        "p_values": p.size,
        "ks_of_all": {"statistic": every.statistic, "p": every.pvalue},
        "smallest": float(p.min()),
        "ks_of_the_smallest_of_each_trial": {"statistic": smallest.statistic, "p": smallest.pvalue},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", choices=MODELS, default="vit-b", help="of the right one's copy")
    parser.add_argument("--recipients", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3, help="turns of tracing and loading")
    parser.add_argument("--trials", type=int, default=100, help="copies that nobody was handed")
    parser.add_argument("--alpha", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0, help="of weights and keys")
    parser.add_argument("--folder", type=Path, help="where there is room for two copies")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, count = Path(temporary), options.recipients
        results = {
            "right_one": right_one(options.host, count, options.runs, options.seed, folder),
            "wrong_ones": wrong_ones(
                "vit-s-2", count, options.trials, options.alpha, options.seed, folder
            ),
        }
    record = {
        "question": "Is the right recipient named, is anyone named wrongly, what does it cost?",
        "command": "trace(copy, key, recipients), and safetensors.numpy.load_file(copy)",
        "settings": {
            "host": options.host,
            "host_of_copies_nobody_was_handed": {"name": "vit-s-2", **MODELS["vit-s-2"]},
            "weights": "random, from the config",
            "recipients": count,
            "runs": options.runs,
            "trials": options.trials,
            "alpha": options.alpha,
            "seed": options.seed,
            "cores": os.cpu_count(),
            "load_average_at_the_end": os.getloadavg()[0],
        },
        "results": results,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
