"""Which tensors carry the mark: golden selections, and what must not change them."""

from __future__ import annotations

import random
import re

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_watermark import Scheme
from hf_watermark.carriers import (
    Carrier,
    check_capacity,
    choose_carriers,
    matching,
    named_carriers,
    natural_order,
)
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.errors import CarrierError, CarrierMissingError, ModelTooSmallError
from hf_watermark.files import FolderFiles


def each(template: str, *counts: int) -> list[str]:
    """Names of a template with {} for stage (if there are several counts) and block."""
    if len(counts) == 1:
        return [template.format(block) for block in range(counts[0])]
    return [template.format(s, b) for s, count in enumerate(counts) for b in range(count)]


def between(blocks: list[str], *inserted: tuple[str, str]) -> list[str]:
    """Blocks with further names, each before the block that begins as told."""
    result = list(blocks)
    for name, start in inserted:
        at = next(i for i, block in enumerate(result) if block.startswith(start))
        result.insert(at, name)
    return result


FC1 = "layers.{}.mlp.fc1"
CONVNEXT = between(
    each("encoder.stages.{}.layers.{}.pwconv1", 3, 3, 9, 3),
    *((f"encoder.stages.{s}.downsampling_layer.1", f"encoder.stages.{s}.") for s in (1, 2, 3)),
)
SWIN_TINY = each("encoder.layers.{}.blocks.{}.mlp.fc1", 2, 2, 6, 2)
EFFICIENTNET_B7 = [
    f"encoder.blocks.{block}."
    + (
        "projection.project_conv"  # blocks without expansion, and the first of every stage
        if block in (0, 1, 2, 3, 4, 11, 18, 28, 38, 51)
        else "expansion.expand_conv"
    )
    for block in range(55)
]

# For every architecture: the carriers of its default configuration, without prefix and `.weight`.
GOLDEN = {
    "ViT": each(FC1, 12),
    "DeiT": each(FC1, 12),
    "Beit": each(FC1, 12),
    "ViTMSN": each(FC1, 12),
    "IJepa": each(FC1, 12),
    "Dinov2": each("encoder.layer.{}.mlp.fc1", 12),
    "Dinov2WithRegisters": each("encoder.layer.{}.mlp.fc1", 12),
    "Data2VecVision": each("encoder.layer.{}.intermediate.dense", 12),
    "Swin": SWIN_TINY,
    "Swinv2": [name.replace("mlp.fc1", "intermediate.dense") for name in SWIN_TINY],
    "ConvNext": CONVNEXT,
    "ConvNextV2": CONVNEXT,
    "ResNet": each("encoder.stages.{}.layers.{}.layer.1.convolution", 3, 4, 6, 3),
    "Bit": each("encoder.stages.{}.layers.{}.conv2", 3, 4, 6, 3),
    "MobileNetV1": [f"layer.{block}.convolution" for block in range(1, 26, 2)],
    "MobileNetV2": [
        f"layer.{block}."
        + ("reduce_1x1" if block in (0, 2, 5, 9, 12, 15) else "expand_1x1")
        + ".convolution"
        for block in range(16)
    ],
    "EfficientNet": EFFICIENTNET_B7,
    "Segformer": [
        *each("stages.{}.blocks.{}.attention.sequence_reduction.sequence_reduction", 2, 2),
        *(f"stages.{s}.blocks.{b}.mlp.fc1" for s in (2, 3) for b in (0, 1)),
    ],
    "PoolFormer": each("encoder.block.{}.{}.output.conv1", 2, 2, 6, 2),
    "Hiera": each("encoder.stages.{}.layers.{}.mlp.fc1", 2, 3, 16, 3),
    "Cvt": each("encoder.stages.{}.layers.{}.intermediate.dense", 1, 2, 10),
    "PvtV2": [
        *each("encoder.layers.{}.blocks.{}.attention.spatial_reduction", 2, 2),
        *(f"encoder.layers.{s}.blocks.{b}.mlp.dense1" for s in (2, 3) for b in (0, 1)),
    ],
}

