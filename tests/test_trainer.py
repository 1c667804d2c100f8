"""WatermarkTrainer beside Trainer: the same training, a mark in it, and no trace of the key."""

from __future__ import annotations

import base64
import gc
import hashlib
import inspect
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
)
from transformers.utils import logging as transformers_logging

from hf_watermark import OwnerKey, Scheme
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import check_digests
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import (
    AttachError,
    CarrierError,
    CarrierMissingError,
    ModelTooSmallError,
)
from hf_watermark.evidence import CLAIM_FILE, Claim
from hf_watermark.files import FolderFiles
from hf_watermark.trainer import WatermarkTrainer
from hf_watermark.verify import verify_hub_model

# Random enough not to turn up anywhere by chance, and the same in every run.
SECRET = hashlib.sha256(b"the secret of these tests").digest()
KEY = OwnerKey(SECRET, owner="acme")
OTHER = OwnerKey(hashlib.sha256(b"somebody else").digest())

HINGE = Scheme(bits=32, embedding="hinge", weight=0.3)
BCE = Scheme(bits=32, embedding="bce", weight=0.3)
MEAN_HINGE = Scheme(bits=32, statistic="mean", embedding="hinge", weight=0.3)
MEAN_BCE = Scheme(bits=32, statistic="mean", embedding="bce", weight=3.0)
PROJECTION = Scheme(bits=32)


@pytest.fixture(autouse=True, scope="module")
def _cheap():
    """Small matrices gain nothing from threads, and accelerate collects garbage at every turn."""
    gc.collect()
    gc.freeze()
    with threadpool_limits(1):
        yield
    gc.unfreeze()


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=4,
    )
    return ViTForImageClassification(config)


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=4,
    )
    return ResNetForImageClassification(config)


