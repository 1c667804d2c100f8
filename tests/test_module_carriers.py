"""Which parameters of a module are marked while it trains, and which never can be."""

from __future__ import annotations

import pytest
import torch
from test_embedding import FC1, message_of, vit
from torch import nn

from hf_watermark import Scheme
from hf_watermark.errors import AttachError, CarrierError, CarrierMissingError, ModelTooSmallError
from hf_watermark.module_carriers import carriers_of, parts_of

NAMES = [FC1.format(i) for i in range(4)]


def test_those_named_or_all_that_are_chosen():
    model = vit()
    assert [carrier.name for carrier in carriers_of(model, Scheme())] == NAMES
    assert [carrier.name for carrier in carriers_of(model, Scheme(), NAMES[2:])] == NAMES[2:]


def test_frozen():
    model = vit()
    model.get_parameter(NAMES[2]).requires_grad_(False)
    said = message_of(CarrierError, carriers_of, model, Scheme(), NAMES)
    assert "'vit.layers.2.mlp.fc1.weight' is frozen" in said
    assert "3 of 4 carriers" in said
    others = [NAMES[0], NAMES[1], NAMES[3]]
    assert [carrier.name for carrier in carriers_of(model, Scheme(), others)] == others
    # Those chosen are the ones that a reader without the claim expects, frozen or not.
    assert [carrier.name for carrier in carriers_of(model, Scheme())] == NAMES


def test_all_frozen():
    model = vit().requires_grad_(False)
    model.classifier.requires_grad_(True)
    said = message_of(CarrierError, carriers_of, model, Scheme())
    assert "is frozen" in said
    assert "modules_to_save" in said
    model.get_parameter(NAMES[0]).requires_grad_(True)
    message_of(ModelTooSmallError, carriers_of, model, Scheme(bits=300))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_cannot_be_marked(dtype):
    model = vit()
    fc1 = model.vit.layers[1].mlp.fc1
    fc1.weight = nn.Parameter(fc1.weight.data.to(dtype), requires_grad=False)
    said = message_of(CarrierError, carriers_of, model, Scheme())
    assert "'vit.layers.1.mlp.fc1.weight' cannot be marked" in said
    assert str(dtype) in said


def test_no_weights_yet():
    with torch.device("meta"):
        model = vit()
    assert "meta device" in message_of(CarrierError, carriers_of, model, Scheme())


def test_missing_doubled_or_unfit_names():
    model, name = vit(), NAMES[0]
    said = message_of(CarrierMissingError, carriers_of, model, Scheme(), [name, "fc9"])
    assert "'fc9'" in said
    message_of(CarrierError, carriers_of, model, Scheme(), [name, name])
    message_of(CarrierError, carriers_of, model, Scheme(), [])
    bias = name.replace("weight", "bias")
    message_of(CarrierError, carriers_of, model, Scheme(), [bias])


def test_parts_are_looked_up_anew():
    model = vit()
    carriers = carriers_of(model, Scheme())
    fc1 = model.vit.layers[1].mlp.fc1
    fc1.weight = nn.Parameter(fc1.weight.detach().clone())
    parts = parts_of(model, carriers)
    assert [part.carrier for part in parts] == list(carriers)
    assert parts[1].parameter is fc1.weight
    fc1.weight = nn.Parameter(torch.zeros(2, 3))
    said = message_of(AttachError, parts_of, model, carriers)
    assert "changed since 'vit.layers.1.mlp.fc1.weight' became a carrier" in said
    assert "got [2, 3]" in said