TINY_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 11,  # layer.10 after layer.2
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TINY_BEIT = TINY_VIT | {"out_indices": [1, 3, 5, 11]}
TINY_DINO = TINY_VIT | {"mlp_ratio": 2}
TINY_SWIN = {
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 2,
}
TINY_CONV = {"hidden_sizes": [16, 32], "depths": [1, 2]}
TINY_PYRAMID = {
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 1, 2, 2],
    "depths": [1, 1, 1, 1],
}
SMALL = {
    "ViT": TINY_VIT,
    "DeiT": TINY_VIT,
    "Beit": TINY_VIT,
    "ViTMSN": TINY_VIT,
    "IJepa": TINY_VIT,
    "Dinov2": TINY_DINO,
    "Data2VecVision": TINY_VIT,
    "Swin": TINY_SWIN,
    "Swinv2": TINY_SWIN,
    "ConvNext": TINY_CONV | {"num_stages": 2},
    "ConvNextV2": TINY_CONV | {"num_stages": 2},
    "ResNet": TINY_CONV | {"embedding_size": 16, "layer_type": "basic"},
    "RegNet": TINY_CONV | {"embedding_size": 16, "groups_width": 8},
    "MobileNetV1": {"depth_multiplier": 0.25},
    "MobileNetV2": {"depth_multiplier": 0.35},
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 64},
    "Segformer": TINY_PYRAMID | {"decoder_hidden_size": 32},
    "PvtV2": TINY_PYRAMID,
    "PoolFormer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
}


def on_meta(architecture: str, suffix: str = "ForImageClassification", **arguments):
    config = getattr(transformers, f"{architecture}Config")(**arguments)
    with torch.device("meta"):
        return getattr(transformers, architecture + suffix)(config)


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def without_prefix(model, shapes):
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): shape for name, shape in shapes.items()}


def told(carriers) -> list[tuple[int, ...]]:
    return [carrier.shape for carrier in carriers]


# Real architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", GOLDEN)
def test_golden_selection(architecture):
    model = on_meta(architecture)
    carriers = choose_carriers(shapes_of(model))
    prefix = f"{model.base_model_prefix}."
    assert [c.name for c in carriers] == [f"{prefix}{n}.weight" for n in GOLDEN[architecture]]
    for carrier in carriers:
        assert carrier.shape == tuple(model.get_parameter(carrier.name).shape)


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        ("ViT", [(3072, 768)] * 12),
        (
            "ResNet",
            [
                *[(64, 64, 3, 3)] * 3,
                *[(128, 128, 3, 3)] * 4,
                *[(256, 256, 3, 3)] * 6,
                *[(512, 512, 3, 3)] * 3,
            ],
        ),
    ],
)
def test_golden_shapes(architecture, shapes):
    assert told(choose_carriers(shapes_of(on_meta(architecture)))) == shapes


ATTENTION = re.compile(r"(^|[._])(q|k|v|qkv|query|key|value)([._]|$)")


@pytest.mark.parametrize("architecture", sorted({*GOLDEN, *SMALL}))
def test_what_is_never_selected(architecture):
    model = on_meta(architecture, num_labels=64)
    inside = {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_modules()}
    carriers = choose_carriers(shapes_of(model))
    assert carriers
    for carrier in carriers:
        owner, _, leaf = carrier.name.rpartition(".")
        module = model.get_submodule(owner)
        assert leaf == "weight"
        assert owner in inside, "a head"
        assert isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)), "an embedding or a norm"
        assert not ATTENTION.search(owner), "a query, a key or a value"
        assert not re.search(r"embed|patch|position|norm", owner), "an embedding or a norm"
        assert getattr(module, "groups", 1) == 1 or module.weight.shape[1] > 1, "depthwise"
        assert min(carrier.rows, carrier.columns) >= 8


@pytest.mark.parametrize("architecture", sorted({*GOLDEN, *SMALL}))
def test_head_prefix_and_order_change_nothing(architecture):
    model = on_meta(architecture)
    shapes = shapes_of(model)
    chosen = choose_carriers(shapes)
    names = [carrier.name.removeprefix(f"{model.base_model_prefix}.") for carrier in chosen]
    # another head, or none
    other = choose_carriers(shapes_of(on_meta(architecture, num_labels=1234)))
    assert other == chosen
    bare = on_meta(architecture, "Model")
    assert [(c.name, c.shape) for c in choose_carriers(shapes_of(bare))] == [
        *zip(names, told(chosen), strict=True)
    ]
    # the prefix lost, or another one
    stripped = choose_carriers(without_prefix(model, shapes))
    assert [(c.name, c.shape) for c in stripped] == [*zip(names, told(chosen), strict=True)]
    wrapped = choose_carriers({f"module.{name}": shape for name, shape in shapes.items()})
    assert told(wrapped) == told(chosen)
    assert [c.name for c in wrapped] == [f"module.{c.name}" for c in chosen]
    # the order of the file: by name, by size, at random
    generator = random.Random(architecture)
    for _ in range(3):
        items = sorted(shapes.items())
        generator.shuffle(items)
        assert choose_carriers(dict(items)) == chosen
    assert choose_carriers(dict(sorted(shapes.items(), reverse=True))) == chosen


