"""Does a student distilled from marked answers carry the mark, and does anybody else seem to?

A teacher of CIFAR-10 answers queries through `SoftLabelWatermark`; students learn from the answers
alone; the owner reads their signs from the students' outputs. Beside them stand innocents: students
of the clean teacher, a model of its own, another customer's student, and wrong keys. References are
distilled before any suspect is looked at. Every trained model's outputs are kept in --cache, so
that an interrupted run resumes, and readings can be repeated.

    python benchmarks/distillation.py --cache runs/distillation --out distillation.json
    python benchmarks/distillation.py --train 2000 --queries 1500 --epochs 2 --seeds 1   # a look
    python benchmarks/distillation.py --full --device cuda                               # a GPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedding import augmented, load
from torch import Tensor, nn

from hf_watermark import OwnerKey
from hf_watermark.significance import log10_rademacher_tail
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.chips import chip_signs
from hf_watermark.softlabels.detection import CLASSES, PAIR, agreement, class_weights, pair_weights
from hf_watermark.softlabels.outputs import Outputs

VEHICLES = (0, 1, 8, 9)
MARGIN = (0.2, 0.3)
COUNTS = (300, 1000, 2000, 5000)
WRONG = 1000


def host(name: str, classes: int) -> nn.Module:
    """A classifier of transformers, by its role."""
    from transformers import (
        ConvNextConfig,
        ConvNextForImageClassification,
        RegNetConfig,
        RegNetForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )

    if name in ("resnet", "thin", "resnet18"):
        sizes = {"resnet": [48, 96, 192], "thin": [32, 64, 128], "resnet18": [64, 128, 256, 512]}
        return ResNetForImageClassification(
            ResNetConfig(
                embedding_size=sizes[name][0],
                hidden_sizes=sizes[name],
                depths=[2] * 4 if name == "resnet18" else [1] * 3,
                layer_type="basic",
                num_labels=classes,
            )
        )
    if name == "regnet":
        return RegNetForImageClassification(
            RegNetConfig(
                embedding_size=32,
                hidden_sizes=[32, 64, 128, 192],
                depths=[1, 1, 1, 1],
                groups_width=16,
                num_labels=classes,
            )
        )
    return ConvNextForImageClassification(
        ConvNextConfig(
            num_stages=3, hidden_sizes=[32, 64, 128], depths=[1, 1, 2], num_labels=classes
        )
    )


class Data:
    """CIFAR-10 in parts that never meet: for the teacher, queries, calibration, references."""

    def __init__(self, options: argparse.Namespace) -> None:
        counts = [options.train, options.queries, options.calibration, options.reference]
        images, labels = load("train", sum(counts))
        test_images, test_labels = load("test", 10_000)
        if options.classes == 2:
            labels, test_labels = (
                torch.isin(found, torch.tensor(VEHICLES)).long() for found in (labels, test_labels)
            )
        self.device, self.size = options.device, options.size
        parts = zip(images.split(counts), labels.split(counts), strict=True)
        self.teacher, self.queries, self.calibration, self.reference = parts
        self.probes = test_images[:5000], test_labels[:5000]
        self.test = test_images[5000:], test_labels[5000:]

    def seen(self, images: Tensor) -> Tensor:
        """As the models take them."""
        images = images.to(self.device)
        if images.shape[-1] == self.size:
            return images
        return nn.functional.interpolate(images, size=self.size, mode="bilinear")


def train(
    model: nn.Module, images: Tensor, targets: Tensor, data: Data, *, epochs: int, seed: int
) -> nn.Module:
    """Learn labels (n,) or soft labels (n, K) with SGD, one cycle, flips and shifts."""
    generator = torch.Generator().manual_seed(seed)
    model.to(data.device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(128):
            x = data.seen(augmented(images[batch], generator))
            logits = model(pixel_values=x).logits
            loss = nn.functional.cross_entropy(logits, targets[batch].to(data.device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answers(model: Callable[..., Any], images: Tensor, data: Data) -> Tensor:
    """Log-probabilities (n, K) of un-augmented images."""
    parts = [
        model(pixel_values=data.seen(part)).logits.float().log_softmax(-1).cpu()
        for part in images.split(500)
    ]
    return torch.cat(parts)


class Run:
    """One seed: its teacher, references and suspects, trained once and kept."""

    def __init__(self, seed: int, data: Data, options: argparse.Namespace) -> None:
        from transformers import set_seed

        self.seed, self.data, self.options = seed, data, options
        self.set_seed = set_seed
        self.folder = options.cache / f"k{options.classes}-seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key = OwnerKey((7000 + seed).to_bytes(32, "big"))
        self.teacher = self._teacher()
        eps = options.eps or (1.0 if options.classes > 2 else 2.0)
        calibration = data.seen(data.calibration[0]).cpu()
        self.served = SoftLabelWatermark(self.teacher, self.key, eps=eps)
        self.served.calibrate(calibration).eval()
        self.firm = SoftLabelWatermark(self.teacher, self.key, eps=eps, margin=MARGIN)
        self.firm.calibrate(calibration).eval()

    def _teacher(self) -> nn.Module:
        path, options = self.folder / "teacher.pt", self.options
        model = host(options.teacher, options.classes)
        if path.exists():
            model.load_state_dict(torch.load(path))
            return model.to(self.data.device).eval()
        self.set_seed(self.seed)
        model = host(options.teacher, options.classes)
        train(model, *self.data.teacher, self.data, epochs=options.teacher_epochs, seed=self.seed)
        torch.save(model.state_dict(), path)
        return model

    def outputs(self, name: str, make: Callable[[], nn.Module]) -> dict[str, Any]:
        """A trained model's log-probabilities of the probes, and its accuracy on other images."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            self.set_seed(100 * self.seed + sum(name.encode()) % 97)
            model = make()
            images, labels = self.data.test
            right = answers(model, images, self.data).argmax(-1) == labels
            probes = answers(model, self.data.probes[0], self.data)
            np.savez(path, probes=probes.numpy(), accuracy=right.float().mean().item())
            print(f"seed {self.seed}: {name} {right.float().mean():.1%}", file=sys.stderr)
        with np.load(path) as stored:
            return {"probes": stored["probes"], "accuracy": float(stored["accuracy"])}

    def student(
        self, arch: str, source: Any, part: str = "queries", *, hard: bool = False, share: float = 1
    ) -> Callable[[], nn.Module]:
        """A student of what `source` answers; of labels where `hard`."""

        def make() -> nn.Module:
            images, labels = getattr(self.data, part)
            count = round(share * len(images))
            images = images[:count]
            if source is None:
                targets = labels[:count]
            else:
                said = answers(source, images, self.data)
                targets = said.argmax(-1) if hard else said.exp()
            epochs = self.options.epochs if share == 1 else -(-2 * self.options.epochs // 3)
            model = host(arch, self.options.classes)
            return train(model, images, targets, self.data, epochs=epochs, seed=self.seed)

        return make

    def references(self) -> list[dict[str, Any]]:
        """Clean students of other architectures than the suspects', made beforehand."""
        return [
            self.outputs(f"reference-{arch}", self.student(arch, self.teacher, "reference"))
            for arch in ("thin", "convnext")
        ]

    def suspects(self) -> dict[str, tuple[dict[str, Any], Any, bool]]:
        """Name -> outputs, the wrapper whose signs are looked for, whether they were learnt."""
        same, other = self.options.teacher, "regnet"
        served, firm, clean = self.served, self.firm, self.teacher
        of_customer = served.for_recipient("customer-2")
        rows = {
            "strong": (self.student(same, served), served, True),
            "weak": (self.student(other, served, share=2 / 3), served, True),
            "strong, hard labels": (self.student(same, served, hard=True), served, False),
            "strong, margin, hard labels": (self.student(same, firm, hard=True), firm, True),
            "strong, margin": (self.student(same, firm), firm, True),
            "clean strong": (self.student(same, clean), served, False),
            "clean weak": (self.student(other, clean, share=2 / 3), served, False),
            "clean hard labels": (self.student(same, clean, hard=True), served, False),
            "own labels": (self.student(same, None), served, False),
            "another customer's": (self.student(same, of_customer), served, False),
        }
        return {
            name: (self.outputs(name.replace(" ", "_"), make), wrapper, marked)
            for name, (make, wrapper, marked) in rows.items()
        }


POSTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda p: p,
    "2 decimals": lambda p: p.round(2),
    "top 3": lambda p: np.where(p >= np.sort(p, axis=1)[:, [-3]], p, 0.0),
    "labels": lambda p: p.argmax(axis=1),
}


