"""`transformers` and `datasets` against the loopback Hub."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi, ModelCard

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_model_push_and_pull(loopback_hub, model):
    model.push_to_hub("demo/vit")
    pulled = transformers.AutoModelForImageClassification.from_pretrained("demo/vit")
    assert same(model, pulled)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert HfApi().model_info("demo/vit").safetensors.parameters == {"F32": count}
    assert HfApi().get_safetensors_metadata("demo/vit").parameter_count == {"F32": count}


def test_sharded_model(loopback_hub, model):
    model.push_to_hub("demo/sharded", max_shard_size="30KB")
    names = HfApi().list_repo_files("demo/sharded")
    assert "model.safetensors.index.json" in names
    assert sum(name.endswith(".safetensors") for name in names) > 2
    pulled = transformers.AutoModelForImageClassification.from_pretrained("demo/sharded")
    assert same(model, pulled)


def test_trainer_push(loopback_hub, model, tmp_path):
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(8)]
    args = transformers.TrainingArguments(
        tmp_path / "out",
        hub_model_id="demo/trained",
        push_to_hub=True,
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub(tags=["watermark"])
    pulled = transformers.AutoModelForImageClassification.from_pretrained("demo/trained")
    assert same(trainer.model, pulled)
    assert "watermark" in ModelCard.load("demo/trained").data.tags
    # What the Trainer pickles is among the bytes that a leak test searches.
    assert b"TrainingArguments" in loopback_hub.bytes_of("demo/trained")


def test_datasets_push_and_pull(loopback_hub):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"a": list(range(100))})
    rows.push_to_hub("demo/rows")
    assert datasets.load_dataset("demo/rows", split="train")["a"][:] == list(range(100))
    stream = datasets.load_dataset("demo/rows", split="train", streaming=True)
    assert next(iter(stream)) == {"a": 0}
