"""A student of one's own marked model: its weights carry that mark, without the wrapper."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from soft_models import KEY, calibrated, images, resnet, vit
from test_softlabels_distillation import answers, blends, labelled_digits, network, trained
from test_trainer import KEY as WEIGHTS_KEY
from test_trainer import SECRET, Gradients, _cheap, arguments, every_log, state_of, traces_in  # noqa: F401
from transformers import AutoModelForImageClassification, Trainer

from hf_watermark import OwnerKey, Scheme
from hf_watermark.errors import AttachError, NotCalibratedError, SoftLabelError
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.teacher import Teacher
from hf_watermark.trainer import WatermarkTrainer
from hf_watermark.verify import verify_hub_model, verify_outputs


class Shown(torch.utils.data.Dataset):
    """Images, with labels or without."""

    def __init__(self, x, labels=None):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        item = {"pixel_values": self.x[i]}
        return item if self.labels is None else {**item, "labels": self.labels[i]}


class Listless(torch.nn.Module):
    """Takes no further arguments, so that Trainer divides its loss."""

    def __init__(self):
        super().__init__()
        self.inner = resnet(seed=4)
        self.config = self.inner.config

    def forward(self, pixel_values, labels=None):
        return self.inner(pixel_values=pixel_values, labels=labels)


def make_trainer(folder, teacher, model, *, data=None, scheme=None, callbacks=(), **changes):
    temperature = changes.pop("temperature", 1.0)
    loss = changes.pop("loss", None)
    return WatermarkTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Shown(images(16)) if data is None else data,
        eval_dataset=Shown(images(12, 5), torch.arange(12) % 10),
        callbacks=list(callbacks),
        compute_loss_func=loss,
        watermark_key=WEIGHTS_KEY,
        watermark_scheme=scheme or Scheme(bits=32),
        watermark_teacher=teacher,
        distillation_temperature=temperature,
    )


# What it is for -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A student of one's own served model, trained by Trainer and saved, and what to ask it."""
    folder = tmp_path_factory.mktemp("published")
    x, y = labelled_digits()
    teacher = trained(0, x[:900], y[:900], 12)
    served = SoftLabelWatermark(teacher, KEY, count=32).calibrate(blends(x[:900], 1200, 1))
    before = state_of(teacher)
    trainer = make_trainer(
        folder,
        served,
        network(5),
        data=Shown(blends(x[900:], 3000, 2)),
        max_steps=-1,
        num_train_epochs=8,
        per_device_train_batch_size=64,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        weight_decay=1e-3,
        logging_steps=50,
    )
    trainer.train()
    trainer.save_model()
    probes = blends(x[:900], 1500, 3)
    return {
        "folder": folder,
        "trainer": trainer,
        "served": served,
        "unchanged": all(map(torch.equal, before.values(), state_of(teacher).values())),
        "probes": probes,
        "labelled": (x[900:], y[900:]),
    }


def test_the_weights_carry_the_mark_of_the_soft_labels(published):
    student = AutoModelForImageClassification.from_pretrained(published["folder"]).eval()
    assert type(student).__module__.startswith("transformers.")
    said = answers(student, published["probes"]).numpy()
    evidence = verify_outputs(said, published["probes"], published["served"])
    assert evidence.found
    assert evidence.log10_p < -6, evidence
    stranger = published["served"].probes(published["probes"])
    assert not verify_outputs(said, None, stranger, (), "a customer").found

    x, y = published["labelled"]
    right, teachers = (
        (answers(model, x).argmax(1) == y).float().mean()
        for model in (student, published["served"].model)
    )
    assert right > teachers - 0.03


def test_the_weights_carry_their_own_mark_as_well(published):
    assert verify_hub_model(published["folder"], WEIGHTS_KEY).found
    assert published["trainer"].claim is not None


def test_the_teacher_is_as_it_was(published):
    assert published["unchanged"]
    served = published["served"]
    assert not served.model.training
    x = published["probes"][:200]
    with torch.no_grad():
        clean, marked = served.model(pixel_values=x).logits, served(pixel_values=x).logits
    assert torch.equal(clean.argmax(1), marked.argmax(1))


