"""What verifying costs beside loading: bytes, wall time, peak memory.

Marked ViTs of full size lie on a loopback Hub. `verify_hub_model` and `from_pretrained` of the same
repo run turn by turn, each in a process of its own with an empty cache, so that only their ratio is
reported: both see the same machine at the same time.

    python benchmarks/verify_cost.py --out benchmarks/results/verify_cost.json
    python benchmarks/verify_cost.py --models tiny --runs 1        # seconds, for a look
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hf_watermark import OwnerKey, Scheme
from hf_watermark.carriers import choose_carriers
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import make_claim
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.files import FolderFiles
from hf_watermark.testing import LoopbackHub

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    "vit-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vit-l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
LOAD = (
    "from transformers import AutoModelForImageClassification as A; import sys;"
    "A.from_pretrained(sys.argv[1])"
)
VERIFY = "from hf_watermark.cli import verify_hub_model; verify_hub_model()"
# ru_maxrss of a child starts at its parent's size; VmHWM starts anew with the program.
PEAK = (
    "import atexit, os, pathlib as p;"
    "atexit.register(lambda: p.Path(os.environ['PEAK_FILE']).write_text("
    "p.Path('/proc/self/status').read_text()));"
)


def make(name: str, key: OwnerKey, folder: Path) -> None:
    """A marked ViT with random weights: what is read does not depend on what it has learnt."""
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(0)
    size = MODELS[name]
    model = ViTForImageClassification(
        ViTConfig(**size, intermediate_size=4 * size["hidden_size"], num_labels=1000)
    )
    watermark = WatermarkLoss(model.train(), key)
    watermark.detach()
    model.save_pretrained(folder)
    checkpoint = Checkpoint.open(FolderFiles(folder))
    names = [carrier.name for carrier in choose_carriers(checkpoint.shapes())]
    claim = make_claim(checkpoint, key, Scheme(), names)
    (folder / CLAIM_FILE).write_bytes(claim.to_bytes())


def timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Run a process: wall seconds, peak resident MiB, stdout."""
    with tempfile.TemporaryDirectory() as folder:
        peak = Path(folder) / "status"
        code, *rest = arguments
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", PEAK + code, *rest],
            env={**environment, "PEAK_FILE": str(peak)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - started
        line = next(row for row in peak.read_text().splitlines() if row.startswith("VmHWM"))
        return seconds, int(line.split()[1]) / 1024, done.stdout


def measure(name: str, hub: LoopbackHub, key_file: Path, runs: int) -> dict[str, Any]:
    repo = f"demo/{name}"
    verify, load, evidence = [], [], {}
    for run in range(runs + 1):
        home = hub.folder / f"home-{name}-{run}"
        environment = {**os.environ, **hub.environment(), "HF_HOME": str(home)}
        call = [VERIFY, repo, "--key", str(key_file), "--json"]
        seconds, mib, out = timed(call, environment)
        loading, loading_mib, _ = timed([LOAD, repo], environment)
        shutil.rmtree(home, ignore_errors=True)
        if run:  # the first turn warms the disk's cache
            verify.append((seconds, mib))
            load.append((loading, loading_mib))
            evidence = json.loads(out)
        print(f"{name} run {run}: ratio {seconds / loading:.3f}", file=sys.stderr)
    ratios = [a[0] / b[0] for a, b in zip(verify, load, strict=True)]
    return {
        "verdict": evidence["verdict"],
        "log10_p": evidence["log10_p"],
        "tries": evidence["tries"],
        "bytes_read": evidence["bytes_read"],
        "bytes_total": evidence["bytes_total"],
        "share_read": evidence["bytes_read"] / evidence["bytes_total"],
        "wall_ratio_median": statistics.median(ratios),
        "wall_ratio_all": ratios,
        "peak_mib": max(mib for _, mib in verify),
        "peak_mib_from_pretrained": max(mib for _, mib in load),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit-b", "vit-l"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the key")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    key = OwnerKey(options.seed.to_bytes(32, "big"), "benchmark")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, LoopbackHub(Path(folder) / "hub") as hub:
        key.save(Path(folder) / "owner.key")
        for name in options.models:
            source = Path(folder) / name
            make(name, key, source)
            with hub.in_process():
                from huggingface_hub import HfApi

                HfApi().create_repo(f"demo/{name}")
                HfApi().upload_folder(repo_id=f"demo/{name}", folder_path=source)
            shutil.rmtree(source)
            results[name] = measure(name, hub, Path(folder) / "owner.key", options.runs)
    record = {
        "question": "What does verifying cost beside loading?",
        "command": "verify_hub_model REPO --key FILE --json, and from_pretrained(REPO)",
        "settings": {"runs": options.runs, "seed": options.seed, "scheme": Scheme().name},
        "results": results,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