@pytest.mark.parametrize(
    ("architecture", "suffix", "arguments"),
    [
        ("ViT", "ForMaskedImageModeling", TINY_VIT),
        ("DeiT", "ForMaskedImageModeling", TINY_VIT),
        ("Beit", "ForMaskedImageModeling", TINY_VIT),
        ("Swin", "ForMaskedImageModeling", TINY_SWIN),
        ("Swinv2", "ForMaskedImageModeling", TINY_SWIN),
        ("DeiT", "ForImageClassificationWithTeacher", TINY_VIT),
        ("Beit", "ForSemanticSegmentation", TINY_BEIT),
        ("Segformer", "ForSemanticSegmentation", SMALL["Segformer"]),
        ("MobileNetV2", "ForSemanticSegmentation", SMALL["MobileNetV2"]),
    ],
)
def test_heads_of_other_tasks_carry_nothing(architecture, suffix, arguments):
    model = on_meta(architecture, suffix, **arguments)
    bare = choose_carriers(shapes_of(on_meta(architecture, "Model", **arguments)))
    prefix = f"{model.base_model_prefix}."
    chosen = choose_carriers(shapes_of(model))
    assert [(c.name, c.shape) for c in chosen] == [(prefix + c.name, c.shape) for c in bare]


def test_the_decoder_of_a_masked_autoencoder_carries_nothing():
    arguments = TINY_VIT | {
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 32,
    }
    chosen = choose_carriers(shapes_of(on_meta("ViTMAE", "ForPreTraining", **arguments)))
    assert [c.name for c in chosen] == [f"vit.{name}.weight" for name in each(FC1, 11)]


@pytest.mark.parametrize(
    ("architecture", "suffix", "arguments"),
    [
        *((name, "ForImageClassification", arguments) for name, arguments in SMALL.items()),
        # Its pyramid is `fpn.fpn1.conv_transpose1` in the module, and `fpn1.0` in the file.
        ("Beit", "ForSemanticSegmentation", TINY_BEIT),
    ],
)
def test_saved_names_lead_to_the_same_weights_in_the_same_order(
    architecture, suffix, arguments, tmp_path
):
    config = getattr(transformers, f"{architecture}Config")(**arguments)
    torch.manual_seed(0)
    model = getattr(transformers, architecture + suffix)(config)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(FolderFiles(tmp_path))
    ours, theirs = choose_carriers(shapes_of(model)), choose_carriers(checkpoint.shapes())
    assert told(theirs) == told(ours)
    for mine, saved in zip(ours, theirs, strict=True):
        expected = model.get_parameter(mine.name).detach().numpy().reshape(mine.rows, -1)
        assert (checkpoint.read_rows(saved.name, 0, saved.rows) == expected).all()


def test_saving_does_rename(tmp_path):
    """Or the test above would test nothing."""
    renamed = []
    for architecture in ("ViT", "DeiT", "Beit", "Swin", "Segformer"):
        config = getattr(transformers, f"{architecture}Config")(**SMALL[architecture])
        folder = tmp_path / architecture
        model = getattr(transformers, f"{architecture}ForImageClassification")(config)
        model.save_pretrained(folder)
        saved = Checkpoint.open(FolderFiles(folder)).shapes()
        if any(carrier.name not in saved for carrier in choose_carriers(shapes_of(model))):
            renamed.append(architecture)
    assert len(renamed) >= 3


# Names that other libraries use -------------------------------------------------------------------

