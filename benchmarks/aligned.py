"""Does the aligned reading find disguised copies, and does it leave p-values alone?

Small ResNets, ViTs, ConvNeXts and Swins learn scikit-learn's digits and are marked in closed form.
*Survival*: a copy is disguised in every way at once, then fine-tuned, read raw and aligned. *Null*:
wrong keys read models that never saw any, random, trained, and trained from the very start of the
owner's, all aligned with a trained reference. *Trained marks*: owners who trained with different
keys read such models with their own, aligned: what training carries from the key into the tensors
that are compared shows, and is why such marks have no aligned reading. *Seals*: what the same
owners read with the keys of their seals, which no training saw.

    python benchmarks/aligned.py --out benchmarks/results/aligned.json     # a quarter of an hour
    python benchmarks/aligned.py --keys 50 --owners 3                      # two minutes
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from scipy.stats import kstest
from torch import nn

from hf_watermark import OwnerKey, Scheme
from hf_watermark.direct import embed_checkpoint
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.evidence import Seal
from hf_watermark.extraction import Extraction
from hf_watermark.projections import Projection

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the disguises are tested there
from disguised_models import DISGUISES, MODELS, Tensors, aligned, carriers_of, reading, save
from marked_models import another_key

OWNER = OwnerKey(bytes(range(32)), "acme")
HOSTS = ("basic", "ViT", "ConvNext", "Swin")
RATE = 1e-3
SCHEME = Scheme(bits=64)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 images, (n, 3, 32, 32), and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 8.0 - 1.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x = nn.functional.interpolate(x, size=32, mode="bilinear").repeat(1, 3, 1, 1)
    return x, torch.tensor(labels)


def train(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    steps: int,
    rate: float,
    seed: int,
    key: OwnerKey | None = None,
) -> Seal | None:
    """AdamW on batches of 64; with a key, the projected step of its mark, then a seal."""
    watermark = None if key is None else WatermarkLoss(model.train(), key, SCHEME)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=random)
        model.train()
        loss = nn.functional.cross_entropy(model(pixel_values=x[batch]).logits, y[batch])
        optimizer.zero_grad()
        (loss if watermark is None else watermark(loss)).backward()
        optimizer.step()
        if watermark is not None:
            watermark.step()
    if watermark is not None:
        watermark.project()
        seal = watermark.seal()
        watermark.release()
        return seal
    return None


def saved(model: Any) -> Tensors:
    """The tensors under the names that transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def marked(model: Any) -> Tensors:
    """The tensors with the owner's mark in closed form."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "plain")
        embed_checkpoint(Path(folder) / "plain", OWNER, Path(folder) / "marked", scheme=SCHEME)
        return load_file(Path(folder) / "marked" / "model.safetensors")


def loaded(tensors: Tensors, config: Any) -> Any:
    """A model of these tensors; its hidden layers may have grown."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), tensors, config.to_dict())
        return transformers.AutoModelForImageClassification.from_pretrained(folder)