def readings(run: Run) -> dict[str, Any]:
    """Every statistic of one seed."""
    bank = [reference["probes"].astype(np.float64) for reference in run.references()]
    images = run.data.seen(run.data.probes[0]).cpu()
    views = {id(wrapper): wrapper.probes(images) for wrapper in (run.served, run.firm)}
    found: dict[str, Any] = {}
    for name, (outputs, wrapper, marked) in run.suspects().items():
        row: dict[str, Any] = {"accuracy": outputs["accuracy"], "marked": marked, "t": {}}
        for posted, change in POSTED.items():
            if posted == "top 3" and run.options.classes < 4:
                continue
            for count in COUNTS if posted == "as it is" else (2000, 5000):
                probes = _first(views[id(wrapper)], count)
                said = Outputs.read(change(np.exp(outputs["probes"][:count])), probes.classes)
                given = [one[:count] for one in bank]
                weights = {CLASSES: class_weights(said, probes, given)}
                if probes.margin is not None:
                    weights[PAIR] = pair_weights(said, probes, given)
                signs = probes.signs(None)
                for reading, a in weights.items():
                    t = agreement(a, signs)
                    row["t"][f"{posted}/{count}/{reading}"] = t
                    if posted == "as it is" and count == 2000:
                        wrong = _wrong(run.key, a)
                        row.setdefault("wrong_keys", {})[reading] = _null(wrong)
        row["log10_p"] = {k: log10_rademacher_tail(t) for k, t in row["t"].items()}
        found[name] = row
        said = {k: round(t, 1) for k, t in row["t"].items()}
        print(f"seed {run.seed}: {name} {outputs['accuracy']:.1%} {said}", file=sys.stderr)
    test_images, test_labels = run.data.test
    seen = run.data.seen(test_images).cpu()
    return {
        "teacher_accuracy": float(
            (answers(run.teacher, test_images, run.data).argmax(-1) == test_labels).float().mean()
        ),
        "distortion": run.served.distortion(seen, test_labels).to_dict(),
        "margin_distortion": run.firm.distortion(seen, test_labels).to_dict(),
        "margin_expected_price": run.firm.expected_price,
        "suspects": found,
    }


