"""Which embedding should be the default? Accuracy, margin and survival, paired with no mark.

Small hosts on CIFAR-10, ResNet and ViT of transformers, SGD and AdamW, several seeds; a marked run
has an unmarked twin with the same seed, data order and schedule. Afterwards every model is
fine-tuned on other images without the key. `looks` holds what can be seen without the key: its
distance from the twins' tells how far a mark shows. One cell at a time goes to the output, so that
an interrupted run resumes.

    python benchmarks/embedding.py --out benchmarks/results/embedding.json
    python benchmarks/embedding.py --train 500 --epochs 1 --seeds 1      # a look
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_watermark import OwnerKey, Scheme
from hf_watermark.carriers import choose_carriers
from hf_watermark.embedding import WatermarkLoss

DATA = Path(os.environ.get("HF_WATERMARK_CIFAR10", "../shared/data/cifar10"))
EMBEDDINGS: dict[str, Scheme | None] = {
    "none": None,
    "projection": Scheme(),
    "hinge": Scheme(embedding="hinge"),
    "bce": Scheme(embedding="bce"),
    "uchida": Scheme(statistic="mean", embedding="bce"),
}


def load(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a split: (n, 3, 32, 32) float32 in [-1, 1], labels."""
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    rows = parquet.read_table(next(DATA.glob(f"{split}-*.parquet"))).slice(0, count).to_pylist()
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(r["image"]["bytes"]))) for r in rows])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([row["label"] for row in rows])


def host(name: str) -> nn.Module:
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    if name == "resnet":
        return ResNetForImageClassification(
            ResNetConfig(
                embedding_size=32,
                hidden_sizes=[32, 64, 128],
                depths=[1, 1, 1],
                layer_type="basic",
                num_labels=10,
            )
        )
    return ViTForImageClassification(
        ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            num_labels=10,
        )
    )


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A flip and a shift of up to four pixels, drawn anew for every batch."""
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(-1)
    dx, dy = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return torch.roll(images, (dy, dx), (-2, -1))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(pixel_values=x).logits.argmax(-1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return right / len(labels)


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    optimizer: str,
    lr: float,
    epochs: int,
    seed: int,
    watermark: WatermarkLoss | None = None,
) -> int | None:
    """Train; the optimizer step after which every bit was right for the first time."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    chosen: torch.optim.Optimizer
    if optimizer == "sgd":
        chosen = torch.optim.SGD(
            model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
    else:
        chosen = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(chosen, lr, total_steps=steps, pct_start=0.2)
    model.train()
    step, complete = 0, None
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(128):
            logits = model(pixel_values=augmented(images[batch], generator)).logits
            loss = nn.functional.cross_entropy(logits, labels[batch])
            (loss if watermark is None else watermark(loss)).backward()
            chosen.step()
            schedule.step()
            if watermark is not None:
                watermark.step()
            chosen.zero_grad()
            step += 1
            if watermark is not None and complete is None and watermark.measure().ber == 0.0:
                complete = step
    return complete


def looks(model: nn.Module) -> list[dict[str, float]]:
    """What somebody without the key can see of every default carrier."""
    parameters = dict(model.named_parameters())
    found = []
    for carrier in choose_carriers({name: tuple(p.shape) for name, p in parameters.items()}):
        w = parameters[carrier.name].detach().double().reshape(carrier.rows, carrier.columns)
        singular = torch.linalg.svdvals(w)
        centred = w - w.mean()
        variance = centred.square().mean()
        found.append(
            {
                "rms": float(w.square().mean().sqrt()),
                "kurtosis": float(centred.pow(4).mean() / variance.square()),
                "top_singular": float(singular[0] / singular.median()),
                "column_means": float(
                    w.mean(dim=0).square().mean().sqrt() / (variance / carrier.rows).sqrt()
                ),
            }
        )
    return found


LEARNING_RATES = {
    ("resnet", "sgd"): 0.1,
    ("resnet", "adamw"): 2e-3,
    ("vit", "sgd"): 0.05,
    ("vit", "adamw"): 1e-3,
}


def cell(
    name: str, optimizer: str, embedding: str, seed: int, options: argparse.Namespace, data: Any
) -> dict[str, Any]:
    from transformers import set_seed

    set_seed(seed)
    model = host(name)
    scheme = EMBEDDINGS[embedding]
    key = OwnerKey((1000 + seed).to_bytes(32, "big"))
    lr = LEARNING_RATES[name, optimizer]
    watermark = None if scheme is None else WatermarkLoss(model, key, scheme)
    common = {"optimizer": optimizer, "seed": seed}
    complete = train(
        model, data["train"], lr=lr, epochs=options.epochs, watermark=watermark, **common
    )
    row: dict[str, Any] = {}
    if watermark is not None:
        watermark.detach()
        now = watermark.measure()
        row |= {
            "steps_to_ber_0": complete,
            "ber": now.ber,
            "margin": now.margin,
            "log10_p": now.log10_p,
        }
    row["accuracy"] = accuracy(model, *data["test"])
    row["looks"] = looks(model)
    rates = {"ft_1x": 0.1, "ft_10x": 1.0}  # of the training's own peak
    for label, factor in rates.items():
        attacked = copy.deepcopy(model)
        train(attacked, data["other"], lr=factor * lr, epochs=options.attack_epochs, **common)
        row[f"{label}_accuracy"] = accuracy(attacked, *data["test"])
        if scheme is not None:
            reader = WatermarkLoss(attacked, key, scheme)
            row[f"{label}_ber"] = reader.measure().ber
            row[f"{label}_log10_p"] = reader.measure().log10_p
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"])
    parser.add_argument("--embeddings", nargs="+", choices=EMBEDDINGS, default=list(EMBEDDINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--attack-epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    images, labels = load("train", options.train + 3000)
    data = {
        "train": (images[: options.train], labels[: options.train]),
        "other": (images[options.train :], labels[options.train :]),
        "test": load("test", 2000),
    }
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "threads")}
    record: dict[str, Any] = {
        "question": "Which embedding should be the default?",
        "settings": {**settings, "batch": 128, "learning_rates": "one cycle, see the script"},
        "results": {},
    }
    if options.out is not None and options.out.exists():
        record["results"] = json.loads(options.out.read_text())["results"]
    cells = itertools.product(
        range(options.seeds), options.hosts, options.optimizers, options.embeddings
    )
    for seed, name, optimizer, embedding in cells:
        label = f"{name}/{optimizer}/{embedding}/{seed}"
        if label in record["results"]:
            continue
        record["results"][label] = cell(name, optimizer, embedding, seed, options, data)
        print(label, record["results"][label], file=sys.stderr, flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