def test_nothing_of_the_teacher_is_saved(tmp_path, capfd, every_log):  # noqa: F811
    """Every file and every log of a run, searched for keys, features and signs."""
    key = OwnerKey(SECRET, "acme")
    served = SoftLabelWatermark(vit(), key).calibrate(images(640))
    trainer = make_trainer(
        tmp_path, served, resnet(seed=4), save_strategy="steps", save_steps=2, log_level="debug"
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    arrays = {
        "own": served.lens.map.own,
        "context": served.lens.map.context,
        "offset": served.lens.map.offset,
        "signs": served.signs.numpy(),
        "digests": served._digests,
        "weights": served.model.classifier.weight.detach().numpy(),
    }
    pieces = {name: np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}
    halves = {
        name: content[64 : 64 + min(64, len(content) // 2)] for name, content in pieces.items()
    }
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json", "model.safetensors", "README.md"} <= {
        path.name for path in files
    }
    out, err = capfd.readouterr()
    said = "\n".join([repr(vars(trainer)), str(trainer.args), out, err, every_log.text])
    for content in (*(path.read_bytes() for path in files), said.encode()):
        assert not traces_in(content, key)
        assert not [name for name, piece in halves.items() if piece in content]
        assert b"SoftLabelWatermark" not in content or content == said.encode()
    for array in (served.signs, served.lens.own):
        assert str(array.flatten()[:3].tolist())[1:-1] not in said


# The loss -----------------------------------------------------------------------------------------


def gradients(
    folder, micro, accumulation, *, labelled=False, make=lambda: resnet(seed=4), **changes
):
    seen = Gradients()
    data = Shown(images(16), torch.arange(16) % 10 if labelled else None)
    kind = changes.pop("kind", None)
    trainer = make_trainer(
        folder, calibrated(), make(), data=data, callbacks=[seen], max_steps=1, optim="sgd",
        max_grad_norm=0.0, per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation, **changes,
    )  # fmt: skip
    if kind is not None:
        trainer.loss_is_scaled_for_ga = kind
    trainer.model.eval()  # batch norm would see other batches
    trainer.model.train = lambda mode=True: setattr(trainer.model, "training", mode)
    trainer.train()
    return seen.steps[0]


def by_hand(temperature=1.0, model=None):
    """The gradient of the mean cross-entropy over the 16 images."""
    model = model or resnet(seed=4)
    x = images(16)
    with torch.no_grad():
        targets = (calibrated()(pixel_values=x).logits / temperature).softmax(1)
    logits = model(pixel_values=x).logits / temperature
    (torch.nn.functional.cross_entropy(logits, targets) * temperature**2).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def close(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.allclose(gradient, other[name], rtol=1e-3, atol=1e-6), name


VARIANTS = {
    "as it comes": {},
    "divided by Trainer": {"kind": False},
    "a bare model": {"make": Listless},
    "tokens not averaged": {"average_tokens_across_devices": False},
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_the_mean_however_it_is_accumulated(tmp_path, labelled, variant):
    found = gradients(tmp_path, 4, 4, labelled=labelled, **VARIANTS[variant])
    close(found, by_hand(model=Listless() if variant == "a bare model" else None))


def test_a_scheme_with_a_term_of_its_own_adds_it(tmp_path):
    hinge = Scheme(bits=32, embedding="hinge", weight=0.3)
    whole = gradients(tmp_path, 16, 1, scheme=hinge)
    close(whole, gradients(tmp_path, 4, 4, scheme=hinge))
    alone = by_hand()
    assert any(not torch.allclose(whole[name], alone[name], atol=1e-5) for name in alone)


def test_temperature(tmp_path):
    close(gradients(tmp_path, 16, 1, temperature=3.0), by_hand(3.0))


def test_evaluation_is_of_the_task(tmp_path):
    trainer = make_trainer(tmp_path, calibrated(), resnet(seed=4), eval_strategy="steps",
                           eval_steps=1)  # fmt: skip
    trainer.train()
    plain = Trainer(
        model=trainer.model, args=arguments(tmp_path), eval_dataset=trainer.eval_dataset
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    rows = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(rows) == 3
    assert all(map(math.isfinite, rows))


def test_the_loss_of_a_customers_view_and_no_gradient_to_the_teacher():
    served = calibrated()
    view = served.for_recipient("customer-1")
    x = images(6, seed=3)
    logits = resnet(seed=4)(pixel_values=x).logits
    own, other = (Teacher(one).losses(logits, x) for one in (served, view))
    assert own.shape == (6,)
    assert not torch.allclose(own, other, atol=1e-3)
    own.sum().backward()
    assert served.model.classifier.weight.grad is None


def test_a_teacher_in_training_answers_as_it_serves():
    served = SoftLabelWatermark(resnet(), KEY).calibrate(images(640))
    x = images(6, seed=3)
    logits = torch.zeros(6, 10)
    expected = Teacher(served).losses(logits, x)
    before = copy.deepcopy(served.model.state_dict())
    served.train()
    assert torch.equal(Teacher(served).losses(logits, x), expected)
    assert served.training
    assert served.model.resnet.training
    assert all(map(torch.equal, before.values(), served.model.state_dict().values()))


# Refusals -----------------------------------------------------------------------------------------


def test_teachers_that_are_none(tmp_path):
    for teacher, error in (
        (vit(), AttachError),
        (SoftLabelWatermark(vit(), KEY), NotCalibratedError),
    ):
        with pytest.raises(error):
            make_trainer(tmp_path, teacher, resnet())
    for heat in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SoftLabelError, match="temperature"):
            make_trainer(tmp_path, calibrated(), resnet(), temperature=heat)


def test_students_that_cannot_learn(tmp_path):
    served = calibrated()
    with pytest.raises(AttachError, match="shares parameters"):
        make_trainer(tmp_path, served, served.model)
    other = resnet()
    other.config.id2label = {i: f"LABEL_{9 - i}" for i in range(10)}
    with pytest.raises(AttachError, match="another order"):
        make_trainer(tmp_path, served, other)
    with pytest.raises(AttachError, match=r"num_labels"):
        make_trainer(tmp_path, served, resnet(7)).train()


def test_two_losses_are_refused(tmp_path):
    for changes in ({"label_smoothing_factor": 0.1}, {"loss": lambda *args, **kwargs: None}):
        with pytest.raises(AttachError, match="cross-entropy"):
            make_trainer(tmp_path, calibrated(), resnet(), **changes)
