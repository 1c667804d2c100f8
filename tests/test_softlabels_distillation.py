"""A real student, distilled from marked soft labels of real images, is found and named."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_digits
from soft_models import KEY
from torch.nn.functional import cross_entropy
from transformers import ResNetConfig, ResNetForImageClassification

from hf_watermark import OwnerKey
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.chips import chip_signs
from hf_watermark.softlabels.detection import agreement, class_weights
from hf_watermark.softlabels.outputs import Outputs
from hf_watermark.verify import verify_outputs

PROBES = 1500


def network(seed):
    torch.manual_seed(seed)
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        )
    )


def trained(seed, x, targets, epochs):
    """Distilled from (n, 10) probabilities, or trained on labels."""
    model = network(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=1e-3)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for batch in order[: len(x) // 64 * 64].split(64):
            loss = cross_entropy(model(pixel_values=x[batch]).logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def answers(model, x, **kwargs):
    parts = [model(pixel_values=part, **kwargs).logits for part in x.split(250)]
    return torch.cat(parts).softmax(1)


def blends(digits, n, seed):
    """Unlabelled images: two digits laid over each other, one of them faint."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(len(digits), (n,), generator=generator) for _ in range(2))
    share = 0.45 * torch.rand(n, 1, 1, 1, generator=generator)
    return (1 - share) * digits[first] + share * digits[second]


def labelled_digits():
    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None].repeat(1, 3, 1, 1) / 8 - 1
    x = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    return x, torch.from_numpy(data.target)


@pytest.fixture(scope="module")
def world():
    x, y = labelled_digits()
    teacher = trained(0, x[:900], y[:900], 12)
    served = SoftLabelWatermark(teacher, KEY, count=32).calibrate(blends(x[:900], 1200, 1))
    queries, probes = blends(x[900:], 6000, 2), blends(x[:900], PROBES, 3)
    leaked = served.for_recipient("customer-3")
    return {
        "served": served,
        "labelled": (x[900:], y[900:]),
        "probes": probes,
        "view": served.probes(probes),
        "marked": answers(trained(5, queries, answers(leaked, queries), 8), probes).numpy(),
        "clean": answers(trained(6, queries, answers(teacher, queries), 8), probes).numpy(),
    }


def test_a_student_is_found_and_its_customer_named(world):
    customers = [f"customer-{i}" for i in range(20)]
    evidence = verify_outputs(world["marked"], world["probes"], world["served"], (), customers)
    assert evidence.recipient == "customer-3"
    assert evidence.found
    assert evidence.log10_p < -9, evidence
    view = world["served"].for_recipient("customer-3")
    assert verify_outputs(world["marked"], world["probes"], view).found


def test_other_customers_and_the_owner_are_not_blamed(world):
    for name in (None, "customer-1", "customer-2"):
        evidence = verify_outputs(world["marked"], world["probes"], world["view"], (), name)
        assert not evidence.found, evidence


def test_a_student_of_the_clean_teacher_is_not_found(world):
    customers = [f"customer-{i}" for i in range(20)]
    assert not verify_outputs(world["clean"], None, world["view"], (), customers).found


def test_a_clean_student_among_the_references_helps(world):
    alone = verify_outputs(world["marked"], None, world["view"], (), "customer-3")
    beside = verify_outputs(world["marked"], None, world["view"], [world["clean"]], "customer-3")
    assert beside.t > alone.t - 1.0
    assert beside.log10_p < -9


@pytest.mark.parametrize("form", ["rounded", "top-3", "temperature"])
def test_post_processed_outputs(world, form):
    p = world["marked"]
    if form == "rounded":
        p = p.round(3)
    elif form == "top-3":
        p = np.where(p >= np.sort(p, 1)[:, -3:-2], p, 0.0)
    else:
        p = p**0.25 / (p**0.25).sum(1, keepdims=True)
    assert verify_outputs(p, None, world["view"], [world["clean"]], "customer-3").found


@pytest.mark.parametrize("suspect", ["marked", "clean"])
def test_wrong_keys_on_real_students(world, suspect):
    """300 keys that served nobody: t is standard normal, and no chance is flattering."""
    read = Outputs.read(world[suspect], 10)
    weights = class_weights(read, world["view"])
    t = np.array(
        [agreement(weights, chip_signs(OwnerKey(bytes([i % 256] * 31 + [i // 256])), 32, 10))
         for i in range(300)]
    )  # fmt: skip
    assert 0.88 < t.std() < 1.12
    assert scipy.stats.kstest(t, "norm").pvalue > 0.01
    assert t.max() < 4.5


def test_the_price_is_told_and_no_answer_changes(world):
    x, y = world["labelled"]
    told = world["served"].distortion(x, y)
    assert told.flips == 0
    assert told.accuracy[0] == told.accuracy[1] > 0.8
    assert 0 < told.tv < 0.2
    assert told.kl > 0
    assert told.nll[1] > 0
    assert "argmax flips 0" in str(told)
    assert set(told.to_dict()) >= {"tv", "kl", "ece", "nll", "flips", "expected_price"}
