"""Attacks that go on training: fine-tuning in its variants, adversarial training, distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_watermark.softlabels.answers import logits_of
from hf_watermark.stress.attacks import Attack, Change, Means, in_turn
from hf_watermark.stress.layers import head
from hf_watermark.stress.training import Recipe, answers, cross_entropy, train

__all__ = ["ATTACKS", "adversarially_trained", "distilled", "fine_tuned", "fresh", "new_head"]

_TEMPERATURE = 3.0
_PGD_STEPS = 5
_STUDENT_EPOCHS = 4.0


def fine_tuned(recipe: Recipe | None = None, *, label_smoothing: float = 0.0) -> Change:
    """Trained on, on the attacker's images and labels."""

    def change(model: Any, means: Means) -> Any:
        return train(model, means, recipe or Recipe(), cross_entropy(label_smoothing))

    return change


def new_head(model: Any, means: Means) -> Any:
    """The last layer drawn anew."""
    head(model).reset_parameters()
    return model


def adversarially_trained(epsilon: float) -> Change:
    """Trained on images that are moved where the loss rises, each value by at most epsilon.

    Args:
        epsilon: In the units of the model's input.
    """
    plain = cross_entropy()

    def loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
        moved = images + epsilon * (2.0 * torch.rand_like(images) - 1.0)
        for _ in range(_PGD_STEPS):
            moved = moved.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(plain(model, moved, labels), moved)
            moved = moved + 2.5 * epsilon / _PGD_STEPS * slope.sign()
            moved = images + (moved - images).clamp(-epsilon, epsilon)
        return plain(model, moved.detach(), labels)

    def change(model: Any, means: Means) -> Any:
        return train(model, means, Recipe(), loss)

    return change


def fresh(model: Any) -> Any:
    """A model of the same configuration with new weights."""
    return type(model)(model.config).to(model.device)


def distilled(model: Any, means: Means) -> Any:
    """A fresh model of the same architecture, taught by the victim's soft labels."""
    taught = answers(model, means.images)

    def loss(student: Any, images: Tensor, wanted: Tensor) -> Tensor:
        logits = logits_of(student(pixel_values=images), labelled=False) / _TEMPERATURE
        target = (taught[wanted] / _TEMPERATURE).log_softmax(1)
        return nn.functional.kl_div(
            logits.log_softmax(1), target, reduction="batchmean", log_target=True
        )

    numbered = replace(means, labels=torch.arange(len(means.images)))  # which image it is
    return train(fresh(model), numbered, Recipe(epochs=_STUDENT_EPOCHS), loss)


_ADI = "Adi et al. 2018"
_LUKAS = "Lukas et al., S&P 2022"


def _attack(
    name: str, change: Change, source: str, *, quick: bool = False, **parameters: Any
) -> Attack:
    return Attack(name, "fine-tuning", change, source, parameters, needs_data=True, quick=quick)


ATTACKS: tuple[Attack, ...] = (
    _attack("fine-tune-1x", fine_tuned(), f"FTAL: {_ADI}", quick=True, rate="1x"),
    _attack("fine-tune-10x", fine_tuned(Recipe(10.0)), f"FTAL: {_ADI}", quick=True, rate="10x"),
    _attack("fine-tune-head", fine_tuned(Recipe(head_only=True)), f"FTLL: {_ADI}", rate="1x"),
    _attack("retrain-1x", in_turn(new_head, fine_tuned()), f"RTAL: {_ADI}", rate="1x", head="new"),
    _attack(
        "retrain-10x",
        in_turn(new_head, fine_tuned(Recipe(10.0))),
        f"RTAL: {_ADI}",
        rate="10x",
        head="new",
    ),
    _attack(
        "retrain-head",
        in_turn(new_head, fine_tuned(Recipe(epochs=2.0, head_only=True))),
        f"RTLL: {_ADI}",
        rate="1x",
        epochs="2x",
        head="new",
    ),
    *(
        _attack(
            f"weight-decay-{decay:g}",
            in_turn(fine_tuned(Recipe(weight_decay=decay, momentum=0.9)), fine_tuned()),
            _LUKAS,
            weight_decay=decay,
            then="fine-tuning at 1x",
        )
        for decay in (0.1, 0.25)
    ),
    _attack("label-smoothing", fine_tuned(label_smoothing=0.3), _LUKAS, smoothing=0.3),
    *(
        _attack(
            f"adversarial-{epsilon:g}",
            adversarially_trained(epsilon),
            f"Madry et al. 2018; {_LUKAS}",
            epsilon=epsilon,
            steps=_PGD_STEPS,
        )
        for epsilon in (0.01, 0.1)
    ),
    _attack(
        "distillation",
        distilled,
        f"Hinton et al. 2015; {_LUKAS}",
        temperature=_TEMPERATURE,
        epochs=f"{_STUDENT_EPOCHS:g}x",
        student="the same architecture",
    ),
)
