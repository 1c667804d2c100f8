"""Which mark survives which attack? Uchida's mean and three ways to embed ours, on CIFAR-10.

Every host is trained once per scheme and seed, from the same start and in the same order as its
unmarked twin; the closed form marks the twin, and "sealed" is the model of the projected step with
the seal that `WatermarkTrainer` adds. The attack suite of `hf_watermark.stress` then
attacks each with images that no host was trained on, and every copy is read as `verify` reads it.
Fine-tuning at "1x" is a tenth of the owner's peak rate, so "10x" is that peak. A mark is removed
if it is not found while accuracy fell by less than five points (Lukas et al., S&P 2022).

Models and cells are kept in --cache, one at a time: an interrupted run goes on from there, and more
hosts, schemes, seeds or attacks are added to what --out holds. Other settings are refused.

    python benchmarks/survival.py --cache runs/survival --out benchmarks/results/survival.json
    python benchmarks/survival.py --hosts wrn-10-4 --size 16 --cache DIR --out FILE
    python benchmarks/survival.py --train 1000 --epochs 2 --seeds 1 --hosts resnet   # a look
    python benchmarks/survival.py --full --cache DIR --out FILE   # WRN-10-4, all attacks, a GPU
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embedding
import survival_tables
import torch
from torch import Tensor, nn
from transformers import set_seed

from hf_watermark import OwnerKey, Scheme, demo
from hf_watermark.direct import embed_checkpoint
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import WatermarkError
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.stress import Attack, Settings, Stress, attacks_of
from hf_watermark.stress.examples import Examples
from hf_watermark.stress.outcomes import Outcome
from hf_watermark.stress.table import one_line
from hf_watermark.stress.victims import Victim
from hf_watermark.verify import verify_hub_model

SCHEMES: dict[str, Scheme | None] = {
    "uchida": Scheme(statistic="mean", embedding="bce"),
    "loss": Scheme(embedding="hinge"),
    "projection": Scheme(),
    "sealed": Scheme(),  # what `WatermarkTrainer` does
    "closed form": None,  # its own default by size, written into the unmarked twin
}
# Beside the quick suite: what is known to win, or nearly.
HARD = ("prune-95", "svd-drop-4", "reinit-all", "distillation")
SMALL: dict[str, Any] = {
    "hosts": ["resnet", "vit"],
    "suite": "default",
    "train": 10_000,
    "epochs": 8,
    "attackers_images": 2_000,
    "attack_epochs": 4,
    "test_images": 2_000,
    "size": 32,
    "device": "cpu",
}
FULL: dict[str, Any] = {
    "hosts": ["wrn-10-4", "resnet18", "vit"],
    "suite": "full",
    "train": 40_000,
    "epochs": 40,
    "attackers_images": 10_000,
    "attack_epochs": 10,
    "test_images": 10_000,
    "size": 32,
    "device": "cuda",
}
# The figures depend on these; hosts, schemes, seeds and attacks only say which of them there are.
SETTINGS = (
    "train", "epochs", "attackers_images", "attack_epochs", "test_images", "size", "device"
)  # fmt: skip
UNSEALED = ("wrn-10-4",)  # no disguise of these can be undone
PEAKS = {"resnet": 2e-3, "resnet18": 2e-3, "wrn-10-4": 2e-3, "vit": 1e-3}  # AdamW, one cycle
OF_PEAK = 0.1  # what the attackers' "1x" is

Say = Callable[[str], None]


def host(name: str) -> Any:
    if name == "wrn-10-4":
        from wide_resnet import WideResNetConfig, WideResNetForImageClassification

        return WideResNetForImageClassification(WideResNetConfig(num_labels=10))
    if name == "resnet18":
        import students

        return students.host(name, 10)
    return embedding.host(name)


def load(options: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """The owner's images, the attackers', and those that nobody trains on."""
    counts = [options.train, options.attackers_images]
    images, labels = _sized("train", sum(counts), options)
    owner, attackers = zip(images.split(counts), labels.split(counts), strict=True)
    return {
        "owner": owner,
        "attackers": attackers,
        "test": _sized("test", options.test_images, options),
    }


def _sized(split: str, count: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images, labels = embedding.load(split, count)
    if options.size != images.shape[-1]:
        images = nn.functional.interpolate(images, options.size, mode="area")
    return images.to(options.device), labels.to(options.device)


# Hosts --------------------------------------------------------------------------------------------


class Hosts:
    """Marked models and their twins, each made once and kept in a folder."""

    def __init__(self, folder: Path, data: Any, options: argparse.Namespace, say: Say) -> None:
        self._folder, self._data, self._options, self._say = folder, data, options, say

    def get(self, name: str, scheme: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The model's folder, and what is known of it before any attack."""
        twin, about_twin = self.get_twin(name, seed)
        key = key_of(seed)

        def make(to: Path) -> dict[str, Any]:
            if scheme == "sealed":
                made = self._sealed(self.get(name, "projection", seed)[0], to, key)
            elif SCHEMES[scheme] is None:
                started = time.perf_counter()
                embed_checkpoint(twin, key, to)
                made = {"training_seconds": round(time.perf_counter() - started, 2)}
                made["accuracy"] = embedding.accuracy(self._loaded(to), *self._data["test"])
            else:
                made = self._train(to, name, seed, key, SCHEMES[scheme])
            read = verify_hub_model(to, key, read="all")
            other = verify_hub_model(twin, key, claim=to, read="all")
            return {
                "scheme": read.scheme,
                "carriers": len(read.carriers),
                **made,
                "accuracy_unmarked": about_twin["accuracy"],
                "found": read.found,
                "ber": read.ber,
                "log10_p": read.log10_p,
                "twin_found": other.found,
                "twin_log10_p": other.log10_p,
            }

        return self._made(name, scheme, seed, make)

    def get_twin(self, name: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The unmarked model's folder, and its accuracy."""
        return self._made(name, "none", seed, lambda to: self._train(to, name, seed))

    def _made(
        self, name: str, scheme: str, seed: int, make: Callable[[Path], dict[str, Any]]
    ) -> tuple[Path, dict[str, Any]]:
        place = self._folder / name / scheme / str(seed)
        about = place / "about.json"
        if not about.exists():  # written last: whatever else lies there was interrupted
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            known = make(place / "model")
            self._say(f"{name}/{scheme}/{seed}: {json.dumps(known)}")
            write(about, known)
        return place / "model", json.loads(about.read_text())

    def _train(
        self,
        to: Path,
        name: str,
        seed: int,
        key: OwnerKey | None = None,
        scheme: Scheme | None = None,
    ) -> dict[str, Any]:
        """Train a host, with a mark if there is a key, and save it with the owner's claim."""
        set_seed(seed)
        model = host(name).to(self._options.device)
        watermark = None if key is None else WatermarkLoss(model, key, scheme)
        started = time.perf_counter()
        embedding.train(
            model,
            self._data["owner"],
            optimizer="adamw",
            lr=PEAKS[name],
            epochs=self._options.epochs,
            seed=seed,
            watermark=watermark,
        )
        if watermark is not None:
            watermark.detach()
        seconds = round(time.perf_counter() - started, 2)
        return {"training_seconds": seconds, **self._saved(model, watermark, to)}

    def _sealed(self, folder: Path, to: Path, key: OwnerKey) -> dict[str, Any]:
        """A model that was trained with the projected step, as Trainer would have ended it."""
        model = self._loaded(folder)
        watermark = WatermarkLoss(model, key)
        if watermark.seal() is None:
            raise SystemExit(f"{folder}: no seal")
        watermark.release()
        return self._saved(model, watermark, to)

    def _saved(self, model: Any, watermark: WatermarkLoss | None, to: Path) -> dict[str, Any]:
        model.save_pretrained(to)
        if watermark is not None:
            (to / CLAIM_FILE).write_bytes(watermark.claim(to).public.to_bytes())
        return {"accuracy": embedding.accuracy(model, *self._data["test"])}

    def _loaded(self, folder: Path) -> nn.Module:
        model: nn.Module = Victim(folder).model.to(self._options.device)
        return model


def key_of(seed: int) -> OwnerKey:
    return OwnerKey((1000 + seed).to_bytes(32, "big"))


# Attacks ------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> tuple[Attack, ...]:
    if options.attacks:
        return attacks_of("full", options.attacks)
    if options.suite == "default":
        return tuple(one for one in attacks_of("full") if one.quick or one.name in HARD)
    return attacks_of(options.suite)


def attack(
    folder: Path,
    about: dict[str, Any],
    name: str,
    seed: int,
    options: argparse.Namespace,
    data: Any,
    keep: Callable[[dict[str, Outcome], Outcome | None], None],
) -> None:
    """All attacks on one model; `keep` gets what there is after each."""
    if not about["found"]:  # nothing was embedded that could be removed
        return
    victim = Victim(folder)
    victim.model.to(options.device)
    settings = Settings(seed, options.attack_epochs, OF_PEAK * PEAKS[name])
    run = Stress(
        victim, key_of(seed), Examples(*data["attackers"]), Examples(*data["test"]), settings
    )
    done: dict[str, Outcome] = {}

    def say(outcome: Outcome, number: int, planned: int) -> None:
        done[outcome.name] = outcome
        keep(done, outcome)

    keep(dict(run.run(chosen(options), folder.parent / "stress", say).outcomes), None)


def cell(outcome: Outcome, before: float) -> dict[str, Any]:
    """A row of the record; what the attack is stands once, beside the results."""
    row = outcome.to_dict()
    for name in ("name", "family", "source", "parameters"):
        del row[name]
    return {"accuracy_before": before, **row}


def write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def same_settings(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What is there already, if it was made with these settings."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    there = record["settings"]
    odd = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
    if odd:
        told = ", ".join(f"{name} is {there.get(name)}, not {settings.get(name)}" for name in odd)
        raise SystemExit(
            f"{path} was made with other settings: {told}; take those, or another --out and --cache"
        )
    return record


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="Larger defaults, for a GPU.")
    parser.add_argument("--hosts", nargs="+", choices=PEAKS)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--suite", choices=["quick", "default", "full"])
    parser.add_argument("--attacks", nargs="+", metavar="NAME", help="These, not a suite.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, help="The owner's images.")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--attackers-images", type=int)
    parser.add_argument("--attack-epochs", type=int)
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--size", type=int, help="Side of the images in pixels; 32 for the ViT.")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="Keeps models and cells, to go on from.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="A folder for survival.md and survival.png.")
    options = parser.parse_args()
    for name, value in (FULL if options.full else SMALL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parsed()
    if options.threads:
        torch.set_num_threads(options.threads)
    demo._quiet()
    try:
        attacks = chosen(options)
    except WatermarkError as error:
        raise SystemExit(str(error)) from None
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {
        "batch": 128,
        "peaks": PEAKS,
        "attackers_1x": OF_PEAK,
        "alpha": Settings().alpha,
        "torch": torch.__version__,
    }
    record: dict[str, Any] = {
        "question": "Which mark survives which attack?",
        "settings": settings,
        "attacks": {},
        "results": {},
    }
    if options.out is not None:
        record = same_settings(options.out, settings) or record
    for one in attacks_of("full"):  # in the order of the suite, whenever it was added
        if one in attacks or one.name in record["attacks"]:
            about_one = {"family": one.family, "source": one.source}
            record["attacks"].pop(one.name, None)
            record["attacks"][one.name] = about_one | {"parameters": dict(one.parameters)}

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def save() -> None:
        if options.out is not None:
            write(options.out, record)

    if "wrn-10-4" in options.hosts:
        importlib.import_module("wide_resnet")  # its saved models are opened by the auto classes
    data = load(options)
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        if same_settings(cache / "settings.json", settings) is None:
            write(cache / "settings.json", {"settings": settings})
        hosts = Hosts(cache, data, options, say)
        cells = [
            (name, scheme, seed)
            for seed in range(options.seeds)
            for name in options.hosts
            for scheme in options.schemes
            if scheme != "sealed" or name not in UNSEALED
        ]
        for name, scheme, seed in cells:
            label = f"{name}/{scheme}/{seed}"
            row = record["results"].get(label)
            if row is not None and all(
                row["cells"].get(one.name, {"status": "failed"})["status"] != "failed"
                for one in attacks
            ):
                continue
            folder, about = hosts.get(name, scheme, seed)
            row = record["results"][label] = {**about, "cells": row["cells"] if row else {}}

            def keep(
                outcomes: dict[str, Outcome],
                new: Outcome | None,
                row: dict[str, Any] = row,
                label: str = label,
            ) -> None:
                found = {k: cell(v, row["accuracy"]) for k, v in outcomes.items()}
                row["cells"] = {
                    one: (row["cells"] | found)[one]
                    for one in record["attacks"]
                    if one in row["cells"] or one in found
                }
                if new is not None:
                    say(f"{label} {one_line(new)}")
                save()

            save()
            attack(folder, about, name, seed, options, data, keep)
    if options.page is not None:
        survival_tables.write_page(record, options.page)
    if options.out is None:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