TIMM_VIT = {
    "cls_token": (1, 1, 192),
    "pos_embed": (1, 197, 192),
    "patch_embed.proj.weight": (192, 3, 16, 16),
    **{
        f"blocks.{block}.{name}": shape
        for block in range(12)
        for name, shape in {
            "norm1.weight": (192,),
            "attn.qkv.weight": (576, 192),
            "attn.proj.weight": (192, 192),
            "norm2.weight": (192,),
            "mlp.fc1.weight": (768, 192),
            "mlp.fc1.bias": (768,),
            "mlp.fc2.weight": (192, 768),
        }.items()
    },
    "norm.weight": (192,),
    "head.weight": (1000, 192),
}
TORCHVISION_RESNET18 = {
    "conv1.weight": (64, 3, 7, 7),
    "bn1.weight": (64,),
    **{
        f"layer{stage + 1}.{block}.{name}": shape
        for stage in range(4)
        for block in range(2)
        for name, shape in {
            "conv1.weight": (64 << stage, 64 << max(0, stage - 1 + block), 3, 3),
            "bn1.weight": (64 << stage,),
            "conv2.weight": (64 << stage, 64 << stage, 3, 3),
            "bn2.running_mean": (64 << stage,),
            **({"downsample.0.weight": (64 << stage, 32 << stage, 1, 1)} if stage > block else {}),
        }.items()
    },
    "fc.weight": (1000, 512),
}
TORCHVISION_VIT = {
    "class_token": (1, 1, 768),
    "conv_proj.weight": (768, 3, 16, 16),
    "encoder.pos_embedding": (1, 197, 768),
    **{
        f"encoder.layers.encoder_layer_{layer}.{name}": shape
        for layer in range(12)
        for name, shape in {
            "ln_1.weight": (768,),
            "self_attention.in_proj_weight": (2304, 768),
            "self_attention.out_proj.weight": (768, 768),
            "mlp.0.weight": (3072, 768),
            "mlp.3.weight": (768, 3072),
        }.items()
    },
    "heads.head.weight": (1000, 768),
}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (TIMM_VIT, each("blocks.{}.mlp.fc1.weight", 12)),
        (TORCHVISION_RESNET18, [f"layer{s}.{b}.conv2.weight" for s in range(1, 5) for b in (0, 1)]),
        (
            TORCHVISION_VIT,
            [
                f"encoder.layers.encoder_layer_{layer}.mlp.{part}.weight"
                for layer in range(12)
                for part in (0, 3)
            ],
        ),
        (  # no numbered block at all
            {"conv1.weight": (16, 3, 3, 3), "conv2.weight": (32, 16, 3, 3), "fc.weight": (10, 32)},
            ["conv1.weight", "conv2.weight"],
        ),
        (  # nn.Sequential
            {"0.weight": (64, 784), "0.bias": (64,), "2.weight": (64, 64), "4.weight": (10, 64)},
            ["0.weight", "2.weight", "4.weight"],
        ),
        ({"weight": (8, 8)}, ["weight"]),
        (
            {"block.0.kernel": (8, 8), "block.1.kernel": (8, 8)},
            ["block.0.kernel", "block.1.kernel"],
        ),
    ],
)
def test_other_libraries(shapes, expected):
    assert [carrier.name for carrier in choose_carriers(shapes)] == expected