def accuracy(model: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of the images given."""
    with torch.no_grad():
        return float((model.eval()(pixel_values=x).logits.argmax(1) == y).double().mean())


def new(host: str, seed: int) -> Any:
    """A new model."""
    torch.manual_seed(seed)
    return MODELS[host]()


def log10_p(tensors: Tensors, arrays: dict[str, np.ndarray] | None) -> dict[str, float]:
    """Of one whole reading by the owner's key, not corrected; nothing where shapes differ."""
    if arrays is None:
        return {"log10_p": 0.0, "matched": 0.5 * SCHEME.bits}
    found = reading(tensors, arrays, OWNER, SCHEME)
    return {"log10_p": found.log10_p, "matched": found.matched}


def survival(host: str, steps: int, x: torch.Tensor, y: torch.Tensor) -> list[dict[str, Any]]:
    """The mark in disguised and fine-tuned copies."""
    split = 1200
    model = new(host, 0)
    train(model, x[:split], y[:split], steps=steps, rate=RATE, seed=0)
    own = marked(model)
    disguised = DISGUISES[host]["all"](own)
    rows = []
    for name, times, more in (
        ("as it is", 0.0, 0),
        ("fine-tuned at 1x", 1.0, steps),
        ("fine-tuned at 10x", 10.0, steps),
    ):
        copy = loaded(disguised, model.config)
        if more:
            train(copy, x[split:], y[split:], steps=more, rate=times * RATE, seed=9)
        stolen = saved(copy)
        names = [carrier.name for carrier in carriers_of(own)]
        same = all(stolen[n].shape == own[n].shape for n in names)
        raw = {n: stolen[n].numpy() for n in names} if same else None
        rows.append(
            {
                "host": host,
                "copy": name,
                "accuracy": accuracy(copy, x[:split], y[:split]),
                "accuracy_of_the_owner": accuracy(loaded(own, model.config), x[:split], y[:split]),
                "raw": log10_p(own, raw),
                "aligned": log10_p(own, aligned(own, stolen)),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def innocents(host: str, count: int, steps: int, x: torch.Tensor, y: torch.Tensor) -> list[Tensors]:
    """Random models, trained ones, and trained ones from the owner's start; half in disguise."""
    found = []
    for number in range(count):
        model = new(host, 0 if number % 3 == 2 else 100 + number)
        if number % 3:
            train(model, x, y, steps=steps, rate=RATE, seed=number)
        tensors = saved(model)
        found.append(DISGUISES[host]["all"](tensors) if number % 2 else tensors)
    return found


def null(host: str, args: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Wrong keys on innocent models, and owners' own keys on them."""
    model = new(host, 0)
    train(model, x, y, steps=args.steps, rate=RATE, seed=0)
    reference = marked(model)
    suspects = innocents(host, args.models, args.steps, x, y)
    found = [aligned(reference, suspect) for suspect in suspects]
    carriers = carriers_of(reference)
    soft = np.empty((args.keys, len(found)))
    for number, arrays in enumerate(found):
        for k in range(args.keys):  # other keys for each model: models of one start are alike
            key = another_key(args.first_key + number * args.keys + k)
            extraction = Extraction(Projection(key, SCHEME, carriers))
            for i, carrier in enumerate(carriers):
                extraction.add(i, 0, arrays[carrier.name])
            soft[k, number] = extraction.reading().soft
    own: dict[str, list[float]] = {"unrelated": [], "same start": []}
    sealed: dict[str, list[float]] = {"unrelated": [], "same start": []}
    for number in range(args.owners):
        key = another_key(500_000 + number)
        model = new(host, 0)
        seal = train(model, x, y, steps=args.steps, rate=RATE, seed=0, key=key)
        assert seal is not None
        reference = saved(model)
        derived, scheme = key.sealed(seal.nonce), Scheme.from_name(seal.scheme)
        for place, suspect in enumerate(suspects[:6]):
            kind = "same start" if place % 3 == 2 else "unrelated"
            arrays = aligned(reference, suspect)
            own[kind].append(reading(reference, arrays, key, SCHEME).soft)
            sealed[kind].append(reading(reference, arrays, derived, scheme).soft)
    row = {
        "host": host,
        "keys": args.keys,
        "models": args.models,
        "wrong_keys": summary(soft.ravel()),
        "smallest_ks_p_of_a_model": min(kstest(column, "norm").pvalue for column in soft.T),
        "owners": args.owners,
        "trained_marks_own_keys": {k: summary(np.array(v)) for k, v in own.items() if v},
        "seals_own_keys": {k: summary(np.array(v)) for k, v in sealed.items() if v},
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def summary(soft: np.ndarray) -> dict[str, float]:
    """How near to N(0, 1) statistics lie."""
    return {
        "count": soft.size,
        "mean": float(soft.mean()),
        "standard_error": 1.0 / math.sqrt(soft.size),
        "variance": float(soft.var()),
        "largest": float(soft.max()),
        "ks_p": float(kstest(soft, "norm").pvalue),
        "rate_at_1e-3": float((soft > 3.0902).mean()),
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(MODELS))
    parser.add_argument("--keys", type=int, default=2000)
    parser.add_argument("--first-key", type=int, default=10_000, help="Others give other keys.")
    parser.add_argument("--null-only", action="store_true", help="No disguised copies.")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--owners", type=int, default=24)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    x, y = digits()
    record = {
        "settings": {
            **{k: v for k, v in vars(args).items() if k != "out"},
            "seed": 0,
            "rate": RATE,
            "scheme": SCHEME.name,
            "data": "scikit-learn's digits, 32 x 32",
        },
        "survival": []
        if args.null_only
        else [row for host in args.hosts for row in survival(host, args.steps, x, y)],
        "null": [null(host, args, x, y) for host in args.hosts],
    }
    record["settings"]["seconds"] = round(time.perf_counter() - started)
    text = json.dumps(record, indent=1) + "\n"
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
