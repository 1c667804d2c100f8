"""A mark in a training loop of one's own, with accelerate and gradient accumulation.

python examples/accelerate_loop.py
python examples/accelerate_loop.py --embedding hinge
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification, set_seed

from hf_watermark import OwnerKey, Scheme
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.verify import verify_hub_model


def digits() -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
    images = torch.nn.functional.interpolate(images[:, None], size=16).expand(-1, 3, -1, -1)
    labels = torch.tensor(data.target)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embedding", default="projection", choices=["projection", "hinge", "bce"])
    options = parser.parse_args()
    set_seed(0)
    train, test = digits()
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
            num_labels=10,
        )
    )
    key = OwnerKey.generate(owner="acme")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    watermark = WatermarkLoss(model, key, Scheme(embedding=options.embedding))
    for epoch in range(3):
        for images, labels in loader:
            with accelerator.accumulate(model):
                task_loss = model(pixel_values=images, labels=labels).loss
                accelerator.backward(watermark(task_loss))
                optimizer.step()
                watermark.step()
                optimizer.zero_grad()
        print(f"epoch {epoch}: loss {task_loss.item():.3f}, {watermark.measure()}")
    watermark.seal()  # a second mark, for copies that are disguised
    watermark.detach()

    model.eval()
    with torch.no_grad():
        images, labels = test.tensors
        reached = (model(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()
    with tempfile.TemporaryDirectory() as folder:
        accelerator.unwrap_model(model).save_pretrained(folder)
        claim = watermark.claim(folder)
        (Path(folder) / "watermark.json").write_bytes(claim.public.to_bytes())
        evidence = verify_hub_model(folder, key)
    print(f"accuracy {reached:.1%}; {evidence.verdict}, log10 p {evidence.log10_p:.1f}")
    assert reached > 0.85, reached
    assert evidence.found


if __name__ == "__main__":
    main()