class Bare(nn.Module):
    """Not of transformers: its forward takes no further arguments, so Trainer divides its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(768, 64), nn.Linear(64, 64)])
        self.classifier = nn.Linear(64, 4)

    def forward(self, pixel_values, labels=None):
        hidden = pixel_values.flatten(1)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        logits = self.classifier(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Images(torch.utils.data.Dataset):
    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pixels = torch.randn(count, 3, 16, 16, generator=generator)
        self.labels = torch.randint(0, 4, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def arguments(folder: Path, **changes) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **changes})


def trained(
    folder: Path,
    model: nn.Module,
    scheme: Scheme | None = PROJECTION,
    *,
    seal: bool = True,
    **changes,
):
    """A WatermarkTrainer that has trained."""
    trainer = WatermarkTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Images(),
        eval_dataset=Images(12),
        watermark_key=KEY,
        watermark_scheme=scheme,
        watermark_seal=seal,
    )
    trainer.train()
    return trainer


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to use."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def custom_loss(outputs, labels, num_items_in_batch=None):
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def gradients(
    folder: Path,
    scheme: Scheme | None,
    micro: int,
    accumulation: int,
    *,
    make=vit,
    kind: type[Trainer] | None = None,
    loss=None,
    **changes,
) -> list[dict[str, torch.Tensor]]:
    """The gradients of every optimizer step over 16 images; without a scheme, of plain Trainer."""
    seen = Gradients()
    kind = kind or (Trainer if scheme is None else WatermarkTrainer)
    marking = {} if scheme is None else {"watermark_key": KEY, "watermark_scheme": scheme}
    settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, **changes}
    trainer = kind(
        model=make(),
        args=arguments(
            folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            **settings,
        ),
        train_dataset=Images(),
        callbacks=[seen],
        compute_loss_func=loss,
        **marking,
    )
    trainer.train()
    return seen.steps


def mean_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels)


class Dividing(WatermarkTrainer):
    loss_is_scaled_for_ga = False


class DividingPlain(Trainer):
    loss_is_scaled_for_ga = False


VARIANTS = {
    "as it comes": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "own loss": {"loss": custom_loss},
    "own loss of a bare model": {"loss": custom_loss, "make": Bare},
    "tokens averaged": {"average_tokens_across_devices": True},
    "tokens not averaged": {"average_tokens_across_devices": False},
    "divided by Trainer": {"make": Bare},
}
VARIANT = pytest.mark.parametrize("variant", VARIANTS)


class TestGradients:
    """What reaches the optimizer: the task's gradient and one term, however it is accumulated."""

    def close(self, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
        for name, whole in one.items():
            if name.endswith("k_proj.bias"):  # zero, but for rounding: softmax cancels it
                assert whole.norm() < 1e-7
                continue
            assert whole.norm() > 0.0
            assert (whole - two[name]).norm() <= 1e-3 * whole.norm(), name

    @VARIANT
    @pytest.mark.parametrize("scheme", [HINGE, BCE, MEAN_HINGE, MEAN_BCE], ids=lambda s: s.name)
    def test_accumulation_makes_no_difference(self, tmp_path, scheme, variant):
        (whole,) = gradients(tmp_path, scheme, 16, 1, **VARIANTS[variant])
        (parts,) = gradients(tmp_path, scheme, 4, 4, **VARIANTS[variant])
        self.close(whole, parts)

    @pytest.mark.parametrize("accumulation", [1, 4])
    @pytest.mark.parametrize(
        "variant", [*VARIANTS, "bf16", "resnet", "told to divide", "remainder", "compiled"]
    )
    def test_the_term_is_added_once(self, tmp_path, variant, accumulation):
        """Marked less plain is the term's own gradient, in every step, of every parameter."""
        settings = {
            "bf16": {"bf16": True},
            "resnet": {"make": resnet},
            "told to divide": {"loss": mean_loss},
            "remainder": {"max_steps": 2},
            "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
        }.get(variant, VARIANTS.get(variant))
        kinds = (Dividing, DividingPlain) if variant == "told to divide" else (None, None)
        micro = 5 if variant == "remainder" else 16 // accumulation
        common = {"micro": micro, "accumulation": accumulation, "learning_rate": 0.0, **settings}
        marked = gradients(tmp_path, HINGE, kind=kinds[0], **common)
        plain = gradients(tmp_path, None, kind=kinds[1], **common)
        model = settings.get("make", vit)()
        watermark = WatermarkLoss(model, KEY, HINGE)
        watermark.penalty().backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(marked) == len(plain) == settings.get("max_steps", 1)
        assert len(expected) == len(watermark.carriers)
        for with_term, without in zip(marked, plain, strict=True):
            for name, gradient in with_term.items():
                found = gradient - without[name]
                if name in expected:
                    wanted = expected[name]
                    assert (found - wanted).norm() <= 1e-3 * wanted.norm(), name
                else:
                    assert not found.any(), name

    def test_a_remainder_batch(self, tmp_path):
        """12 + 4 images: three micro-batches, then the one that is left."""
        whole = gradients(tmp_path, HINGE, 12, 1, max_steps=2)
        parts = gradients(tmp_path, HINGE, 4, 3, max_steps=2)
        assert len(whole) == len(parts) == 2
        for one, two in zip(whole, parts, strict=True):
            self.close(one, two)

    @pytest.mark.parametrize("scheme", [None, HINGE])
    def test_outputs_are_returned_too(self, tmp_path, scheme):
        trainer = trained(tmp_path, vit(), scheme, max_steps=1)
        batch = default_data_collator([Images()[i] for i in range(4)])
        trainer.model.train()
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        alone = trainer.compute_loss(trainer.model, dict(batch))
        assert torch.equal(loss, alone)
        term = 0.0 if scheme is None else trainer.watermark.penalty()
        torch.testing.assert_close(loss, outputs.loss + term)


class TestTheTask:
    @pytest.mark.parametrize("make", [vit, resnet, Bare])
    @pytest.mark.parametrize("scheme", [None, HINGE, MEAN_BCE])
    def test_evaluation_is_that_of_trainer(self, tmp_path, make, scheme):
        if make is Bare and scheme is None:
            scheme = PROJECTION
        trainer = trained(tmp_path, make(), scheme, max_steps=2)
        plain = Trainer(model=trainer.model, args=arguments(tmp_path), eval_dataset=Images(12))
        ours, theirs = trainer.evaluate(), plain.evaluate()
        assert ours["eval_loss"] == theirs["eval_loss"]
        ours, theirs = trainer.predict(Images(12)), plain.predict(Images(12))
        np.testing.assert_array_equal(ours.predictions, theirs.predictions)
        np.testing.assert_array_equal(ours.label_ids, theirs.label_ids)
        assert ours.metrics["test_loss"] == theirs.metrics["test_loss"]

    @pytest.mark.parametrize("make", [vit, resnet])
    def test_the_projected_step_leaves_the_loss_alone(self, tmp_path, make):
        """The first step is Trainer's to the last digit; the next see slightly other weights."""
        trainer = trained(tmp_path, make())
        plain = Trainer(model=make(), args=arguments(tmp_path), train_dataset=Images())
        plain.train()
        ours, theirs = trainer.state.log_history, plain.state.log_history
        for name in ("loss", "grad_norm", "learning_rate", "epoch"):
            assert ours[0][name] == theirs[0][name]
        assert losses(trainer)[1:] != losses(plain)[1:]
        np.testing.assert_allclose(losses(trainer), losses(plain), rtol=0.05)

    def test_the_logged_loss_includes_the_term(self, tmp_path):
        for steps, micro in ((1, 16), (4, 4)):
            changes = {
                "max_steps": 1,
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": steps,
            }
            marked = trained(tmp_path, vit(), HINGE, **changes)
            plain = Trainer(
                model=vit(), args=arguments(tmp_path, **changes), train_dataset=Images()
            )
            plain.train()
            term = WatermarkLoss(vit(), KEY, HINGE).penalty().item()
            assert losses(marked)[0] - losses(plain)[0] == pytest.approx(term, rel=1e-4)

    def test_logs(self, tmp_path):
        trainer = trained(tmp_path, vit(), max_steps=4, eval_strategy="steps", eval_steps=2)
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(entries) == 4
        for entry in entries:
            assert entry["watermark_ber"] == 0.0
            assert 0 < entry["watermark_margin"] < 1.01 * trainer.watermark.projection.margin
            assert entry["watermark_log10_p"] < -50
        others = [entry for entry in trainer.state.log_history if "loss" not in entry]
        assert others
        assert not any("watermark" in name for entry in others for name in entry)

    def test_logs_before_training(self, tmp_path):
        trainer = WatermarkTrainer(vit(), arguments(tmp_path), watermark_key=KEY)
        trainer.log({"loss": 1.0})
        assert trainer.state.log_history[0]["watermark_ber"] > 0.2

    def test_no_callback_state_and_no_config(self, tmp_path):
        trainer = trained(tmp_path, vit(), save_strategy="steps", save_steps=3)
        state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
        assert set(state["stateful_callbacks"]) == {"TrainerControl"}
        assert not any("watermark" in name for name in trainer.model.config.to_dict())

    def test_other_models_of_other_libraries(self, tmp_path):
        trainer = trained(tmp_path, Bare(), HINGE, max_steps=40, learning_rate=3e-3)
        trainer.save_model()
        evidence = verify_hub_model(tmp_path, KEY)
        assert (evidence.found, evidence.matched) == (True, 32)
        assert evidence.carriers == ("layers.0.weight", "layers.1.weight")


class TestArguments:
    def test_trainers_signature_is_passed_on(self):
        positional = [
            name
            for name, parameter in inspect.signature(WatermarkTrainer.__init__).parameters.items()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        ]
        assert positional == ["self", "args", "kwargs"]

    def test_all_by_position(self, tmp_path):
        trainer = WatermarkTrainer(
            vit(), arguments(tmp_path), default_data_collator, Images(), Images(4),
            watermark_key=KEY,
        )  # fmt: skip
        trainer.train()
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        assert trainer.watermark.measure().ber == 0.0

    def test_everything_at_once(self, tmp_path):
        model, calls = vit(), []

        class Counting(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                calls.append(state.global_step)

        def collate(features):
            calls.append("collate")
            return default_data_collator(features)

        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        trainer = WatermarkTrainer(
            model=model,
            args=arguments(tmp_path, eval_strategy="epoch", max_steps=4),
            data_collator=collate,
            train_dataset=Images(),
            eval_dataset={"one": Images(4), "two": Images(8)},
            processing_class=ViTImageProcessorPil(size={"height": 16, "width": 16}),
            compute_metrics=lambda p: {"shape": float(p.predictions.shape[1])},
            callbacks=[Counting()],
            optimizers=(optimizer, schedule),
            preprocess_logits_for_metrics=lambda logits, labels: logits[:, :3],
            watermark_key=KEY,
            watermark_scheme=PROJECTION,
        )
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert rates == pytest.approx([0.02, 0.01, 0.005, 0.0025])
        assert [call for call in calls if call != "collate"] == [1, 2, 3, 4]
        assert "collate" in calls
        metrics = trainer.evaluate()
        assert metrics["eval_one_shape"] == metrics["eval_two_shape"] == 3.0
        trainer.save_model()
        assert (tmp_path / "preprocessor_config.json").exists()
        assert trainer.watermark.measure().ber == 0.0

    def test_model_init(self, tmp_path):
        made = []

        def init():
            made.append(vit())
            return made[-1]

        trainer = WatermarkTrainer(
            model_init=init,
            args=arguments(tmp_path),
            train_dataset=Images(),
            watermark_key=KEY,
        )
        trainer.train()
        trainer.train()
        assert len(made) == 3
        assert trainer.model is made[-1]
        marks = [WatermarkLoss(model, KEY).measure() for model in made]
        assert marks[0].ber > 0.2
        assert [mark.ber for mark in marks[1:]] == [0.0, 0.0]

    def test_optimizer_class(self, tmp_path):
        trainer = WatermarkTrainer(
            model=vit(),
            args=arguments(tmp_path),
            train_dataset=Images(),
            optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.01}),
            watermark_key=KEY,
        )
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, torch.optim.Adagrad)
        assert trainer.watermark.measure().ber == 0.0

    @pytest.mark.parametrize(
        "changes",
        [
            {"torch_compile": True, "torch_compile_backend": "eager"},
            {"bf16": True},
            {"auto_find_batch_size": True},
            {"gradient_checkpointing": True},
            {"max_steps": -1, "num_train_epochs": 2},
            {"bf16_full_eval": True, "eval_strategy": "steps", "eval_steps": 2},
            {"eval_on_start": True, "eval_strategy": "epoch"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_switches(self, tmp_path, changes):
        torch._dynamo.reset()
        trainer = trained(tmp_path, vit(), **changes)
        trainer.save_model()
        assert trainer.watermark.measure().ber == 0.0
        names = [carrier.name for carrier in trainer.watermark.carriers]
        assert names == [f"vit.layers.{i}.mlp.fc1.weight" for i in range(4)]
        assert verify_hub_model(tmp_path, KEY).matched == 32
        assert not verify_hub_model(tmp_path, OTHER).found

    def test_a_model_that_is_compiled_already(self, tmp_path):
        torch._dynamo.reset()
        trainer = trained(
            tmp_path, torch.compile(vit(), backend="eager"), remove_unused_columns=False
        )
        trainer.save_model()
        assert verify_hub_model(tmp_path, KEY).matched == 32

    def test_a_model_in_bfloat16(self, tmp_path):
        trainer = trained(tmp_path, vit().to(torch.bfloat16), max_steps=12)
        trainer.save_model()
        assert trainer.claim.carriers[0].dtype == "BF16"
        assert verify_hub_model(tmp_path, KEY).matched == 32

    def test_out_of_memory_and_again(self, tmp_path):
        """`auto_find_batch_size` starts the loop anew within one call of train."""
        model = vit()
        forward, tries = model.forward, []

        def failing(pixel_values, **kwargs):
            tries.append(len(pixel_values))
            if len(pixel_values) > 4 and len(tries) > 1:
                raise RuntimeError("CUDA out of memory.")
            return forward(pixel_values=pixel_values, **kwargs)

        model.forward = failing
        trainer = trained(tmp_path, model, auto_find_batch_size=True, max_steps=4)
        assert max(tries) == 8
        assert tries[-1] <= 4
        assert trainer.watermark.measure().ber == 0.0

    def test_adapters(self, tmp_path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=16, target_modules=["fc1", "fc2"])
        model = peft.get_peft_model(vit(), config)
        with pytest.raises(CarrierError, match="frozen"):
            WatermarkTrainer(model, arguments(tmp_path), watermark_key=KEY)
        carriers = [
            f"base_model.model.vit.layers.{i}.mlp.{name}.lora_{side}.default.weight"
            for i in range(4)
            for name, side in (("fc1", "A"), ("fc2", "B"))  # B starts with zeros
        ]
        trainer = WatermarkTrainer(
            model,
            arguments(tmp_path, max_steps=25),
            train_dataset=Images(),
            watermark_key=KEY,
            watermark_scheme=Scheme(bits=16),
            watermark_carriers=carriers,
        )
        trainer.train()
        trainer.save_model()
        assert trainer.watermark.measure().ber == 0.0
        evidence = verify_hub_model(tmp_path, KEY, claim=trainer.claim)
        assert (evidence.found, evidence.matched) == (True, 16)


class TestRefusals:
    """Before anything has been trained."""

    def refused(self, kind, tmp_path, model, **changes) -> str:
        settings = {"watermark_key": KEY, **changes}
        with pytest.raises(kind) as caught:
            WatermarkTrainer(model, arguments(tmp_path), **settings)
        return str(caught.value)

    @pytest.mark.parametrize("key", ["acme.key", SECRET, None])
    def test_no_key(self, tmp_path, key):
        said = self.refused(AttachError, tmp_path, vit(), watermark_key=key)
        assert "OwnerKey.load" in said
        assert not traces_in(said.encode())

    def test_the_key_is_required(self, tmp_path):
        with pytest.raises(TypeError, match="watermark_key"):
            WatermarkTrainer(vit(), arguments(tmp_path))

    def test_models_that_cannot_carry_it(self, tmp_path):
        frozen = vit()
        frozen.vit.requires_grad_(False)
        assert "frozen" in self.refused(CarrierError, tmp_path, frozen)
        said = self.refused(ModelTooSmallError, tmp_path, Bare(), watermark_scheme=Scheme(bits=999))
        assert "Scheme(bits=832)" in said
        self.refused(CarrierMissingError, tmp_path, vit(), watermark_carriers=["fc1"])


class TestCheckpoints:
    def check(self, folder: Path, *, matched: int = 32) -> None:
        claim = Claim.from_bytes((folder / CLAIM_FILE).read_bytes(), str(folder))
        claim.check(str(folder))
        assert claim.commits_to(KEY)
        assert check_digests(Checkpoint.open(FolderFiles(folder)), claim) == len(claim.carriers)
        evidence = verify_hub_model(folder, KEY)
        assert (evidence.found, evidence.matched) == (True, matched)
        assert not verify_hub_model(folder, OTHER, claim=None).found

    @pytest.mark.parametrize("make", [vit, resnet])
    @pytest.mark.parametrize(
        ("changes", "steps"),
        [
            ({"max_steps": 7, "save_strategy": "steps", "save_steps": 3}, [3, 6, 7]),
            ({"max_steps": 6, "save_strategy": "epoch", "save_total_limit": 2}, [4, 6]),
        ],
        ids=["steps", "epoch"],
    )
    def test_claim_and_plain_loading(self, tmp_path, make, changes, steps):
        trainer = trained(tmp_path, make(), seal=False, **changes)
        found = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
        assert found == steps
        for step in steps:
            self.check(tmp_path / f"checkpoint-{step}")
        assert (tmp_path / CLAIM_FILE).exists() is False
        loaded = AutoModelForImageClassification.from_pretrained(
            tmp_path / f"checkpoint-{steps[-1]}"
        )
        assert same(state_of(loaded), state_of(trainer.model))
        assert trainer.claim.carriers[0].name in load_file(
            tmp_path / f"checkpoint-{steps[-1]}" / "model.safetensors"
        )

    @pytest.mark.parametrize("scheme", [PROJECTION, HINGE], ids=lambda s: s.name)
    def test_the_metrics_of_a_checkpoint_are_its_own(self, tmp_path, scheme):
        trainer = trained(
            tmp_path, vit(), scheme, seal=False,
            max_steps=9, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
            learning_rate=3e-3,
        )  # fmt: skip
        logged = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
        assert list(logged) == [3, 6, 9]
        for step, value in logged.items():
            model = AutoModelForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
            plain = Trainer(model=model, args=arguments(tmp_path), eval_dataset=Images(12))
            assert plain.evaluate()["eval_loss"] == value
        assert trainer.evaluate()["eval_loss"] == logged[9]

    @pytest.mark.parametrize("scheme", [PROJECTION, HINGE], ids=lambda s: s.name)
    def test_resuming(self, tmp_path, scheme):
        changes = {"max_steps": 14, "save_strategy": "steps", "save_steps": 5}
        whole = trained(tmp_path / "whole", resnet(), scheme, **changes)
        resumed = WatermarkTrainer(
            model=resnet(),
            args=arguments(tmp_path / "resumed", **changes),
            train_dataset=Images(),
            watermark_key=KEY,
            watermark_scheme=scheme,
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
        assert resumed.state.global_step == 14
        assert same(state_of(resumed.model), state_of(whole.model))
        assert losses(resumed) == losses(whole)
        if scheme is PROJECTION:
            assert resumed.watermark.measure().ber == 0.0
            self.check(tmp_path / "resumed" / "checkpoint-14")

    def test_resuming_a_vit(self, tmp_path):
        """transformers 5.23 renames a ViT's tensors on saving and resumes without renaming them
        back (huggingface/transformers #43701), so the model has to be loaded from the checkpoint.
        """
        changes = {"max_steps": 14, "save_strategy": "steps", "save_steps": 5}
        whole = trained(tmp_path / "whole", vit(), **changes)
        checkpoint = tmp_path / "whole" / "checkpoint-5"
        resumed = WatermarkTrainer(
            model=AutoModelForImageClassification.from_pretrained(checkpoint),
            args=arguments(tmp_path / "resumed", **changes),
            train_dataset=Images(),
            watermark_key=KEY,
            watermark_scheme=PROJECTION,
        )
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert same(state_of(resumed.model), state_of(whole.model))

    def test_resuming_with_trainer(self, tmp_path):
        changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trained(tmp_path, resnet(), **changes)
        plain = Trainer(model=resnet(), args=arguments(tmp_path, **changes), train_dataset=Images())
        plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert plain.state.global_step == 6
        assert WatermarkLoss(plain.model, KEY, PROJECTION).measure().ber == 0.0

    @pytest.mark.parametrize("strategy", ["steps", "best"])
    def test_the_best_model_at_the_end(self, tmp_path, strategy):
        scores = iter([0.1, 0.9, 0.3, 0.2])
        trainer = WatermarkTrainer(
            model=resnet(),
            args=arguments(
                tmp_path,
                max_steps=8,
                save_strategy=strategy,
                save_steps=2,
                eval_strategy="steps",
                eval_steps=2,
                learning_rate=3e-3,
                load_best_model_at_end=True,
                metric_for_best_model="score",
            ),
            train_dataset=Images(),
            eval_dataset=Images(12),
            compute_metrics=lambda prediction: {"score": next(scores)},
            watermark_key=KEY,
            watermark_scheme=PROJECTION,
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
        best = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
        carriers = {carrier.name for carrier in trainer.watermark.carriers}
        assert carriers < state_of(best).keys()
        for name, value in state_of(best).items():
            assert torch.equal(value, state_of(trainer.model)[name]) is (name not in carriers)
        assert trainer.watermark.measure().margin >= 0.998 * trainer.watermark.projection.margin
        trainer.save_model()
        self.check(tmp_path)

    def test_named_carriers_stay_out_of_the_public_claim(self, tmp_path):
        names = [f"vit.layers.{i}.mlp.fc2.weight" for i in (1, 3)]
        trainer = WatermarkTrainer(
            vit(),
            arguments(tmp_path, save_strategy="steps", save_steps=3),
            train_dataset=Images(),
            watermark_key=KEY,
            watermark_scheme=PROJECTION,
            watermark_carriers=names,
        )
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        saved = [f"vit.encoder.layer.{i}.output.dense.weight" for i in (1, 3)]
        assert [carrier.name for carrier in trainer.claim.carriers] == saved
        for path in tmp_path.rglob("*"):
            if path.name in ("model.safetensors", "optimizer.pt") or path.is_dir():
                continue  # they name all tensors
            content = path.read_bytes()
            assert not any(name.encode() in content for name in names + saved), path
        public = Claim.from_bytes((tmp_path / CLAIM_FILE).read_bytes(), "")
        assert public.hides_carriers
        public.check("")
        owners = tmp_path / "owners.json"
        owners.write_bytes(trainer.claim.to_bytes())
        assert verify_hub_model(tmp_path, KEY, claim=owners).matched == 32
        assert trainer.watermark.measure().ber == 0.0

    @pytest.mark.parametrize("scheme", [None, HINGE, MEAN_BCE, Scheme(bits=16, strength=0.2)])
    def test_the_claim_says_how_to_read(self, tmp_path, scheme):
        trainer = trained(tmp_path, vit(), scheme)
        trainer.save_model(str(tmp_path / "elsewhere"))
        claim = Claim.from_bytes((tmp_path / "elsewhere" / CLAIM_FILE).read_bytes(), "")
        assert claim == trainer.claim
        assert Scheme.from_name(claim.scheme) == (scheme or Scheme())
        assert verify_hub_model(tmp_path / "elsewhere", KEY).scheme == claim.scheme

    def test_weights_that_are_not_finite(self, tmp_path):
        """Such a model is saved as Trainer saves it, without a claim, and said so."""

        class Breaking(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                if state.global_step == 2:
                    with torch.no_grad():
                        model.vit.layers[1].mlp.fc1.weight[3, 3] = math.nan

        trainer = WatermarkTrainer(
            vit(),
            arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1),
            train_dataset=Images(),
            callbacks=[Breaking()],
            watermark_key=KEY,
        )
        with pytest.warns(UserWarning, match="No claim was written"):
            trainer.train()
        for step in range(1, 5):
            folder = tmp_path / f"checkpoint-{step}"
            assert (folder / CLAIM_FILE).exists() == (step == 1)
            weights = load_file(folder / "model.safetensors")
            name = "vit.encoder.layer.1.intermediate.dense.weight"
            assert np.isnan(weights[name]).any() == (step > 1)
        assert trainer.claim is None
        assert math.isnan(trainer.state.log_history[2]["watermark_ber"])
        trainer.create_model_card()

    def test_a_claim_never_outlives_its_weights(self, tmp_path):
        trainer = trained(tmp_path, vit())
        trainer.save_model()
        self.check(tmp_path)
        with torch.no_grad():
            trainer.model.vit.layers[0].mlp.fc1.weight.fill_(math.inf)
        with pytest.warns(UserWarning, match="No claim was written"):
            trainer.save_model()
        assert not (tmp_path / CLAIM_FILE).exists()
        assert trainer.claim is None

    def test_a_card_when_only_checkpoints_were_saved(self, tmp_path):
        """As in many scripts: train, then `create_model_card`, and no `save_model` before it."""
        trainer = trained(tmp_path, vit(), save_strategy="steps", save_steps=3)
        assert trainer.claim is not None
        trainer.create_model_card(tags=["vision"])
        assert "generated_from_trainer" in (tmp_path / "README.md").read_text()
        trainer.save_model()
        trainer.create_model_card(tags=["vision"])
        card = (tmp_path / "README.md").read_text()
        assert KEY.commitment in card
        assert "- vision" in card

    def test_a_card_that_was_edited(self, tmp_path):
        trainer = trained(tmp_path, vit())
        trainer.save_model()
        trainer.create_model_card()
        path = tmp_path / "README.md"
        edited = path.read_text() + "\nMeasured on Tuesdays.\n"
        path.write_text(edited)
        trainer.create_model_card()
        assert path.read_text() == edited
        path.write_text("---\nlicense: mit # ours\n---\n# Mine\n")
        trainer.create_model_card()
        card = path.read_text()
        assert "license: mit # ours" in card
        assert "# Mine" in card
        assert KEY.commitment in card


class Stop(Exception):  # noqa: N818 - what a user's interruption looks like
    pass


class TestAgain:
    """A cell of a notebook that is run twice, and what happens to cells."""

    def test_two_trainers_one_after_another(self, tmp_path):
        model = vit()
        first = trained(tmp_path / "1", model)
        second = trained(tmp_path / "2", model)
        assert second.model is first.model
        assert second.watermark.measure().ber == 0.0
        second.train()
        first.train()
        assert WatermarkLoss(model, KEY, PROJECTION).measure().ber == 0.0

    @pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_train_begin", "on_save"])
    @pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
    def test_interrupted(self, tmp_path, event, error):
        def interrupt(self, args, state, control, **kwargs):
            if state.global_step == (0 if event == "on_train_begin" else 2):
                raise error

        callback = type("Interrupting", (TrainerCallback,), {event: interrupt})()
        model = vit()

        def new():
            return WatermarkTrainer(
                model,
                arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
                train_dataset=Images(),
                callbacks=[callback],
                watermark_key=KEY,
            )

        first = new()
        with pytest.raises(error) as caught:
            first.train()
        assert caught.traceback  # alive, as a notebook keeps it, with all its frames
        with pytest.raises(error):
            new().train()  # the whole cell
        with pytest.raises(error):
            first.train()  # its last line
        first.remove_callback(callback)
        first.train()
        assert first.watermark.measure().ber == 0.0
        first.save_model()
        assert verify_hub_model(tmp_path, KEY).found

    def test_a_loop_of_ones_own_afterwards(self, tmp_path):
        trainer = trained(tmp_path, vit())
        watermark = WatermarkLoss(trainer.model, KEY)
        watermark.detach()

    def test_two_owners_in_turn(self, tmp_path):
        model = vit()
        trained(tmp_path / "1", model)
        other = WatermarkTrainer(
            model, arguments(tmp_path / "2"), train_dataset=Images(), watermark_key=OTHER
        )
        other.train()
        assert WatermarkLoss(model, KEY, PROJECTION).measure().ber == 0.0
        assert WatermarkLoss(model, OTHER).measure().ber == 0.0

    def test_nothing_is_left_on_the_model(self, tmp_path):
        model = vit()
        model.train()

        def hooks():
            return {
                name: (sorted(vars(module)), len(module._forward_hooks), module.training)
                for name, module in model.named_modules()
            }

        Trainer(model=model, args=arguments(tmp_path), train_dataset=Images()).train()
        before, keys = hooks(), list(model.state_dict())
        trained(tmp_path, model, HINGE)
        trained(tmp_path, model)
        assert hooks() == before
        assert list(model.state_dict()) == keys


def traces_in(content: bytes, key: OwnerKey = KEY, secret: bytes = SECRET) -> list[str]:
    """The forms of key material that the content holds."""
    seed, salt = key.stream("identity/ed25519", 32), key.stream("claim/carriers", 32)
    found = []
    for name, raw in (("secret", secret), ("seed", seed), ("salt", salt)):
        half = raw[8:24]  # part of it is bad enough
        forms = {
            "bytes": half,
            "hex": half.hex().encode(),
            "HEX": half.hex().upper().encode(),
            "repr": repr(half)[2:-1].encode(),
            "reversed": half[::-1],
        }
        for separator in (", ", ",", " ", "\n", ",\n    "):
            forms[f"decimal {separator!r}"] = separator.join(map(str, half)).encode()
        for shift in range(3):  # wherever it starts in what was encoded
            text = base64.b64encode(raw[shift : shift + 24])
            forms[f"base64 +{shift}"] = text
            forms[f"urlsafe +{shift}"] = base64.urlsafe_b64encode(raw[shift : shift + 24])
        found += [f"{name}: {form}" for form, value in forms.items() if value in content]
    return found


@pytest.fixture
def every_log(caplog, monkeypatch):
    """Logs of all levels of everything that takes part."""
    caplog.set_level(logging.DEBUG)
    before = transformers_logging.get_verbosity()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    yield caplog
    transformers_logging.set_verbosity(before)


class TestSecrets:
    def test_the_search_finds_what_it_looks_for(self):
        seed = KEY.stream("identity/ed25519", 32)
        for raw in (SECRET, seed):
            for leak in (
                b"x" + raw,
                raw.hex().encode(),
                base64.b64encode(raw),
                base64.b64encode(b"x" + raw + b"yy"),
                base64.urlsafe_b64encode(b"xx" + raw),
                str(list(raw)).encode(),
                json.dumps(list(raw), indent=4).encode(),
                repr({"key": raw}).encode(),
                torch.tensor(list(raw), dtype=torch.uint8).numpy().tobytes(),
            ):
                assert traces_in(leak)
        assert not traces_in(OTHER.public_key.encode() + bytes(range(256)))

    def test_nothing_of_the_key_is_written_or_shown(self, tmp_path, capfd, every_log):
        """Files, logs at the lowest level, both streams, warnings, exceptions."""
        said, keys = [], [KEY]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i, scheme in enumerate((None, HINGE)):
                trainer = trained(
                    tmp_path / str(i), vit(), scheme,
                    save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                    log_level="debug",
                )  # fmt: skip
                trainer.save_model()
                keys.append(KEY.sealed(trainer.claim.seal.nonce))
                trainer.create_model_card()
                said += [repr(trainer.watermark), str(trainer.args), repr(trainer.state)]
                said += [repr(vars(trainer)), repr(trainer.callback_handler.callbacks)]
                mark = WatermarkLoss(trainer.model, KEY)
                with pytest.raises(AttachError) as error:
                    WatermarkLoss(trainer.model, KEY)
                said += [repr(error.value), repr(mark)]
                with pytest.raises(TypeError) as error:
                    torch.save(trainer._watermark_key, tmp_path / "key.pt")
                said += [repr(error.value)]
        said += [str(warning.message) for warning in caught]
        out, err = capfd.readouterr()
        said += [out, err, every_log.text]
        assert "Running training" in every_log.text
        assert "watermark_ber" in out
        told = "\n".join(said).encode()
        assert not any(traces_in(told, key, key._secret) for key in keys)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        names = {path.name for path in files}
        assert {"training_args.bin", "trainer_state.json", CLAIM_FILE, "README.md"} <= names
        for path in files:
            content = path.read_bytes() + str(path).encode()
            assert not any(traces_in(content, key, key._secret) for key in keys), path


SCRIPT = textwrap.dedent(
    """
    import hashlib, json, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[2])
    from test_trainer import *

    folder = Path(sys.argv[1])
    key = OwnerKey.load(folder / "acme.key")

    def run(name, model, scheme, **changes):
        seen = Gradients()
        trainer = WatermarkTrainer(
            model=model, args=arguments(folder / name, **changes), train_dataset=Images(),
            eval_dataset=Images(12), callbacks=[seen], watermark_key=key, watermark_scheme=scheme,
        )
        trainer.train()
        return trainer, seen.steps

    single = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    for scheme in (HINGE, MEAN_BCE):
        for micro, accumulation, tokens in ((8, 1, True), (2, 4, True), (2, 4, False)):
            changes = {"per_device_train_batch_size": micro,
                       "gradient_accumulation_steps": accumulation,
                       "average_tokens_across_devices": tokens}
            _, steps = run("loss", vit(), scheme, **single, **changes)
            rank = torch.distributed.get_rank()
            name = f"{scheme.statistic}-{accumulation}-{tokens}-{rank}.pt"
            torch.save(steps[0], folder / name)
    # Every process starts from other weights: DDP hands out those of the first.
    torch.manual_seed(rank)
    model = vit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    trainer, _ = run("projection", model, PROJECTION, max_steps=13, per_device_train_batch_size=4,
                     save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6)
    trainer.save_model()
    metrics = trainer.evaluate()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    report = {
        "rank": rank, "world": torch.distributed.get_world_size(),
        "wrapped": type(trainer.model_wrapped).__name__,
        "weights": hashlib.sha256(weights).hexdigest(), "eval_loss": metrics["eval_loss"],
        "ber": trainer.watermark.measure().ber, "claim": trainer.claim is not None,
        "logged": sum("watermark_ber" in entry for entry in trainer.state.log_history),
    }
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()
    """
)


@pytest.mark.distributed
class TestTwoProcesses:
    def test_ddp(self, tmp_path):
        KEY.save(tmp_path / "acme.key")
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        here = Path(__file__).parent
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2", str(script), str(tmp_path), str(here),
            ],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1)]
        assert [report["rank"] for report in reports] == [0, 1]
        assert {report["world"] for report in reports} == {2}
        assert {report["wrapped"] for report in reports} == {"DistributedDataParallel"}
        assert reports[0]["weights"] == reports[1]["weights"]
        assert reports[0]["eval_loss"] == reports[1]["eval_loss"]
        assert [report["ber"] for report in reports] == [0.0, 0.0]
        assert [report["claim"] for report in reports] == [True, False]
        assert [report["logged"] for report in reports] == [13, 13]
        for folder in ("", "checkpoint-6", "checkpoint-12"):
            evidence = verify_hub_model(tmp_path / "projection" / folder, KEY)
            assert (evidence.found, evidence.matched) == (True, 32)
        # What two processes saved, one goes on with.
        trainer = WatermarkTrainer(
            model=vit(),
            args=arguments(tmp_path / "resumed", max_steps=13, per_device_train_batch_size=8),
            train_dataset=Images(),
            watermark_key=KEY,
            watermark_scheme=PROJECTION,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "projection" / "checkpoint-6"))
        assert trainer.state.global_step == 13
        trainer.save_model()
        evidence = verify_hub_model(tmp_path / "resumed", KEY)
        assert (evidence.found, evidence.matched) == (True, 32)
        # The same 16 images in one process: the term is neither doubled nor halved.
        for scheme in (HINGE, MEAN_BCE):
            (alone,) = gradients(tmp_path / "alone", scheme, 16, 1)
            found = sorted(tmp_path.glob(f"{scheme.statistic}-*.pt"))
            assert len(found) == 6
            for path in found:
                TestGradients().close(alone, torch.load(path))
        assert not traces_in((done.stdout + done.stderr).encode())