# The rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "winner"),
    [
        ({"a.weight": (16, 16), "b.weight": (16, 17)}, "b"),
        ({"a.weight": (32, 16), "b.weight": (16, 32)}, "a"),
        ({"a.weight": (16, 16), "b.weight": (16, 16)}, "b"),
        ({"a.2.weight": (16, 16), "a.10.weight": (16, 16)}, "a.10"),
        ({"a.weight": (16, 4, 2, 2), "b.weight": (16, 16)}, "b"),
        ({"a.weight": (8, 8), "b.weight": (7, 1000)}, "a"),
        ({"a.weight": (8, 8), "b.weight": (1000, 7)}, "a"),
        ({"a.weight": (8, 8), "b.weight": (64, 1, 7, 7)}, "a"),  # depthwise
        ({"a.weight": (8, 8), "b.weight": (4096,)}, "a"),
        ({"a.weight": (8, 8), "b.weight": (1, 64, 64)}, "a"),
        ({"a.weight": (8, 8), "b.weight": (2, 2, 2, 2, 2, 2, 2, 2)}, "a"),
        ({"a.weight": (8, 8), "b.weight": (0, 64)}, "a"),
        ({"a.weight": (8, 8), "b.weight": ()}, "a"),
        ({"a.weight": (8, 8), "b.bias": (64, 64)}, "a"),
        ({"a.weight": (8, 8), "b.weight_scale": (64, 64)}, "a"),
        ({"a.weight": (8, 8), "in_proj_weight": (64, 64)}, "a"),
        ({"a.weight": (8, 8), "in_proj.weight": (64, 64)}, "a"),
        ({"a.weight": (8, 8), "c_attn.weight": (64, 64)}, "a"),
        ({"a.weight": (8, 8), "Q_proj.weight": (64, 64)}, "a"),
        ({"a.weight": (8, 8), "rel_pos.weight": (64, 64)}, "a"),
        ({"a.weight": (8, 8), "reduction.weight": (64, 64)}, "a"),  # patch merging
        ({"a.weight": (8, 8), "sequence_reduction.weight": (64, 64)}, "sequence_reduction"),
    ],
)
def test_which_of_a_block(block, winner):
    shapes = {f"body.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    expected = [f"body.{i}.{winner}.weight" for i in (0, 1)]
    assert [carrier.name for carrier in choose_carriers(shapes)] == expected


def test_layers_outside_blocks_serve_only_without_blocks():
    shapes = {"stem.weight": (64, 64), "mixer.weight": (64, 64), "body.0.weight": (8, 8)}
    assert [c.name for c in choose_carriers(shapes)] == ["body.0.weight"]
    del shapes["body.0.weight"]
    assert [c.name for c in choose_carriers(shapes)] == ["mixer.weight"]


@pytest.mark.parametrize("shapes", [{}, {"a.bias": (64,)}, {"head.weight": (64, 64)}])
def test_nothing_to_choose_from(shapes):
    with pytest.raises(CarrierError, match=f"got {len(shapes)} tensors"):
        choose_carriers(shapes)


PARTS = ["layer", "0", "1", "01", "2", "10", "mlp", "fc1", "conv", "query", "norm", "head", "embed"]
names = st.lists(st.sampled_from(PARTS), max_size=5).map(lambda parts: ".".join([*parts, "weight"]))
sides = st.sampled_from([1, 7, 8, 16, 64])
shapes_of_models = st.dictionaries(names, st.lists(sides, min_size=1, max_size=4).map(tuple))


@given(shapes_of_models, st.randoms())
@example({"a.1.weight": (16, 16), "a.01.weight": (16, 8)}, random.Random(0))
@example({"0.1.weight": (8, 8), "0.01.weight": (8, 8)}, random.Random(1))
@settings(deadline=None)
def test_selection_is_a_function_of_the_set_of_tensors(shapes, generator):
    try:
        chosen = choose_carriers(shapes)
    except CarrierError:
        chosen = None
    items = list(shapes.items())
    generator.shuffle(items)
    # What never qualifies changes nothing, wherever it stands.
    extra = {"layer.0.norm.weight": (64, 64), "0.query.weight": (64, 64), "layer.bias": (64,)}
    for again in (dict(items), dict(items) | extra, extra | dict(items)):
        if chosen is None:
            with pytest.raises(CarrierError):
                choose_carriers(again)
        else:
            assert choose_carriers(again) == chosen
    if chosen is not None:
        assert all(shapes[carrier.name] == carrier.shape for carrier in chosen)
        assert len({carrier.name for carrier in chosen}) == len(chosen)
        order = [natural_order(carrier.name) for carrier in chosen]
        assert order == sorted(order)


@given(shapes_of_models)
@settings(deadline=None)
def test_every_numbered_part_of_the_model_that_has_layers_is_marked(shapes):
    """An eraser who re-initialises one block does not get rid of the mark in another."""
    try:
        chosen = {carrier.name for carrier in choose_carriers(shapes)}
    except CarrierError:
        return
    for name in shapes:
        alone = {name: shapes[name]}
        try:
            choose_carriers(alone)
        except CarrierError:
            assert name not in chosen
            continue
        parts = name.split(".")
        numbered = [".".join(parts[: i + 1]) for i, p in enumerate(parts) if p.isdecimal()]
        for prefix in numbered[:1]:
            assert any(other.startswith(f"{prefix}.") for other in chosen)


@pytest.mark.parametrize(
    "name", ["9" * 10_000, "layer." + "7" * 5_000 + ".weight", "٣.weight", "²", "", "..", "\ud800"]
)
def test_hostile_names_are_only_names(name):
    key = natural_order(name)
    assert key == natural_order(name)
    shapes = {name: (64, 64), "body.0.weight": (8, 8)}
    assert choose_carriers(shapes)


@given(st.text("019٣.aé", max_size=8), st.text("019٣.aé", max_size=8))
@settings(deadline=None)
def test_natural_order_is_total(one, other):
    first, second = natural_order(one), natural_order(other)
    assert (first == second) == (one == other)
    assert (first < second) != (second <= first)


def test_natural_order_by_example():
    ordered = [
        "a",
        "a.0.x",
        "a.0.y",
        "a.1",
        "a.2",
        "a.2.x",
        "a.10",
        "a.10.b",
        "a.b",
        "b1",
        "b02",
        "b10",
    ]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert sorted(shuffled, key=natural_order) == ordered


# Named carriers and capacity ----------------------------------------------------------------------

NAMED = {
    "a.query.weight": (16, 16),
    "b.weight": (4, 4),
    "c.weight": (8, 2, 3, 3),
    "bias": (16,),
    "empty": (0, 16),
    "scalar": (),
}


def test_named_carriers_are_taken_as_given():
    chosen = named_carriers(NAMED, ["c.weight", "a.query.weight"])
    assert chosen == (Carrier("c.weight", (8, 2, 3, 3)), Carrier("a.query.weight", (16, 16)))
    assert (chosen[0].rows, chosen[0].columns, chosen[0].weights) == (8, 18, 144)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ([], CarrierError, "0 names"),
        (["b.weight", "b.weight"], CarrierError, "each once"),
        (["b.weight", "d.weight"], CarrierMissingError, "'d.weight'"),
        (["x" * 10_000], CarrierMissingError, "6 tensors without it"),
        (["bias"], CarrierError, r"shape \[16\]"),
        (["scalar"], CarrierError, r"shape \[\]"),
        (["empty"], CarrierError, r"shape \[0, 16\]"),
    ],
)
def test_named_carriers_refused(chosen, error, message):
    with pytest.raises(error, match=message) as refused:
        named_carriers(NAMED, chosen)
    assert type(refused.value) is error
    assert len(str(refused.value)) < 400


