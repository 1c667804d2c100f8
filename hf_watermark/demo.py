"""The main job on one machine, without network: what `make demo` and `hf-watermark demo` run.

Everything is real but small: scikit-learn's digits through `datasets`, a ViT of transformers, the
Trainer, a Hub on 127.0.0.1 that the ordinary clients talk to, and the command in a process of its
own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_watermark.errors import WatermarkError
from hf_watermark.key import OwnerKey
from hf_watermark.testing import LoopbackHub

__all__ = ["run"]

Say = Callable[[str], None]

_MARKER = ".hf-watermark-demo"
_REPO = "demo/vit-digits"
_SIDE = 32
_PRETRAINED_ON = 600  # images of the base model that is then fine-tuned
_BASE_EPOCHS, _EPOCHS = 12, 8


@dataclass(frozen=True)
class _Run:
    seed: int
    accuracy_without: float
    accuracy_with: float
    ber: float
    log10_p: float


def run(folder: Path, seeds: int, say: Say) -> str:
    """Train, push, verify; returns the closing table.

    Args:
        folder: Where everything goes; emptied first if an earlier demo made it.
        seeds: How many pairs of trainings.
        say: Told what happens, line by line.

    Raises:
        WatermarkError: If the folder holds something else, or the outcome is not the expected one.
    """
    _prepare(folder)
    _quiet()
    say("1/5  Digits: 1,797 real images of hand-written digits, through datasets")
    base_data, train, test = _digits()
    say(f"     {len(base_data)} to pretrain, {len(train)} to fine-tune, {len(test)} to test")
    with _one_thread(), LoopbackHub(folder / "hub") as hub, hub.in_process():
        say("2/5  A base model: a small ViT, trained without a mark")
        _train(_vit(), base_data, test, folder / "base", seed=0, epochs=_BASE_EPOCHS, save=True)
        key = OwnerKey.generate(owner="demo")
        key.save(folder / "owner.key")
        OwnerKey.generate(owner="somebody else").save(folder / "wrong.key")
        say(f"3/5  Fine-tuning, {seeds} seeds, without a mark and with the mark of {key!r}")
        runs = [_side_by_side(seed, folder, key, train, test, hub, say) for seed in range(seeds)]
        say(f"4/5  Pushed to {hub.endpoint}/{_REPO}: weights, claim and card")
        say("5/5  verify_hub_model, with the right key and with a wrong one")
        right = _verify(hub, folder / "owner.key", say)
        wrong = _verify(hub, folder / "wrong.key", say)
        size = _repo_size()
    card = folder / f"marked-{seeds - 1}" / "README.md"
    say("     The card's section:")
    say(_indented(_section(card)))
    if right["verdict"] != "found" or wrong["verdict"] != "not found":
        raise WatermarkError(
            "The demo did not end as it should",
            expected="found with the right key, not found with the wrong one",
            got=f"{right['verdict']}, {wrong['verdict']}",
        )
    return _table(runs, right, wrong, size, card)


def _prepare(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).exists():
        raise WatermarkError(
            f"{folder} is not empty",
            expected="a new folder, or one that an earlier demo made",
            do="choose another one with --out",
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: more gain little on idle cores, and wait for each other on busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quiet() -> None:
    from datasets import disable_progress_bars
    from huggingface_hub.utils.tqdm import disable_progress_bars as disable_hub_bars
    from transformers.utils import logging

    # deepspeed, where it is installed, is imported on saving, and then talks on stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    disable_hub_bars()


def _digits() -> tuple[Any, Any, Any]:
    """Digits processed for a ViT: base, train and test split."""
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": _SIDE, "width": _SIDE})

    def process(batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "pixel_values": processor(batch["image"])["pixel_values"],
            "labels": batch["label"],
        }

    base, train, test = (
        part.map(process, batched=True, remove_columns=part.column_names).with_format("torch")
        for part in digit_pictures()
    )
    return base, train, test


def digit_pictures() -> tuple[Any, Any, Any]:
    """Digits as `datasets` of images and labels: to pretrain on, to fine-tune on, to test on."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pictures
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = [
        Pictures.fromarray((pixels * (255 / 16)).astype(np.uint8)).convert("RGB")
        for pixels in digits.images
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    data = Dataset.from_dict(
        {"image": pictures, "label": digits.target.tolist()}, features=features
    ).shuffle(seed=0)
    rest = data.train_test_split(test_size=360, seed=0)
    base = rest["train"].select(range(_PRETRAINED_ON))
    return base, rest["train"].select(range(_PRETRAINED_ON, len(rest["train"]))), rest["test"]


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=_SIDE,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            id2label={d: str(d) for d in range(10)},
            label2id={str(d): d for d in range(10)},
        )
    )


