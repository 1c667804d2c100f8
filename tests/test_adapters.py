"""Marks in models that peft adapts: in what trains whole, or a clear refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_embedding import FC1, KEY, OTHER, images, read, train, vit

from hf_watermark import Scheme
from hf_watermark.direct import embed_checkpoint
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import CarrierError
from hf_watermark.trainer import WatermarkTrainer
from hf_watermark.verify import verify_hub_model
from hf_watermark.wrappers import plain_parameters

ATTENTION = ["q_proj", "v_proj"]


def adapted(**settings):
    return get_peft_model(vit(), LoraConfig(r=4, target_modules=ATTENTION, **settings))


def test_names_are_those_of_the_plain_model():
    names = {name: tuple(parameter.shape) for name, parameter in vit().named_parameters()}
    for model in (
        adapted(),
        adapted(modules_to_save=["fc1", "classifier"]),
        get_peft_model(vit(), LoraConfig(r=4, target_modules=["fc1", "fc2"])),
    ):
        found = {name: tuple(p.shape) for name, p in plain_parameters(model).items()}
        assert found == names


@pytest.mark.parametrize(
    "scheme", [Scheme(bits=32), Scheme(bits=32, embedding="hinge", weight=1.0)]
)
def test_the_mark_survives_merging(scheme):
    model = adapted(modules_to_save=["fc1"])
    watermark = WatermarkLoss(model, KEY, scheme)
    assert [carrier.name for carrier in watermark.carriers] == [FC1.format(i) for i in range(4)]
    frozen = copy.deepcopy(model.get_base_model().vit.layers[0].mlp.fc1.original_module.weight)
    train(model, watermark, steps=25, lr=2e-3)
    watermark.detach()
    merged = model.merge_and_unload()
    assert read(merged, KEY, watermark).matched == 32
    assert not torch.equal(merged.get_parameter(FC1.format(0)), frozen)
    assert abs(read(merged, OTHER, watermark).soft) < 5.0


def test_a_stranger_reads_the_merged_model_with_the_key_alone(tmp_path):
    """Only the last two blocks train whole; the reader knows nothing of that."""
    model = adapted(modules_to_save=["layers.2.mlp.fc1", "layers.3.mlp.fc1"])
    watermark = WatermarkLoss(model, KEY)
    before = plain_parameters(model)[FC1.format(0)].detach().clone()
    train(model, watermark, steps=12)
    watermark.detach()
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_parameter(FC1.format(0)), before)
    merged.save_pretrained(tmp_path)
    evidence = verify_hub_model(tmp_path, KEY)
    assert evidence.found
    assert (evidence.matched, evidence.bits) == (64, 64)
    assert not verify_hub_model(tmp_path, OTHER).found


@pytest.mark.parametrize("targets", [ATTENTION, ["fc1", "fc2"]])
def test_nothing_but_adapters_trains(targets):
    model = get_peft_model(vit(), LoraConfig(r=4, target_modules=targets))
    with pytest.raises(CarrierError) as caught:
        WatermarkLoss(model, KEY)
    assert "0 of 4 carriers that train" in str(caught.value)
    assert "modules_to_save" in str(caught.value)
    assert "embed_checkpoint" in str(caught.value)


def test_what_the_refusal_advises(tmp_path):
    """Merged, saved and marked on disk: an adapter's owner gets a mark too."""
    model = get_peft_model(vit(), LoraConfig(r=4, target_modules=["fc1", "fc2"]))
    model(**images()).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    embed_checkpoint(tmp_path / "merged", KEY, tmp_path / "marked")
    assert verify_hub_model(tmp_path / "marked", KEY).found


def test_trainer(tmp_path):
    from test_trainer import Images, arguments

    model = adapted(modules_to_save=["fc1"])
    trainer = WatermarkTrainer(
        model, arguments(tmp_path, max_steps=12), train_dataset=Images(), watermark_key=KEY
    )
    trainer.train()
    assert trainer.watermark.measure().ber == 0.0
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert verify_hub_model(tmp_path / "merged", KEY).found
