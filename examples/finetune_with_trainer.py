"""Fine-tune a ViT with a mark, publish it, verify it from the Hub: the main job in one file.

Runs on a loopback Hub, so it needs no network and no account; with the real Hub, leave the `with`
out and log in.

    python examples/finetune_with_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, random_split
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_watermark import OwnerKey
from hf_watermark.testing import LoopbackHub
from hf_watermark.trainer import WatermarkTrainer
from hf_watermark.verify import verify_hub_model


class Digits(Dataset):
    """scikit-learn's digits as 3 x 8 x 8 images."""

    def __init__(self) -> None:
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
        self.images = images[:, None].expand(-1, 3, -1, -1).contiguous()
        self.labels = torch.tensor(data.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    set_seed(0)
    train, test = random_split(Digits(), [1437, 360])
    model = ViTForImageClassification(
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
    key = OwnerKey.generate(owner="acme")
    with (
        tempfile.TemporaryDirectory() as folder,
        LoopbackHub(Path(folder) / "hub") as hub,
        hub.in_process(),
    ):
        trainer = WatermarkTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=f"{folder}/vit-digits",
                hub_model_id="demo/vit-digits",
                num_train_epochs=8,
                per_device_train_batch_size=32,
                learning_rate=1e-3,
                logging_strategy="epoch",
                save_strategy="no",
                report_to=[],
                dataloader_pin_memory=False,
            ),
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
            watermark_key=key,
        )
        trainer.train()
        reached = trainer.evaluate()["eval_accuracy"]
        trainer.push_to_hub()
        evidence = verify_hub_model("demo/vit-digits", key)
        stranger = verify_hub_model("demo/vit-digits", OwnerKey.generate())
    print(f"accuracy {reached:.1%}; right key: {evidence.verdict}, log10 p {evidence.log10_p:.1f};")
    print(f"another key: {stranger.verdict}, log10 p {stranger.log10_p:.1f}")
    assert reached > 0.85, reached
    assert evidence.found
    assert evidence.log10_p < -15
    assert not stranger.found


if __name__ == "__main__":
    main()
