"""What writing a mark into a file costs: wall time beside `cp -r`, processor time, peak memory.

`embed_checkpoint` runs in a process of its own, start of Python and imports included, turn by turn
with `cp -r` of the same folder: seconds depend on the machine and who else uses it, their ratio
hardly. A ViT-B (343 MB, F32, random weights) by default; `--big` adds a sharded checkpoint of 10 GB
(BF16, 64 layers, 22 files) and needs 22 GB of disk.

    python benchmarks/embed_cost.py --big --out benchmarks/results/embed_cost.json
    python benchmarks/embed_cost.py --models tiny --runs 1        # seconds, for a look
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hf_watermark import OwnerKey
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.files import FolderFiles
from hf_watermark.verify import verify_hub_model

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    "vit-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
BIG = {"hidden_size": 2560, "num_hidden_layers": 64, "layers_a_file": 3}
EMBED = (
    "import dataclasses, json, sys;"
    "from hf_watermark import OwnerKey; from hf_watermark.direct import embed_checkpoint;"
    "done = embed_checkpoint(sys.argv[1], OwnerKey.load(sys.argv[3]), sys.argv[2]);"
    "print(json.dumps({'margin': done.margin, 'log10_p': done.log10_p,"
    " 'largest_change': done.largest_change, 'scheme': done.claim.scheme,"
    " 'carriers': [carrier.name for carrier in done.claim.carriers]}))"
)
# ru_maxrss of a child starts at its parent's size; VmHWM starts anew with the program.
PEAK = (
    "import atexit, os, pathlib as p;"
    "atexit.register(lambda: p.Path(os.environ['PEAK_FILE']).write_text("
    "p.Path('/proc/self/status').read_text()));"
)
CHUNK = 2**24


def make(name: str, folder: Path) -> None:
    """A ViT with random weights: the cost does not depend on what it has learnt."""
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(0)
    size = MODELS[name]
    model = ViTForImageClassification(
        ViTConfig(**size, intermediate_size=4 * size["hidden_size"], num_labels=1000)
    )
    model.save_pretrained(folder)


def make_big(folder: Path) -> None:
    """Layers of a transformer in BF16, the same random numbers in each, in files of 470 MB."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    hidden, layers, together = BIG.values()
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **{
            f"attention.{part}.weight": (hidden, hidden)
            for part in ("query", "key", "value", "out")
        },
        "intermediate.dense.weight": (4 * hidden, hidden),
        "output.dense.weight": (hidden, 4 * hidden),
        "layernorm.weight": (hidden,),
    }
    layer = {
        name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        for name, shape in shapes.items()
    }
    where = {}
    for first in range(0, layers, together):
        tensors = {
            f"encoder.layer.{i}.{name}": tensor.clone()
            for i in range(first, min(first + together, layers))
            for name, tensor in layer.items()
        }
        file = f"model-{first // together + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Run a process: wall seconds, seconds of processors, stdout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used, done.stdout


def measure(source: Path, key_file: Path, runs: int) -> dict[str, Any]:
    marked, copied, peak = (source.with_name(name) for name in ("marked", "copied", "status"))
    embed = [sys.executable, "-c", PEAK + EMBED, str(source), str(marked), str(key_file)]
    record: dict[str, Any] = {name: [] for name in ("embed", "copy", "peak", "processor")}
    outcome: dict[str, Any] = {}
    for run in range(runs + 1):
        for folder in (marked, copied):
            shutil.rmtree(folder, ignore_errors=True)
        copying, _, _ = timed(["cp", "-r", str(source), str(copied)], {})
        shutil.rmtree(copied)
        os.sync()  # what one of them left to be written is not the other's cost
        embedding, used, out = timed(embed, {"PEAK_FILE": str(peak)})
        os.sync()
        if run:  # the first turn warms the disk's cache
            line = next(row for row in peak.read_text().splitlines() if row.startswith("VmHWM"))
            record["embed"].append(embedding)
            record["copy"].append(copying)
            record["processor"].append(used)
            record["peak"].append(int(line.split()[1]) / 1024)
        outcome = json.loads(out)
        print(f"{source.name} run {run}: {embedding:.2f} s, cp {copying:.2f} s", file=sys.stderr)
    names = outcome.pop("carriers")
    evidence = verify_hub_model(marked, OwnerKey.load(key_file))
    checkpoint = Checkpoint.open(FolderFiles(source))
    ratios = [a / b for a, b in zip(record["embed"], record["copy"], strict=True)]
    return {
        **outcome,
        "bytes": checkpoint.bytes_total,
        "files": len(checkpoint.weight_files),
        "carriers": len(names),
        "carrier_weights": sum(checkpoint.tensors[name].weights for name in names),
        "seconds_median": statistics.median(record["embed"]),
        "seconds_all": record["embed"],
        "cp_seconds_median": statistics.median(record["copy"]),
        "cp_seconds_all": record["copy"],
        "ratio_to_cp_median": statistics.median(ratios),
        "processor_seconds_median": statistics.median(record["processor"]),
        "peak_mib": max(record["peak"]),
        "verdict": evidence.verdict,
        "bytes_changed_outside_carriers": changed_outside(source, marked, names),
    }


def changed_outside(source: Path, marked: Path, names: list[str]) -> int:
    """In how many bytes the weight files differ outside the carriers."""
    checkpoint = Checkpoint.open(FolderFiles(source))
    total = 0
    for path in checkpoint.weight_files:
        spans = sorted(
            (span.start, span.stop)
            for span in map(checkpoint.tensors.get, names)
            if span.file == path
        )
        size = (source / path).stat().st_size
        total += abs(size - (marked / path).stat().st_size)
        bounds = [0, *(bound for span in spans for bound in span), size]
        with open(source / path, "rb") as a, open(marked / path, "rb") as b:
            for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
                a.seek(start)
                b.seek(start)
                for at in range(start, stop, CHUNK):
                    count = min(CHUNK, stop - at)
                    left, right = a.read(count), b.read(count)
                    if left != right:
                        total += sum(x != y for x, y in zip(left, right, strict=True))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["vit-b"])
    parser.add_argument("--big", action="store_true", help="a checkpoint of 10 GB too")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--big-runs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the key")
    parser.add_argument(
        "--folder", type=Path, help="where there is room for two copies and a model"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    key = OwnerKey(options.seed.to_bytes(32, "big"), "benchmark")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        key.save(folder / "owner.key")
        for name in [*options.models, *(["big"] if options.big else [])]:
            source = folder / name
            if name == "big":
                make_big(source)
            else:
                make(name, source)
            runs = options.big_runs if name == "big" else options.runs
            results[name] = measure(source, folder / "owner.key", runs)
            for path in (source, folder / "marked"):
                shutil.rmtree(path)
    record = {
        "question": "What does writing a mark into a file cost?",
        "command": "python -c 'embed_checkpoint(folder, key, out)', and cp -r folder out",
        "settings": {
            "runs": options.runs,
            "big_runs": options.big_runs,
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