def _train(
    model: Any,
    train: Any,
    test: Any,
    folder: Path,
    *,
    seed: int,
    epochs: int,
    key: OwnerKey | None = None,
    save: bool = False,
) -> tuple[Any, float]:
    """Train as any user of Trainer would; with a key, the one line more. Returns the accuracy."""
    from transformers import Trainer, TrainingArguments

    from hf_watermark.trainer import WatermarkTrainer

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=180,
        learning_rate=1e-3,
        warmup_steps=20,
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        hub_model_id=_REPO,
        dataloader_pin_memory=False,
    )
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": train,
        "eval_dataset": test,
        "compute_metrics": _accuracy,
    }
    trainer = Trainer(**common) if key is None else WatermarkTrainer(**common, watermark_key=key)
    _silence(trainer)
    trainer.train()
    if save:
        trainer.save_model(str(folder))
    return trainer, float(trainer.evaluate()["eval_accuracy"])


def _silence(trainer: Any) -> None:
    """Without tqdm Trainer prints every log; the demo has its own words."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _side_by_side(
    seed: int, folder: Path, key: OwnerKey, train: Any, test: Any, hub: LoopbackHub, say: Say
) -> _Run:
    from transformers import AutoModelForImageClassification

    accuracies, trainer = [], None
    for mark in (None, key):
        model = AutoModelForImageClassification.from_pretrained(folder / "base")
        name = "plain" if mark is None else "marked"
        trainer, accuracy = _train(
            model, train, test, folder / f"{name}-{seed}", seed=seed, epochs=_EPOCHS, key=mark
        )
        accuracies.append(accuracy)
    assert trainer is not None  # the marked one, trained last
    trainer.push_to_hub()
    now = trainer.watermark.measure()
    say(
        f"     seed {seed}: accuracy {accuracies[0]:.1%} without the mark, "
        f"{accuracies[1]:.1%} with it, BER {now.ber:g}, log10 p {now.log10_p:.0f}"
    )
    return _Run(seed, accuracies[0], accuracies[1], now.ber, now.log10_p)


def _verify(hub: LoopbackHub, key_file: Path, say: Say) -> dict[str, Any]:
    """Run the command as a stranger would, in a process of its own."""
    command = ["verify_hub_model", _REPO, "--key", str(key_file), "--read", "all"]
    say(f"\n     $ {' '.join(command)}")
    environment = {**os.environ, **hub.environment()}
    entry = "from hf_watermark.cli import verify_hub_model; verify_hub_model()"
    outcome: dict[str, Any] = {}
    for form in ("human", "json"):
        done = subprocess.run(
            [sys.executable, "-c", entry, *command[1:], "--format", form],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, 1):
            raise WatermarkError("verify_hub_model failed", got=done.stderr.strip())
        if form == "human":
            say(_indented(done.stdout.rstrip()))
        else:
            outcome = json.loads(done.stdout)
    return outcome


def _repo_size() -> int:
    from huggingface_hub import HfApi

    siblings = HfApi().model_info(_REPO, files_metadata=True).siblings or ()
    return sum(sibling.size or 0 for sibling in siblings)


def _section(card: Path) -> str:
    text = card.read_text(encoding="utf-8")
    start = text.index("<!-- hf-watermark:begin -->")
    return text[start : text.index("### How to check it")].rstrip()


def _indented(text: str) -> str:
    return "\n".join(f"     | {line}".rstrip() for line in text.splitlines())


def _table(
    runs: Sequence[_Run], right: dict[str, Any], wrong: dict[str, Any], size: int, card: Path
) -> str:
    without = [f"{run.accuracy_without:.1%}" for run in runs]
    with_mark = [f"{run.accuracy_with:.1%}" for run in runs]
    seeds = ", ".join(str(run.seed) for run in runs)
    rows = [
        (f"task accuracy without the mark (seed {seeds})", ", ".join(without)),
        (f"task accuracy with the mark    (seed {seeds})", ", ".join(with_mark)),
        ("bit error rate after training", ", ".join(f"{run.ber:g}" for run in runs)),
        ("log10 p after training", ", ".join(f"{run.log10_p:.1f}" for run in runs)),
        ("right key, from the Hub", f"{right['verdict']}, log10 p {right['log10_p']:.1f}"),
        ("wrong key, from the Hub", f"{wrong['verdict']}, log10 p {wrong['log10_p']:.1f}"),
        ("bytes read / bytes in the repo", f"{right['bytes_read']:,} / {size:,}"),
        ("card", str(card)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
