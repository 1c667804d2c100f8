"""From scratch, fine-tuning, distilling: one trainer marks in all three, beside unmarked twins.

Uchida et al. (ICMR 2017, section 2.2) name these three situations in which a mark can be embedded.
Here each is a small ViT on scikit-learn's digits, trained twice from the same seed: by Trainer, and
by WatermarkTrainer, which differs in one argument.

    python examples/three_situations.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_watermark import Evidence, OwnerKey
from hf_watermark.trainer import WatermarkTrainer
from hf_watermark.verify import verify_hub_model

EPOCHS = 8


class Images(Dataset):
    """Images with labels: classes, or probabilities of all classes."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def digits() -> tuple[Images, Images]:
    """scikit-learn's digits as 3 x 8 x 8 images: 1,437 to train on, 360 to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
    images = images[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Images(images[train], labels[train]), Images(images[test], labels[test])


def small_vit() -> ViTForImageClassification:
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            num_labels=10,
        )
    )


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def cross_entropy(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Of classes or of probabilities: what a student learns from is a teacher's."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


def trained(folder: Path, model, train: Images, test: Images, key: OwnerKey | None) -> float:
    """Train, with a mark unless the key is None; save; the accuracy on the test images."""
    trainer_class = Trainer if key is None else WatermarkTrainer
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        compute_loss_func=cross_entropy,
        **({} if key is None else {"watermark_key": key}),
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()["eval_accuracy"]


@torch.no_grad()
def soft_labels(teacher, images: torch.Tensor) -> torch.Tensor:
    """A teacher's probabilities at temperature 2."""
    return (teacher.eval()(pixel_values=images).logits / 2).softmax(-1)


def main() -> None:
    train, test = digits()
    key, stranger = OwnerKey.generate(owner="acme"), OwnerKey.generate()
    rows: list[tuple[str, float, float, Evidence]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def both(situation: str, start, data: Images) -> ViTForImageClassification:
            """Train twice from the same start; the model without the mark."""
            plain, marked = copy.deepcopy(start), copy.deepcopy(start)
            without = trained(folder / situation / "plain", plain, data, test, None)
            with_mark = trained(folder / situation / "marked", marked, data, test, key)
            evidence = verify_hub_model(folder / situation / "marked", key, read="all")
            assert not verify_hub_model(folder / situation / "marked", stranger).found
            assert not verify_hub_model(folder / situation / "plain", key).found
            rows.append((situation, without, with_mark, evidence))
            return plain

        teacher = both("from scratch", small_vit(), train)

        pretrained = small_vit()  # has seen the digits 0 to 4 alone, and then learns all ten
        few = Images(train.images[train.labels < 5], train.labels[train.labels < 5])
        trained(folder / "pretrained", pretrained, few, test, None)
        both("fine-tuning", pretrained, train)

        taught = Images(train.images, soft_labels(teacher, train.images))
        both("distilling", small_vit(), taught)

    print("| situation | accuracy without | accuracy with the mark | BER | log10 p |")
    print("|---|---|---|---|---|")
    for situation, without, with_mark, evidence in rows:
        ber = 1 - evidence.matched / evidence.bits
        log10_p = evidence.log10_p
        print(f"| {situation} | {without:.1%} | {with_mark:.1%} | {ber:g} | {log10_p:.1f} |")
        assert min(without, with_mark) > 0.85, situation
        assert evidence.found
        assert ber == 0
        assert log10_p < -50
    # Each difference of two accuracies on 360 images has a standard error of about 2 points.
    assert abs(sum(row[2] - row[1] for row in rows)) / len(rows) < 0.04


if __name__ == "__main__":
    main()
