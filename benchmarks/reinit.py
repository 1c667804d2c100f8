"""What does it cost a thief to draw every layer anew that might carry a mark?

The rule by which carriers are chosen is public, so all of them can be drawn anew and trained again;
no mark in them survives that. An owner may name other layers, which the public claim does not tell:
here every layer of every block carries the mark. Then the thief has to draw all of them anew. Each
row is the best that he gets of several ways to train again; he has 2,000 images that the host was
not trained on. Hosts are the unmarked ones of `survival.py`, marked in closed form.

    python benchmarks/reinit.py --cache runs/survival --out benchmarks/results/reinit.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import embedding
import survival
import torch
from torch import nn

from hf_watermark import demo
from hf_watermark.carriers import choose_carriers
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.direct import embed_checkpoint
from hf_watermark.evidence import Claim
from hf_watermark.files import FolderFiles
from hf_watermark.stress.attacks import Means
from hf_watermark.stress.training import Recipe, train
from hf_watermark.stress.victims import Victim
from hf_watermark.verify import verify_hub_model

HOSTS = {"resnet": "encoder.", "vit": "vit.layers."}  # and the names of what lies in blocks
RECIPES = {"1x": (1.0, 8), "10x": (10.0, 8), "10x, longer": (10.0, 20)}
REDRAWN = {"default": ("none", "default"), "every layer": ("default", "every layer")}


def matrices(model: nn.Module, host: str) -> dict[str, nn.Parameter]:
    """Every convolution and linear layer of every block."""
    named = model.named_parameters()
    return {name: p for name, p in named if p.ndim >= 2 and HOSTS[host] in name}


@torch.no_grad()
def drawn_anew(model: Any, host: str, redrawn: str) -> list[str]:
    """Change a model in place: normal weights of the size they had, biases of zero."""
    layers = matrices(model, host)
    if redrawn == "default":
        chosen = choose_carriers({name: tuple(p.shape) for name, p in layers.items()})
        layers = {carrier.name: layers[carrier.name] for carrier in chosen}
    elif redrawn == "none":
        layers = {}
    parameters = dict(model.named_parameters())
    for name, weight in layers.items():
        weight.copy_(weight.std(correction=0) * torch.randn_like(weight))
        bias = parameters.get(f"{name.removesuffix('weight')}bias")
        if bias is not None:
            bias.zero_()
    return list(layers)


def measured(
    host: str, seed: int, hosts: survival.Hosts, data: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """One host: both marks, what is drawn anew, and what is left."""
    twin, about = hosts.get_twin(host, seed)
    key = survival.key_of(seed)
    means = Means(*data["attackers"], seed, 1, survival.OF_PEAK * survival.PEAKS[host], 64)
    found: dict[str, Any] = {"accuracy_unmarked": about["accuracy"], "marks": {}}

    def told(model: Any, folder: Path, claim: Claim) -> dict[str, Any]:
        read = verify_hub_model(folder, key, claim=claim, read="all")
        accuracy = embedding.accuracy(model, *data["test"])
        return {"accuracy": accuracy, "log10_p": read.log10_p, "found": read.found}

    with tempfile.TemporaryDirectory() as temporary:
        for mark, cases in REDRAWN.items():
            folder, stolen = Path(temporary) / mark, Path(temporary) / "stolen"
            names = in_blocks(twin, host) if mark == "every layer" else None
            claim = embed_checkpoint(twin, key, folder, carriers=names).claim
            model = Victim(folder).model.to(options.device)
            row = found["marks"][mark] = told(model, folder, claim)
            row |= {"carriers": len(claim.carriers), "redrawn": {case: {} for case in cases}}
            for redrawn, (recipe, (rate, epochs)) in itertools.product(cases, RECIPES.items()):
                torch.manual_seed(seed)
                attacked = copy.deepcopy(model)
                layers = drawn_anew(attacked, host, redrawn)
                train(attacked, means, Recipe(rate, epochs))
                attacked.save_pretrained(stolen)
                cell = told(attacked, stolen, claim) | {"layers": len(layers)}
                row["redrawn"][redrawn][recipe] = cell
                said = f"{host}/{seed}: {mark}, {redrawn} drawn anew, {recipe}: {cell}"
                print(f"{time.strftime('%H:%M:%S')} {said}", file=sys.stderr, flush=True)
    return found


def in_blocks(folder: Path, host: str) -> list[str]:
    """What the layers of the blocks are called in the file, which may differ from the module."""
    shapes = Checkpoint.open(FolderFiles(folder)).shapes()
    names = [name for name, shape in shapes.items() if len(shape) >= 2 and "encoder." in name]
    assert len(names) == len(matrices(Victim(folder).model, host))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="Of survival.py: its hosts are taken.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(namespace=argparse.Namespace(**survival.SMALL))
    if options.threads:
        torch.set_num_threads(options.threads)
    demo._quiet()
    data = survival.load(options)
    record: dict[str, Any] = {
        "question": "What does it cost to draw anew every layer that might carry a mark?",
        "settings": {
            **{name: getattr(options, name) for name in survival.SETTINGS if "epoch" not in name},
            "epochs": options.epochs,
            "recipes": {name: {"rate": r, "epochs": e} for name, (r, e) in RECIPES.items()},
            "seeds": options.seeds,
            "torch": torch.__version__,
        },
        "results": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        hosts = survival.Hosts(cache, data, options, lambda said: print(said, file=sys.stderr))
        for seed in range(options.seeds):
            for host in options.hosts:
                record["results"][f"{host}/{seed}"] = measured(host, seed, hosts, data, options)
                if options.out is not None:
                    survival.write(options.out, record)
    if options.out is None:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
