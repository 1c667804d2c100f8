"""What survives of the demo's marks: the quick suite on the demo's model.

The demo's small ViT is fine-tuned on scikit-learn's digits with its mark, and sealed at the end, as
`hf-watermark demo` does it; a copy gets another mark in closed form, with another key. Both keys
face the same attacks. The attacker has all images that the owner fine-tuned on, and the learning
rate.

    python benchmarks/stress_demo.py --out benchmarks/results/stress_demo.json   # ten minutes
    python benchmarks/stress_demo.py --suite full --seed 1
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from hf_watermark import OwnerKey, demo
from hf_watermark.direct import embed_checkpoint
from hf_watermark.stress import Settings, Stress, attacks_of
from hf_watermark.stress.examples import attackers_and_test
from hf_watermark.stress.outcomes import Outcome
from hf_watermark.stress.results import write_results
from hf_watermark.stress.table import one_line
from hf_watermark.stress.victims import Victim

KEYS = {
    "trained": OwnerKey(bytes(range(32)), "demo"),
    "closed form": OwnerKey(bytes(range(32, 64)), "demo"),
}
RATE = 1e-3  # the demo's own


def make_models(folder: Path, seed: int) -> dict[str, Path]:
    """The demo's marked model, and the same with a second mark in closed form."""
    base, train, test = demo._digits()
    demo._train(demo._vit(), base, test, folder / "base", seed=0, epochs=12, save=True)
    model = AutoModelForImageClassification.from_pretrained(folder / "base")
    trained = folder / "trained"
    key = KEYS["trained"]
    demo._train(model, train, test, trained, seed=seed, epochs=8, key=key, save=True)
    side = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=side).save_pretrained(trained)
    embed_checkpoint(trained, KEYS["closed form"], folder / "closed form")
    return {name: folder / name for name in KEYS}


def write_images(folder: Path) -> Path:
    """The demo's images in two parts: those it fine-tuned on, and those it was tested on."""
    _, train, test = demo.digit_pictures()
    for part, pictures in (("train", train), ("test", test)):
        for number, row in enumerate(pictures):
            place = folder / part / str(row["label"])
            place.mkdir(parents=True, exist_ok=True)
            row["image"].save(place / f"{number:04d}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=["quick", "full"], default="quick")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Keeps models and cells, to go on from.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    demo._quiet()
    records: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        models = {name: folder / name for name in KEYS}
        if not all((model / "config.json").exists() for model in models.values()):
            models = make_models(folder, options.seed)
            write_images(folder / "images")
        for name, model in models.items():
            victim = Victim(model)
            training, test = attackers_and_test(folder / "images", victim, seed=options.seed)
            settings = Settings(options.seed, options.epochs, RATE)
            run = Stress(victim, KEYS[name], training, test, settings)

            def say(outcome: Outcome, number: int, planned: int, name: str = name) -> None:
                print(f"{name} [{number}/{planned}] {one_line(outcome)}", file=sys.stderr)

            results = folder / f"stress of {name}"
            record = run.run(attacks_of(options.suite), results, say)
            write_results(record, results)
            records[name] = record.to_dict()
    content = {
        "question": "Which attacks remove the demo's marks?",
        "settings": {
            "suite": options.suite,
            "epochs": options.epochs,
            "seed": options.seed,
            "torch": torch.__version__,
        },
        "results": records,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    else:
        print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
