r"""Weights that carry the soft labels' mark without the wrapper: are they found, after attacks too?

A provider distils a student of its own marked model with `WatermarkTrainer` and publishes it, with
the marks of both kinds in its weights. A thief takes the weights and tries to be rid of them. Each
row asks the changed model about images, as `verify_outputs` does, and reads its weights, as
`verify_hub_model` does. Beside it stands a twin that learnt the clean model's soft labels in the
same way. Teachers, references and their images are those of `distillation.py`.

    python benchmarks/trained_in.py --cache runs/distillation --out trained_in.json
    python benchmarks/trained_in.py --train 2000 --queries 1500 --epochs 2 --seeds 0   # a look
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import students
import torch
from distillation import BANK, Run, add_options, judged, view
from students import Data, answers, augmented
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from hf_watermark import OwnerKey
from hf_watermark.stress import Means, attacks_of
from hf_watermark.trainer import WatermarkTrainer
from hf_watermark.verify import verify_hub_model

ATTACKS = ("prune-65", "prune-80", "int8", "int4", "noise-0.1", "fine-tune-1x", "fine-tune-10x",
           "label-smoothing", "distillation")  # fmt: skip
PROBES = 2000
RATE = 3e-3


class Numbers(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Which image: the collator fetches it."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> int:
        return i


class Batch:
    """Flipped and shifted images, and what a teacher says of them, if one is to be asked."""

    def __init__(self, data: Data, seed: int, teacher: nn.Module | None = None) -> None:
        self._data, self._teacher = data, teacher
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, numbers: list[int]) -> dict[str, Tensor]:
        """Pixel values, and (n, K) probabilities as labels if there is a teacher."""
        x = self._data.seen(augmented(self._data.queries[0][numbers], self._generator))
        if self._teacher is None:
            return {"pixel_values": x}
        with torch.no_grad():
            return {"pixel_values": x, "labels": self._teacher(pixel_values=x).logits.softmax(-1)}


def published(run: Run, marked: bool, folder: Path) -> nn.Module:
    """A student of the provider's own model, trained by Trainer."""
    from transformers import set_seed

    options, data = run.options, run.data
    set_seed(1000 + run.seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=1e-3,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        seed=1000 + run.seed,
    )
    settings: dict[str, Any] = {
        "model": students.host(options.teacher, options.classes),
        "args": arguments,
        "train_dataset": Numbers(len(data.queries[0])),
    }
    if marked:
        trainer: Trainer = WatermarkTrainer(
            **settings,
            data_collator=Batch(data, run.seed),
            watermark_key=weights_key(run.seed),
            watermark_teacher=run.served,
        )
    else:
        trainer = Trainer(
            **settings,
            data_collator=Batch(data, run.seed, run.teacher),
            compute_loss_func=lambda out, labels, **_: cross_entropy(out.logits, labels),
        )
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


def weights_key(seed: int) -> OwnerKey:
    return OwnerKey((7500 + seed).to_bytes(32, "big"))


def asked(run: Run, model: nn.Module, bank: list[Any], probes: Any) -> dict[str, Any]:
    """Its accuracy, and what its answers say."""
    images, labels = run.data.test
    right = answers(model, images, run.data).argmax(-1) == labels
    said = np.exp(answers(model, run.data.probes[0][:PROBES], run.data).numpy())
    return {
        "accuracy": right.float().mean().item(),
        "outputs": judged(said, probes, bank, "probes"),
    }


def one_seed(run: Run) -> dict[str, Any]:
    """The published model, its twin, and what attacks leave of the marks."""
    data, options = run.data, run.options
    bank, probes = [run.reference(name) for name in BANK], view(run, False, data.probes[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = published(run, True, folder / "marked")
        twin = published(run, False, folder / "twin")
        rows = {
            "as published": asked(run, model, bank, probes)
            | {"weights_log10_p": read(folder / "marked", run.seed)},
            "twin of clean soft labels": asked(run, twin, bank, probes)
            | {"weights_log10_p": read(folder / "twin", run.seed)},
        }
        images, labels = data.calibration
        means = Means(data.seen(images), labels, run.seed, options.attack_epochs, RATE / 10)
        for attack in attacks_of(names=ATTACKS):
            changed = attack(model, means)
            changed.save_pretrained(folder / attack.name)
            rows[attack.name] = asked(run, changed, bank, probes) | {
                "weights_log10_p": read(folder / attack.name, run.seed)
            }
            told = rows[attack.name]
            print(
                f"seed {run.seed}: {attack.name} {told['accuracy']:.1%} t {told['outputs']['t']}",
                file=sys.stderr,
            )
    right = answers(run.teacher, data.test[0], data).argmax(-1) == data.test[1]
    return {"teacher_accuracy": right.float().mean().item(), "rows": rows}


def read(folder: Path, seed: int) -> float:
    """What the weights say, the claim being lost."""
    (folder / "watermark.json").unlink(missing_ok=True)
    return max(verify_hub_model(folder, weights_key(seed), read="all").log10_p, -999.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--attack-epochs", type=int, default=4)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    hidden = ("out", "cache", "threads", "device", "seeds")
    record: dict[str, Any] = {
        "question": "Do weights carry the soft labels' mark, and does it survive?",
        "settings": {k: v for k, v in vars(options).items() if k not in hidden}
        | {"rate": RATE, "probes": PROBES},
        "results": {},
    }
    if options.out is not None and options.out.exists():  # go on from there
        before = json.loads(options.out.read_text())
        if before["settings"] == record["settings"]:
            record["results"] = before["results"]
    data = Data(options)
    for seed in options.seeds:
        if str(seed) in record["results"]:
            continue
        record["results"][str(seed)] = one_seed(Run(seed, data, options))
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    if options.out is None:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