def test_patterns_stand_for_matrices_in_the_models_order():
    shapes = {
        "b.10.o.weight": (16, 16),
        "b.2.o.weight": (16, 16),
        "b.2.o.bias": (16,),
        "b.2.norm.weight": (16,),
        "b.2.depthwise.weight": (16, 1, 3, 3),
        "head.weight": (10, 16),
    }
    assert matching(shapes, ["b.*"]) == ["b.2.o.weight", "b.10.o.weight"]
    assert matching(shapes, ["head.weight", "b.1?.*"]) == ["head.weight", "b.10.o.weight"]
    assert matching(shapes, ["b.2.o.weight", "*"])[0] == "b.2.o.weight"
    assert len(matching(shapes, ["b.2.o.weight", "*"])) == 3  # each once
    assert matching(shapes, ["of no tensor"]) == ["of no tensor"]  # named_carriers says so
    with pytest.raises(CarrierMissingError, match=r"called so.*like '\*\.norm\.\*'"):
        matching(shapes, ["*.norm.*"])
    twice = matching(shapes, ["head.weight", "head.weight"])
    with pytest.raises(CarrierError, match="each once"):
        named_carriers(shapes, twice)


@given(
    st.integers(1, 4096), st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1)
)
@settings(deadline=None)
def test_a_model_that_is_too_small_is_told_how_many_bits_it_can_carry(bits, sizes):
    carriers = [Carrier(f"{i}.weight", size) for i, size in enumerate(sizes)]
    for scheme, most in (
        (Scheme(bits=bits), sum(rows * columns for rows, columns in sizes) // 64),
        (Scheme(bits=bits, statistic="mean"), sum(columns for _, columns in sizes)),
        (
            Scheme(bits=bits, statistic="mean", key_matrix="diff"),
            sum(columns for _, columns in sizes) // 2,
        ),
    ):
        if bits <= most:
            check_capacity(carriers, scheme)
            continue
        with pytest.raises(ModelTooSmallError) as refused:
            check_capacity(carriers, scheme)
        advice = f"Scheme(bits={most})" if most else "larger model"
        assert advice.lower() in str(refused.value).lower()
        assert f"at most {most} bits" in str(refused.value)


def test_a_real_model_that_is_too_small():
    carriers = choose_carriers(shapes_of(on_meta("ViT", **TINY_VIT | {"num_hidden_layers": 1})))
    with pytest.raises(ModelTooSmallError, match=r"bits=32\) or fewer"):
        check_capacity(carriers, Scheme(bits=64))
    check_capacity(carriers, Scheme(bits=32))