def _first(probes: Any, count: int) -> Any:
    import dataclasses

    parts = {name: getattr(probes, name)[:count] for name in ("psi", "log_probs", "seen")}
    return dataclasses.replace(probes, **parts)


def _wrong(key: OwnerKey, weights: np.ndarray) -> list[float]:
    return [
        agreement(weights, chip_signs(key.for_recipient(f"wrong-{i}"), *weights.shape))
        for i in range(WRONG)
    ]


def _null(t: list[float]) -> dict[str, float]:
    from scipy import stats

    return {
        "ks_p": float(stats.kstest(t, "norm").pvalue),
        "sd": statistics.pstdev(t),
        "largest": max(t),
        "smallest_log10_p": min(log10_rademacher_tail(one) for one in t),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, choices=[2, 10], default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=15_000)
    parser.add_argument("--calibration", type=int, default=5_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--teacher", choices=["resnet", "resnet18"], default="resnet")
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=64, help="pixels that the models see")
    parser.add_argument("--eps", type=float, help="1, and 2 for two classes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="ResNet-18, 30 epochs, 128 pixels")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("build/distillation"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.full:
        options.teacher, options.size, options.epochs, options.teacher_epochs = (
            "resnet18",
            128,
            30,
            30,
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    data = Data(options)
    hidden = ("out", "cache", "threads", "device")
    record: dict[str, Any] = {
        "question": "Does a student of marked answers carry the mark?",
        "settings": {k: v for k, v in vars(options).items() if k not in hidden}
        | {"margin": MARGIN, "wrong_keys": WRONG, "features": "H"},
        "results": {},
    }
    for seed in range(options.seeds):
        record["results"][str(seed)] = readings(Run(seed, data, options))
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["results"], indent=2)[:2000])


if __name__ == "__main__":
    main()
