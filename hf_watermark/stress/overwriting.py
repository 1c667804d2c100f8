"""Attacks by another mark: the attacker's own key, in closed form or trained."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from hf_watermark.carriers import Carrier
from hf_watermark.direct import scheme_for
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import WatermarkError
from hf_watermark.key import OwnerKey
from hf_watermark.projections import Projection
from hf_watermark.scheme import Scheme
from hf_watermark.softlabels.answers import logits_of
from hf_watermark.stress.attacks import Attack, Change, Means, NotApplicableError
from hf_watermark.stress.layers import as_rows, fill, likely_carriers
from hf_watermark.stress.training import Recipe, train

__all__ = ["ATTACKS", "attackers_key", "overwritten", "overwritten_in_training"]


def attackers_key(seed: int, number: int = 0) -> OwnerKey:
    """A key of the attacker's own; what it is follows from the seed alone."""
    secret = hashlib.sha256(f"hf-watermark stress, attacker {seed}, key {number}".encode())
    return OwnerKey(secret.digest(), "attacker")


def overwritten(times: float, keys: int = 1) -> Change:
    """Marks of the attacker's, added to the carriers, which keep their norm.

    Args:
        times: Of the size that our own closed form would take, in all.
        keys: How many marks.
    """

    @torch.no_grad()
    def change(model: Any, means: Means) -> Any:
        weights = likely_carriers(model)
        carriers = tuple(Carrier(name, tuple(w.shape)) for name, w in weights.items())
        total = sum(carrier.weights for carrier in carriers)
        scheme = scheme_for(total)
        distortion = scheme.margin(total) * (scheme.bits / total) ** 0.5
        for number in range(keys):
            projection = Projection(attackers_key(means.seed, number), scheme, carriers)
            for i, weight in enumerate(weights.values()):
                rows = as_rows(weight)
                u = torch.from_numpy(projection.row_signs(i) * projection.message_signs).float()
                mark: Tensor = (u @ torch.from_numpy(projection.x(i)).float()).to(rows.device)
                size = rows.norm()
                marked = rows + mark * (times * distortion * size / mark.norm())
                fill(weight, marked * (size / marked.norm()))
        return model

    return change


def overwritten_in_training(scheme: Scheme, rate: float = 1.0) -> Change:
    """The attacker's mark embedded while he trains on.

    Args:
        scheme: His.
        rate: Learning rate, times his.
    """

    def change(model: Any, means: Means) -> Any:
        try:
            mark = WatermarkLoss(model, attackers_key(means.seed), scheme)
        except WatermarkError as error:
            raise NotApplicableError(error.what) from None

        def loss(attacked: Any, images: Tensor, labels: Tensor) -> Tensor:
            logits = logits_of(attacked(pixel_values=images), labelled=False)
            return mark(torch.nn.functional.cross_entropy(logits, labels))

        model = train(model, means, Recipe(rate), loss, after_step=mark.step)
        mark.detach()
        return model

    return change


_TRAINED = "Wang & Kerschbaum 2019, by training"
_WANG = "Wang & Kerschbaum 2019"


def _attack(
    name: str, change: Change, source: str, *, quick: bool = False, **parameters: Any
) -> Attack:
    trained = "rate" in parameters
    return Attack(name, "overwriting", change, source, parameters, needs_data=trained, quick=quick)


ATTACKS: tuple[Attack, ...] = (
    _attack("overwrite-1x", overwritten(1.0), _WANG, quick=True, strength="1x"),
    _attack("overwrite-10x", overwritten(10.0), _WANG, quick=True, strength="10x"),
    _attack("overwrite-8-keys", overwritten(1.0, 8), _WANG, strength="1x", keys=8),
    _attack(
        "overwrite-trained-1x",
        overwritten_in_training(Scheme()),
        _TRAINED,
        rate="1x",
        scheme=Scheme().name,
    ),
    _attack(
        "overwrite-trained-10x",
        overwritten_in_training(Scheme(), 10.0),
        _TRAINED,
        rate="10x",
        scheme=Scheme().name,
    ),
    *(
        _attack(
            f"overwrite-hinge-{weight:g}",
            overwritten_in_training(Scheme(embedding="hinge", weight=weight)),
            _TRAINED,
            rate="1x",
            scheme=Scheme(embedding="hinge", weight=weight).name,
        )
        for weight in (0.01, 0.1)
    ),
)
