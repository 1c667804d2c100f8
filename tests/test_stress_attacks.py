"""Every attack does what it says, to a copy, and the same again from the same seed."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers
from disguised_models import MODELS, marked

from hf_watermark.stress.attacks import Means, NotApplicableError, in_turn
from hf_watermark.stress.disguises import disguised, permuted, together
from hf_watermark.stress.erasure import (
    centred,
    means_replaced,
    rank_kept,
    started_anew,
    top_dropped,
)
from hf_watermark.stress.finetuning import distilled, fine_tuned, new_head
from hf_watermark.stress.layers import as_rows, head, likely_carriers, matrices
from hf_watermark.stress.merging import averaged_with_sibling, low_rank_merged
from hf_watermark.stress.overwriting import attackers_key, overwritten
from hf_watermark.stress.pruning import pruned, pruned_rows
from hf_watermark.stress.quantization import cast, float8, quantized
from hf_watermark.stress.renaming import named_as_in_timm, named_at_random
from hf_watermark.stress.suite import ATTACKS, attacks_of
from hf_watermark.stress.training import Recipe, answers
from hf_watermark.wrappers import unwrapped_parameters

NAMES = [attack.name for attack in ATTACKS]
BY_NAME = dict(zip(NAMES, ATTACKS, strict=True))
MEANS = Means(
    images=torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(3)),
    labels=torch.arange(12) % 10,
    epochs=1,
    learning_rate=1e-3,
    batch_size=6,
)
NOT_FOR = {
    "ViT": {"norms-folded"},
    "basic": {
        "rotation",
        "head-permutation",
        "dummy-neurons",
        "row-shifts",
        "constants-moved",
    },
    "ConvNext": {
        "rotation",
        "head-permutation",
        "dummy-neurons",
        "norms-folded",
        "constants-moved",
    },
    "Swin": {"norms-folded"},
}


@cache
def victim(family: str):
    """A small marked model."""
    return (
        transformers.AutoModelForImageClassification.from_pretrained(
            marked(family).folder, attn_implementation="eager"
        )
        .float()
        .eval()
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(change, family: str = "ViT"):
    """A copy of the victim after a change alone."""
    torch.manual_seed(1)
    return change(copy.deepcopy(victim(family)), MEANS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["ViT", "basic"])
def test_every_attack_works_on_a_copy_and_repeats_itself(name, family):
    attack, model = BY_NAME[name], victim(family)
    before = weights(model)
    state = torch.random.get_rng_state()
    if name in NOT_FOR[family]:
        with pytest.raises(NotApplicableError):
            attack(model, MEANS)
        return
    attacked = attack(model, MEANS)
    assert same(weights(model), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not attacked.training
    assert all(parameter.requires_grad for parameter in attacked.parameters())
    assert same(weights(attacked), before) == (attack.names is not None)
    said = answers(attacked, MEANS.images)
    assert said.shape == (12, 10)
    assert said.isfinite().all()
    if attack.keeps_function and "tune" not in name:
        torch.testing.assert_close(said, answers(model, MEANS.images), rtol=1e-3, atol=1e-3)
    if not attack.needs_data or family == "ViT":
        assert same(weights(attack(model, MEANS)), weights(attacked))


@pytest.mark.parametrize("name", [name for name in NAMES if BY_NAME[name].family == "disguises"])
@pytest.mark.parametrize("family", ["ConvNext", "Swin"])
def test_disguises_of_networks_in_stages(name, family):
    if name in NOT_FOR[family]:
        with pytest.raises(NotApplicableError):
            BY_NAME[name](victim(family), MEANS)
    elif "tune" not in name:
        attacked = BY_NAME[name](victim(family), MEANS)
        assert same(weights(attacked), weights(victim(family))) == (BY_NAME[name].names is not None)
        said, expected = (answers(one, MEANS.images) for one in (attacked, victim(family)))
        torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["DeiT", "Dinov2", "Beit", "bottleneck"])
def test_all_disguises_at_once_keep_the_function(family):
    said = answers(changed(disguised(together), family), MEANS.images)
    expected = answers(victim(family), MEANS.images)
    torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)


def test_another_seed_gives_other_weights():
    attack = BY_NAME["noise-0.1"]
    other = Means(MEANS.images, MEANS.labels, seed=1)
    assert not same(weights(attack(victim("ViT"), MEANS)), weights(attack(victim("ViT"), other)))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.65, 1.0])
def test_pruning_zeroes_exactly_its_share(share):
    together = matrices(changed(pruned(share)))
    total = sum(weight.numel() for weight in together.values())
    assert sum(int((weight == 0).sum()) for weight in together.values()) == round(share * total)
    for weight in matrices(changed(pruned(share, per_tensor=True), "basic")).values():
        assert int((weight == 0).sum()) == round(share * weight.numel())


def test_pruning_keeps_the_largest():
    before = torch.cat([w.flatten() for w in matrices(victim("ViT")).values()])
    after = torch.cat([w.flatten() for w in matrices(changed(pruned(0.65))).values()])
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()


def test_what_was_pruned_stays_so_while_the_rest_is_trained():
    weight = torch.cat(
        [w.flatten() for w in matrices(changed(pruned(0.8, then=Recipe()))).values()]
    )
    bare = torch.cat([w.flatten() for w in matrices(changed(pruned(0.8))).values()])
    assert torch.equal(weight == 0, bare == 0)
    assert not torch.equal(weight, bare)


def test_rows_are_pruned_whole():
    attacked = changed(pruned_rows(0.5))
    for name, weight in likely_carriers(attacked).items():
        empty = (as_rows(weight) == 0).all(1)
        assert int(empty.sum()) == len(weight) // 2
        bias = dict(attacked.named_parameters())[f"{name[:-6]}bias"]
        assert (bias[empty] == 0).all()


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 64), (8, None), (5, 0)])
def test_quantised_groups_have_no_more_levels(bits, group):
    for name, weight in matrices(changed(quantized(bits, group))).items():
        rows = as_rows(weight) if group != 0 else weight.detach().reshape(1, -1)
        for part in torch.split(rows, group or rows.shape[1], dim=1):
            assert max(len(row.unique()) for row in part[:3]) <= 2**bits
        was = dict(victim("ViT").named_parameters())[name]
        assert (weight - was).abs().max() <= (was.max() - was.min()) / (2**bits - 1) / 1.9


def test_floats_of_8_and_16_bits():
    for weight in matrices(changed(float8)).values():
        assert len(weight.abs().unique()) <= 128
    attacked = weights(changed(cast(torch.bfloat16)))
    assert all(torch.equal(t, t.bfloat16().float()) for t in attacked.values())


def test_a_head_alone_is_trained():
    attacked, before = weights(changed(fine_tuned(Recipe(head_only=True)))), weights(victim("ViT"))
    moved = {name for name in before if not torch.equal(attacked[name], before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    attacked = weights(changed(fine_tuned(Recipe(head_only=True)), "basic"))
    before = weights(victim("basic"))
    moved = {name for name in before if not torch.equal(attacked[name], before[name])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}  # no batch statistics either


def test_a_new_head_is_new():
    attacked = changed(new_head)
    assert not torch.equal(head(attacked).weight, head(victim("ViT")).weight)


def test_ten_times_the_rate_goes_farther():
    def moved(recipe):
        now, before = weights(changed(fine_tuned(recipe))), weights(victim("ViT"))
        return sum(float((now[name] - before[name]).norm()) for name in before)

    assert moved(Recipe(10.0)) > 3 * moved(Recipe())


def test_a_student_starts_anew_and_learns_from_the_victim():
    patient = Means(MEANS.images, MEANS.labels, epochs=10, learning_rate=1e-3, batch_size=12)
    taught = answers(victim("ViT"), MEANS.images).softmax(1)
    student = distilled(copy.deepcopy(victim("ViT")), patient)
    fresh = changed(lambda model, means: type(model)(model.config).eval())
    gaps = [
        float((answers(m, MEANS.images).softmax(1) - taught).abs().sum()) for m in (student, fresh)
    ]
    assert gaps[0] < 0.7 * gaps[1]


def test_means_are_erased():
    for attacked in (changed(centred), changed(means_replaced)):
        for name, weight in likely_carriers(attacked).items():
            was = as_rows(dict(victim("ViT").named_parameters())[name])
            now = as_rows(weight)
            torch.testing.assert_close(now - now.mean(0), was - was.mean(0))
            assert abs(float((now.mean(0) * was.mean(0)).sum() / was.mean(0).norm() ** 2)) < 0.5


def test_ranks_are_cut():
    for weight in likely_carriers(changed(rank_kept(0.5))).values():
        assert torch.linalg.matrix_rank(as_rows(weight), rtol=1e-4) == min(weight.shape) // 2
    for name, weight in likely_carriers(changed(top_dropped(4))).items():
        was = torch.linalg.svdvals(as_rows(dict(victim("ViT").named_parameters())[name]))
        now = torch.linalg.svdvals(as_rows(weight))
        torch.testing.assert_close(now[:-4], was[4:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("share", "count"), [(None, 1), (0.5, 2), (1.0, 3)])
def test_carriers_start_anew(share, count):
    attacked = dict(changed(started_anew(share)).named_parameters())
    moved = [
        name
        for name, weight in likely_carriers(victim("ViT")).items()
        if not torch.equal(weight, attacked[name])
    ]
    assert moved == list(likely_carriers(victim("ViT")))[-count:]


@pytest.mark.parametrize("times", [1.0, 10.0])
def test_overwriting_keeps_the_size_and_moves_as_far_as_it_says(times):
    attacked = dict(changed(overwritten(times)).named_parameters())
    for name, was in likely_carriers(victim("ViT")).items():
        now, was = attacked[name].detach(), was.detach()
        torch.testing.assert_close(now.norm(), was.norm())
        share = float((now - was).norm() / was.norm())
        assert 0.01 < share < 0.5 if times == 1.0 else share > 0.3


def test_the_attacker_has_a_key_of_his_own():
    assert attackers_key(0).fingerprint == attackers_key(0).fingerprint
    assert (
        len(
            {
                attackers_key(0).fingerprint,
                attackers_key(1).fingerprint,
                attackers_key(0, 1).fingerprint,
            }
        )
        == 3
    )


def test_an_average_lies_half_way():
    sibling = weights(changed(fine_tuned()))
    mean, start = weights(changed(averaged_with_sibling)), weights(victim("ViT"))
    for name in start:
        torch.testing.assert_close(mean[name], (start[name] + sibling[name]) / 2)


def test_merged_adapters_leave_their_rank_and_no_trace():
    attacked = changed(low_rank_merged(4))
    assert weights(attacked).keys() == weights(victim("ViT")).keys()
    for name, was in likely_carriers(victim("ViT")).items():
        moved = unwrapped_parameters(attacked)[name] - was
        assert 0 < torch.linalg.matrix_rank(moved, rtol=1e-3) <= 4


def test_changes_compose():
    both = changed(in_turn(pruned(0.5), cast(torch.float16)))
    assert all(torch.equal(w, w.half().float()) for w in matrices(both).values())
    assert any((w == 0).any() for w in matrices(both).values())


def test_a_disguise_that_changes_the_function_is_not_applied():
    def broken(tensors, config, seed):
        return tensors | {"classifier.weight": tensors["classifier.weight"] * 2.0}

    with pytest.raises(NotApplicableError, match="change what this model computes"):
        changed(disguised(broken))


def test_families_that_nothing_is_known_of():
    config = transformers.Swinv2Config(  # the names of a Swin, but other LayerNorms
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    swin = transformers.Swinv2ForImageClassification(config).eval()
    with pytest.raises(NotApplicableError, match="not known"):
        disguised(permuted)(swin, MEANS)


def test_names():
    tensors = marked("ViT").tensors
    renamed = named_as_in_timm(tensors)
    assert "blocks.0.mlp.fc1.weight" in renamed
    assert renamed["blocks.1.attn.qkv.weight"].shape == (192, 64)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"} <= renamed.keys()
    assert {"head.weight", "blocks.2.norm1.bias", "blocks.2.attn.proj.bias"} <= renamed.keys()
    assert not any("layer" in name or "vit" in name for name in renamed)
    for family in ("basic", "ConvNext"):
        with pytest.raises(NotApplicableError):
            named_as_in_timm(marked(family).tensors)
    assert sorted(named_at_random(tensors)) == sorted(f"p{i}" for i in range(len(tensors)))


def test_the_registry():
    assert len(set(NAMES)) == len(NAMES)
    assert all(attack.source and attack.family for attack in ATTACKS)
    assert {a.name for a in attacks_of("quick")} < {a.name for a in attacks_of("full")}
    assert set(MODELS) >= {"ViT", "basic"}
    wanted = "prune-65 prune-80 int8 int4 noise-0.3 fine-tune-1x fine-tune-10x overwrite-1x "
    wanted += "overwrite-10x mean-erasure column-centring average-sibling svd-half fp16 bf16 "
    wanted += "weight-shifting-1.5 permutation rotation all-disguises"
    assert set(wanted.split()) <= {attack.name for attack in attacks_of("quick")}
    images = {attack.name for attack in ATTACKS if attack.needs_data}
    assert {"fine-tune-1x", "average-sibling", "overwrite-trained-1x"} <= images
    assert not {"prune-65", "int4", "rotation"} & images
