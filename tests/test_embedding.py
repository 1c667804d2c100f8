"""WatermarkLoss in real small models: the mathematics against numpy and scipy, loops, attaching."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from threadpoolctl import threadpool_limits
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_watermark import OwnerKey, Scheme
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import (
    AttachError,
    CarrierError,
    ModelTooSmallError,
    ShardedParameterError,
    WatermarkError,
)
from hf_watermark.extraction import Extraction
from hf_watermark.margins import least_change
from hf_watermark.projections import Projection
from hf_watermark.wrappers import unwrapped_parameters

KEY = OwnerKey(bytes(range(32)), owner="acme")
OTHER = OwnerKey(bytes(range(100, 132)))
FC1 = "vit.layers.{}.mlp.fc1.weight"

LOSSES = [
    Scheme(bits=32, statistic=statistic, key_matrix=matrix, embedding=embedding, weight=0.3)
    for statistic, matrix in (
        ("spread", "random"),
        ("mean", "random"),
        ("mean", "direct"),
        ("mean", "diff"),
    )
    for embedding in ("hinge", "bce")
]
PROJECTIONS = [
    Scheme(bits=16),
    Scheme(bits=64),
    Scheme(bits=64, strength=0.3),
    Scheme(bits=700),  # nearly all that the ResNet can hold: the carriers change by half their size
    Scheme(bits=1),
    Scheme(bits=32, statistic="mean"),
    Scheme(bits=32, statistic="mean", key_matrix="direct"),
    Scheme(bits=32, statistic="mean", key_matrix="diff"),
]


@pytest.fixture(autouse=True, scope="module")
def _cheap():
    """Small matrices gain nothing from threads, and accelerate collects garbage at every turn."""
    gc.collect()
    gc.freeze()
    with threadpool_limits(1):
        yield
    gc.unfreeze()


def vit(layers: int = 4) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_labels=4,
    )
    return ViTForImageClassification(config).train()


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=4,
    )
    return ResNetForImageClassification(config).train()


MODELS = pytest.mark.parametrize("make", [vit, resnet])


def ids(value: object) -> str | None:
    return value.name if isinstance(value, Scheme) else None


def arrays(watermark: WatermarkLoss) -> list[np.ndarray]:
    return [weight.double().numpy() for weight in watermark.weights()]


def copies(watermark: WatermarkLoss) -> list[torch.Tensor]:
    return [weight.clone() for weight in watermark.weights()]


def read(model: nn.Module, key: OwnerKey, watermark: WatermarkLoss):
    """What the key reads from the model's `state_dict`, without asking the WatermarkLoss."""
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    extraction = Extraction(Projection(key, watermark.scheme, watermark.carriers))
    for i, carrier in enumerate(watermark.carriers):
        extraction.add(i, 0, state[carrier.name].float().numpy())
    return extraction.reading()


def images(count: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(count, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, 4, (count,), generator=generator),
    }


def train(model: nn.Module, watermark: WatermarkLoss, steps: int, lr: float = 1e-3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    batch = images()
    for _ in range(steps):
        loss = watermark(model(**batch).loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watermark.step()


def message_of(kind: type[Exception], function, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is kind
    return str(caught.value)


class TestAgainstNumpy:
    @MODELS
    @pytest.mark.parametrize("scheme", [*PROJECTIONS, *LOSSES], ids=ids)
    def test_responses(self, make, scheme):
        watermark = WatermarkLoss(make(), KEY, scheme)
        expected = watermark.projection.responses(arrays(watermark))
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(watermark.responses().numpy(force=True), expected, atol=2e-5)

    @MODELS
    @pytest.mark.parametrize("matrix", ["random", "direct", "diff"])
    def test_raw_responses_of_the_paper(self, make, matrix):
        scheme = Scheme(bits=32, statistic="mean", key_matrix=matrix, embedding="bce")
        watermark = WatermarkLoss(make(), KEY, scheme)
        mean = np.concatenate([w.reshape(len(w), -1).mean(axis=0) for w in arrays(watermark)])
        x = np.concatenate([watermark.projection.x(i) for i in range(len(watermark.carriers))], 1)
        raw = watermark.responses(natural=False).numpy(force=True)
        np.testing.assert_allclose(raw, x @ mean, atol=2e-6)

    @MODELS
    @pytest.mark.parametrize("scheme", LOSSES, ids=ids)
    def test_penalty_and_its_gradient(self, make, scheme):
        model = make()
        watermark = WatermarkLoss(model, KEY, scheme)
        weights = arrays(watermark)
        projection, s = watermark.projection, watermark.projection.message_signs
        raw = scheme.statistic == "mean" and scheme.embedding == "bce"
        z = projection.responses(weights)
        if raw:
            means = [w.reshape(len(w), -1).mean(axis=0) for w in weights]
            z = sum(projection.x(i).astype(float) @ mean for i, mean in enumerate(means))
        if scheme.embedding == "hinge":
            value = np.maximum(projection.margin - s * z, 0.0).sum()
            dz = np.where(projection.margin - s * z > 0.0, -s, 0.0)
            assert 0 < np.count_nonzero(dz) <= len(dz)
        else:
            value = np.logaddexp(0.0, -s * z).sum()
            dz = -s / (1.0 + np.exp(s * z))
        penalty = watermark.penalty()
        assert penalty.item() == pytest.approx(0.3 * value, rel=1e-5)
        penalty.backward()
        if raw:
            expected = [
                np.broadcast_to(dz @ projection.x(i) / len(w), (len(w), projection.columns[i]))
                for i, w in enumerate(weights)
            ]
        else:
            expected = projection.gradient(weights, dz)
        parameters = unwrapped_parameters(model)
        for carrier, gradient in zip(watermark.carriers, expected, strict=True):
            found = parameters[carrier.name].grad.double().numpy()
            wanted = 0.3 * gradient.reshape(carrier.shape)
            np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        names = {carrier.name for carrier in watermark.carriers}
        assert all(p.grad is None for name, p in parameters.items() if name not in names)

    @pytest.mark.parametrize("scheme", LOSSES[:4], ids=ids)
    def test_autocast_does_not_round_it(self, scheme):
        model = vit()
        watermark = WatermarkLoss(model, KEY, scheme)
        outside = watermark.penalty()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = watermark.penalty()
        assert inside.dtype == torch.float32
        assert torch.equal(inside, outside)

    def test_the_layout_in_memory_does_not_matter(self):
        plain, last = resnet(), resnet().to(memory_format=torch.channels_last)
        marks = [WatermarkLoss(model, KEY) for model in (plain, last)]
        torch.testing.assert_close(marks[0].responses(), marks[1].responses())
        for mark in marks:
            mark.project()
        for one, two in zip(marks[0].weights(), marks[1].weights(), strict=True):
            assert two.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(one, two)


def least_norm(rows: np.ndarray, deficit: np.ndarray) -> np.ndarray:
    """The w of least norm with rows w >= deficit (Lawson and Hanson 1974, chapter 23, LDP)."""
    e = np.vstack([rows.T, deficit])
    f = np.zeros(len(e))
    f[-1] = 1.0
    residual = e @ nnls(e, f, maxiter=10_000)[0] - f
    return -residual[:-1] / residual[-1]


class TestLeastChange:
    """Against scipy's active-set solution of the primal problem."""

    def check(self, rows: np.ndarray, deficit: np.ndarray) -> None:
        a = least_change(deficit, rows @ rows.T)
        assert (a >= 0.0).all()
        change, best = rows.T @ a, least_norm(rows, deficit)
        # A thousandth of the margin is what the projected step takes for reached.
        assert (rows @ change >= deficit - 1e-3 * deficit.max()).all()
        assert np.linalg.norm(change) <= 1.001 * np.linalg.norm(best)
        assert np.linalg.norm(change - best) <= 0.02 * np.linalg.norm(best)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 50), (16, 500), (64, 1000), (64, 128)]))
    def test_gaussian_rows(self, seed, shape):
        rng = np.random.default_rng(seed)
        signs = rng.choice([-1.0, 1.0], shape[0])
        rows = signs[:, None] * rng.normal(size=shape) / math.sqrt(shape[1])
        self.check(rows, 4.0 - signs * rng.normal(size=shape[0]))

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_as_many_bits_as_columns(self, seed):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(48, 48)) / math.sqrt(48)
        self.check(rows, 1.0 + np.abs(rng.normal(size=48)))

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_more_bits_than_the_rank(self, seed):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(40, 12))
        goal = rng.normal(size=12)
        signed = rows * np.sign(rows @ goal)[:, None]  # so that there is a solution at all
        signed = signed[np.abs(rows @ goal) > 0.3]
        assert np.linalg.matrix_rank(signed @ signed.T) < len(signed)
        self.check(signed, np.full(len(signed), 1.0))

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 0.1, 0.03]))
    def test_rows_that_nearly_agree(self, seed, apart):
        rng = np.random.default_rng(seed)
        rows = (rng.normal(size=200) + apart * rng.normal(size=(24, 200))) / math.sqrt(200)
        assert np.linalg.cond(rows @ rows.T) > 100
        self.check(rows, 4.0 + rng.normal(size=24))

    def test_most_bits_have_more_than_enough(self):
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(64, 80)) / math.sqrt(80)
        deficit = np.where(np.arange(64) < 3, 4.0, -3.0)
        self.check(rows, deficit)
        a = least_change(deficit, rows @ rows.T)
        assert np.count_nonzero(a) < 40  # only those that would otherwise fall below

    def test_nothing_to_do(self):
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(8, 100))
        assert not least_change(np.full(8, -1.0), rows @ rows.T).any()
        assert not least_change(np.zeros(8), rows @ rows.T).any()

    def test_no_solution(self):
        """Two bits that want opposite things: an answer, finite, and the third bit is served."""
        rows = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        change = rows.T @ least_change(np.ones(3), rows @ rows.T)
        np.testing.assert_allclose(change, [0.0, 1.0], atol=1e-6)

    def test_same_input_same_bytes(self):
        rng = np.random.default_rng(5)
        rows, deficit = rng.normal(size=(64, 100)), rng.normal(size=64)
        once = least_change(deficit, rows @ rows.T)
        assert once.tobytes() == least_change(deficit.copy(), (rows @ rows.T).copy()).tobytes()


class TestProjectedStep:
    @MODELS
    @pytest.mark.parametrize("scheme", PROJECTIONS, ids=ids)
    def test_every_bit_reaches_its_margin(self, make, scheme):
        model = make()
        watermark = WatermarkLoss(model, KEY, scheme)
        before = copies(watermark)
        watermark.step()
        agreement = watermark.projection.message_signs * watermark.projection.responses(
            arrays(watermark)
        )
        assert agreement.min() >= (1 - 2e-3) * watermark.projection.margin
        assert watermark.measure().ber == 0.0
        for old, new in zip(before, watermark.weights(), strict=True):
            assert not torch.equal(old, new)
            if scheme.statistic == "spread":
                assert new.norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
        if scheme.statistic == "mean":
            norms = [
                torch.cat([w.flatten(1).mean(0) for w in weights]).norm().item()
                for weights in (before, watermark.weights())
            ]
            assert norms[1] == pytest.approx(norms[0], rel=1e-4)
        assert read(model, KEY, watermark).matched == scheme.bits
        assert abs(read(model, OTHER, watermark).soft) < 5.0

    @MODELS
    @pytest.mark.parametrize("scheme", [Scheme(bits=32), Scheme(bits=32, statistic="mean")])
    def test_frozen_carriers_stay_as_they_are(self, make, scheme):
        """A reader without the claim expects the default carriers, frozen or not."""
        model = make()
        watermark = WatermarkLoss(model, KEY, scheme)
        first, *others = [model.get_parameter(carrier.name) for carrier in watermark.carriers]
        first.requires_grad_(False)
        before = first.detach().clone()
        olds = [other.detach().clone() for other in others]
        watermark.step()
        assert torch.equal(first, before)
        assert not any(torch.equal(old, new) for old, new in zip(olds, others, strict=True))
        assert watermark.measure().margin >= (1 - 2e-3) * watermark.projection.margin
        assert read(model, KEY, watermark).matched == 32

    @MODELS
    def test_it_is_the_smallest_change(self, make):
        scheme = Scheme(bits=16)
        watermark = WatermarkLoss(make(), KEY, scheme)
        projection, weights = watermark.projection, arrays(watermark)
        rows = np.concatenate(  # of every bit, the direction in all carriers, in units of their rms
            [
                np.einsum(
                    "ot,tc->toc", projection.row_signs(i).astype(float), projection.x(i)
                ).reshape(16, -1)
                / math.sqrt(projection.rows[i])
                for i in range(len(weights))
            ],
            axis=1,
        )
        signs = projection.message_signs
        deficit = projection.margin - signs * projection.responses(weights)
        least = np.linalg.norm(least_norm(signs[:, None] * rows, deficit))
        watermark.project()
        change = [
            (new - old) / math.sqrt(np.mean(old**2))
            for old, new in zip(weights, arrays(watermark), strict=True)
        ]
        found = math.sqrt(sum(float((part**2).sum()) for part in change))
        # Going back to the old norm is an effect of second order: d^2 / 2 = .5% here.
        assert found == pytest.approx(least, rel=0.01)

    def test_nothing_changes_at_the_margin(self):
        watermark = WatermarkLoss(vit(), KEY)
        watermark.project()
        at_margin = copies(watermark)
        watermark.project()
        assert all(map(torch.equal, at_margin, watermark.weights()))
        torch.manual_seed(3)
        disturbance = []
        for weight in watermark.weights():
            noise = 0.02 * weight.std() * torch.randn_like(weight)
            weight += noise
            disturbance.append(noise)
        disturbed = copies(watermark)
        assert watermark.measure().margin < 0.99 * watermark.projection.margin
        watermark.project()
        moved = [new - old for new, old in zip(watermark.weights(), disturbed, strict=True)]
        assert watermark.measure().margin >= 0.998 * watermark.projection.margin
        # Taking the noise back would do: the least change is less than that.
        lengths = [torch.cat([d.flatten() for d in part]).norm() for part in (moved, disturbance)]
        assert 0 < lengths[0] < 0.2 * lengths[1]

    def test_more_than_the_margin_is_left_alone(self):
        scheme = Scheme(bits=16, strength=0.3)
        model = vit()
        with_more = WatermarkLoss(model, KEY, scheme)
        with_more.project()
        with_more.detach()
        watermark = WatermarkLoss(model, KEY, Scheme(bits=16, strength=0.05))
        before = copies(watermark)
        watermark.project()
        assert all(map(torch.equal, before, watermark.weights()))

    @pytest.mark.parametrize("scheme", PROJECTIONS[::3], ids=ids)
    def test_deterministic(self, scheme):
        twins = [WatermarkLoss(resnet(), KEY, scheme) for _ in range(2)]
        for watermark in twins:
            watermark.project()
        assert all(map(torch.equal, twins[0].weights(), twins[1].weights()))

    @pytest.mark.parametrize(
        "scheme",
        [
            Scheme(bits=64, statistic="mean", strength=4.0),
            Scheme(bits=256, statistic="mean"),
            Scheme(bits=256, statistic="mean", key_matrix="direct", strength=3.0),
            Scheme(bits=64, strength=1.5),
        ],
        ids=ids,
    )
    def test_margins_out_of_reach_do_no_harm(self, scheme):
        watermark = WatermarkLoss(vit(), KEY, scheme)
        before = torch.cat([weight.flatten() for weight in copies(watermark)])
        margins = []
        for _ in range(6):
            watermark.project()
            margins.append(watermark.measure().margin)
        after = torch.cat([weight.flatten() for weight in watermark.weights()])
        assert watermark.measure().ber == 0.0
        assert margins[-1] >= 0.99 * max(margins)
        assert margins[-1] < watermark.projection.margin
        # Turned round at most, never blown up.
        assert after.norm() <= 1.05 * before.norm()
        if scheme.statistic == "mean":  # of 256 rows only the mean moves
            assert (after - before).norm() <= 2.0 / math.sqrt(256) * before.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @MODELS
    def test_half_precision_parameters_keep_every_bit(self, make, dtype):
        model = make().to(dtype)
        watermark = WatermarkLoss(model, KEY, Scheme(bits=32), every=1)
        torch.manual_seed(0)
        for _ in range(25):
            for weight in watermark.weights():  # steps that are far below the type's resolution
                weight += 1e-3 * weight.float().std().to(dtype) * torch.randn_like(weight)
            watermark.step()
            now = watermark.measure()
            assert now.ber == 0.0
            # Changes that are rounded away stay below half a unit in the last place: a few percent.
            assert now.margin > 0.9 * watermark.projection.margin
        assert {weight.dtype for weight in watermark.weights()} == {dtype}
        assert read(model, KEY, watermark).matched == 32

    def test_float64_parameters_stay_float64(self):
        model = vit().double()
        watermark = WatermarkLoss(model, KEY)
        watermark.step()
        assert {weight.dtype for weight in watermark.weights()} == {torch.float64}
        assert watermark.measure().ber == 0.0

    def test_only_every_so_often(self):
        watermark = WatermarkLoss(vit(), KEY, every=3)
        reached = []
        for _ in range(7):
            for weight in watermark.weights():
                weight.neg_()  # every bit flips
            watermark.step()
            reached.append(watermark.measure().ber == 0.0)
        # Negated once since the projection every bit is wrong, negated twice it is right again.
        assert reached == [True, False, True, True, False, True, True]


class TestBadWeights:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("scheme", [Scheme(bits=32), LOSSES[0], LOSSES[2]], ids=ids)
    def test_not_finite_is_not_hidden(self, bad, scheme):
        model = vit()
        watermark = WatermarkLoss(model, KEY, scheme, every=1)
        weights = watermark.weights()
        weights[2][5, 7] = bad
        before = copies(watermark)
        watermark.step()
        watermark.project()
        for old, new in zip(before, watermark.weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        now = watermark.measure()
        assert math.isnan(now.ber)
        assert math.isnan(now.margin)
        assert math.isnan(now.log10_p)
        if scheme.embedding != "projection":
            assert not watermark(torch.tensor(1.0)).isfinite()
        watermark.detach()
        np.testing.assert_array_equal(before[2], weights[2])

    def test_rows_of_zeros(self):
        model = vit()
        watermark = WatermarkLoss(model, KEY, Scheme(bits=32))
        for weight in watermark.weights():
            weight[::2] = 0.0
        watermark.step()
        assert watermark.measure().ber == 0.0
        assert watermark.measure().margin >= 0.998 * watermark.projection.margin

    @pytest.mark.parametrize("scheme", [Scheme(bits=32), *LOSSES], ids=ids)
    def test_a_carrier_of_zeros_says_nothing(self, scheme):
        model = vit()
        watermark = WatermarkLoss(model, KEY, scheme, every=1)
        watermark.weights()[1].zero_()
        expected = watermark.projection.responses(arrays(watermark))
        np.testing.assert_allclose(watermark.responses().numpy(force=True), expected, atol=2e-5)
        train(model, watermark, steps=3)
        assert all(weight.isfinite().all() for weight in watermark.weights())
        assert watermark.weights()[1].any()  # it trains as it would
        if scheme.embedding == "projection":
            assert watermark.measure().ber == 0.0

    @pytest.mark.parametrize("scheme", [Scheme(bits=32), *LOSSES], ids=ids)
    def test_nothing_but_zeros(self, scheme):
        model = vit()
        watermark = WatermarkLoss(model, KEY, scheme)
        for weight in watermark.weights():
            weight.zero_()
        watermark.step()
        assert not any(weight.any() for weight in watermark.weights())
        loss = watermark(torch.tensor(1.0))
        assert loss.isfinite()
        if loss.requires_grad:
            loss.backward()
            assert all(
                model.get_parameter(carrier.name).grad.isfinite().all()
                for carrier in watermark.carriers
            )
        assert watermark.measure().ber == 1.0


class TestRefusals:
    def test_too_small(self):
        small = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        said = message_of(ModelTooSmallError, WatermarkLoss, small, KEY)
        bits = int(said.split("Scheme(bits=")[1].split(")")[0])
        watermark = WatermarkLoss(small, KEY, Scheme(bits=bits))
        watermark.step()
        assert watermark.measure().ber == 0.0
        message_of(CarrierError, WatermarkLoss, nn.Linear(3, 2), KEY)
        message_of(CarrierError, WatermarkLoss, nn.ReLU(), KEY)

    @pytest.mark.parametrize("key", [b"x" * 32, "acme.key", None])
    def test_no_key(self, key):
        said = message_of(AttachError, WatermarkLoss, vit(), key)
        assert "xxxx" not in said

    @pytest.mark.parametrize("every", [0, -1])
    def test_every(self, every):
        message_of(AttachError, WatermarkLoss, vit(), KEY, every=every)

    def test_a_refusal_leaves_the_model_free(self):
        model = vit()
        for wrong in ({"carriers": ["fc9"]}, {"scheme": Scheme(bits=4000)}):
            with pytest.raises(WatermarkError):
                WatermarkLoss(model, KEY, **wrong)
        WatermarkLoss(model, KEY)


@pytest.fixture
def mesh():
    """A process group of one, over memory."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


class TestSharding:
    """With one process; test_sharding.py has several."""

    def test_fully_shard(self, mesh):
        from torch.distributed.fsdp import fully_shard

        model = vit()
        for layer in model.vit.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        watermark = WatermarkLoss(model, KEY)
        train(model, watermark, steps=3)
        watermark.detach()
        state = {name: value.full_tensor() for name, value in model.state_dict().items()}
        plain = vit()
        plain.load_state_dict(state)
        assert read(plain, KEY, watermark).matched == 64

    def test_whole_parameters_that_fsdp_only_lends(self, mesh):
        """After forward the root's parameters look whole, until backward throws them away."""
        from torch.distributed.fsdp import fully_shard

        model = vit()
        fully_shard(model, mesh=mesh)
        watermark = WatermarkLoss(model, KEY)
        with torch.no_grad():
            model(**images())
        assert type(next(model.parameters())) is nn.Parameter
        watermark.project()
        assert watermark.measure().ber == 0.0
        with torch.no_grad():
            model(**images())
        model.reshard()
        assert watermark.measure().ber == 0.0

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("original", [False, True])
    def test_the_first_fsdp(self, mesh, original):
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(
            vit(), use_orig_params=original, device_id=torch.device("cpu")
        )
        said = message_of(ShardedParameterError, WatermarkLoss, model, KEY)
        assert "fsdp_version 2" in said
        assert "saved checkpoint" in said

    def test_sharding_after_attaching(self, mesh):
        """The mark must not go into parameters that the model no longer has."""
        from torch.distributed.fsdp import fully_shard

        for scheme in (PROJECTIONS[0], LOSSES[0]):
            model = vit()
            watermark = WatermarkLoss(model, KEY, scheme)
            fully_shard(model, mesh=mesh)
            assert watermark.penalty().isfinite()
            watermark.step()
            expected = 0.0 if scheme.embedding == "projection" else watermark.measure().ber
            assert watermark.measure().ber == expected
            assert len(watermark.weights()) == 4
            watermark.detach()

    def test_ddp(self, mesh):
        model = vit()
        wrapped = nn.parallel.DistributedDataParallel(model)
        watermark = WatermarkLoss(wrapped, KEY)
        assert [carrier.name for carrier in watermark.carriers] == [FC1.format(i) for i in range(4)]
        train(wrapped, watermark, steps=3)
        watermark.detach()
        assert read(model, KEY, watermark).matched == 64


class TestAttaching:
    def traces(self, model: nn.Module) -> dict[str, object]:
        """Everything that hangs on a module: attributes, hooks, parameters, by identity."""
        found: dict[str, object] = {}
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                key = f"{name}:{attribute}"
                found[key] = id(value)
                if isinstance(value, dict):
                    found[key] = [(k, id(v)) for k, v in value.items()]
                elif isinstance(value, set):
                    found[key] = sorted(value)
            found[f"{name}:class"] = type(module)
        for name, parameter in model.named_parameters():
            found[f"{name}:hooks"] = parameter._backward_hooks
            found[f"{name}:accumulated"] = parameter._post_accumulate_grad_hooks
            found[f"{name}:vars"] = sorted(vars(parameter))
            found[f"{name}:meta"] = (parameter.requires_grad, parameter.dtype, parameter.shape)
        return found

    @MODELS
    @pytest.mark.parametrize("scheme", [Scheme(bits=32), *LOSSES[:3]], ids=ids)
    def test_no_trace(self, make, scheme):
        model = make()
        model(**images())  # what forward itself leaves behind
        before, keys = self.traces(model), list(model.state_dict())
        watermark = WatermarkLoss(model, KEY, scheme)
        assert self.traces(model) == before
        train(model, watermark, steps=2)
        model.zero_grad()
        watermark.measure()
        watermark.detach()
        assert self.traces(model) == before
        assert list(model.state_dict()) == keys
        copy.deepcopy(model)

    def test_detaching_twice(self):
        watermark = WatermarkLoss(vit(), KEY)
        watermark.detach()
        message_of(AttachError, watermark.detach)
        message_of(AttachError, watermark, torch.tensor(1.0))
        message_of(AttachError, watermark.step)
        watermark.release()  # harmless
        assert watermark.measure().ber == 0.0
        watermark.attach()
        message_of(AttachError, watermark.attach)
        watermark.step()

    def test_the_same_key_twice(self):
        model = vit()
        watermark = WatermarkLoss(model, KEY)
        said = message_of(AttachError, WatermarkLoss, model, KEY)
        assert KEY.fingerprint in said
        message_of(AttachError, WatermarkLoss, model, KEY, Scheme(bits=16))
        WatermarkLoss(vit(), KEY)  # another module
        watermark.detach()
        WatermarkLoss(model, KEY).detach()

    @pytest.mark.parametrize("first", ["plain", "compiled", "parallel"])
    def test_the_same_key_twice_through_a_wrapper(self, first):
        model = vit()
        faces = {
            "plain": model,
            "compiled": torch.compile(model, backend="eager"),
            "parallel": nn.DataParallel(model),
        }
        watermark = WatermarkLoss(faces[first], KEY)
        for face in faces.values():
            message_of(AttachError, WatermarkLoss, face, KEY)
        watermark.detach()
        WatermarkLoss(model, KEY)

    def test_another_key_beside_it(self):
        model = vit()
        recipient = KEY.for_recipient("customer-17")
        marks = [WatermarkLoss(model, key, every=1) for key in (KEY, OTHER, recipient)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(4):
            loss = model(**images()).loss
            for mark in marks:
                loss = mark(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for mark in marks:
                mark.step()
        for mark in marks:
            mark.detach()
        for mark in marks:
            reading = read(model, mark.key, mark)
            assert reading.matched == 64
            assert reading.log10_p < -150
        assert abs(read(model, OwnerKey(bytes(32)), marks[0]).soft) < 5.0

    def test_a_parameter_in_the_place_of_a_carrier(self):
        model = vit()
        watermark = WatermarkLoss(model, KEY)
        fc1 = model.vit.layers[1].mlp.fc1
        fc1.weight = nn.Parameter(fc1.weight.detach().clone())
        watermark.step()
        watermark.detach()
        assert read(model, KEY, watermark).matched == 64

    def test_a_model_that_changed_its_shape(self):
        model = vit()
        watermark = WatermarkLoss(model, KEY)
        model.vit.layers[1].mlp.fc1 = nn.Linear(64, 128)
        said = message_of(AttachError, watermark.step)
        assert "'vit.layers.1.mlp.fc1.weight'" in said
        assert "[256, 64]; got [128, 64]" in said
        del model.vit.layers[1].mlp.fc1
        assert "got none" in message_of(AttachError, watermark.detach)
        WatermarkLoss(model, KEY, carriers=[FC1.format(0)])

    def test_wrapping_after_attaching(self):
        torch._dynamo.reset()
        model = vit(layers=2)
        watermark = WatermarkLoss(model, KEY, every=1)
        model.vit.layers[0] = torch.compile(model.vit.layers[0], backend="eager")
        train(torch.compile(model, backend="eager"), watermark, steps=2)
        watermark.detach()
        assert read(model, KEY, watermark).matched == 64

    def test_dropped_is_detached(self):
        model = vit()
        watermark = WatermarkLoss(model, KEY)
        watermark.step()
        gone = weakref.ref(watermark)
        del watermark
        assert gone() is None  # no cycle keeps it
        WatermarkLoss(model, KEY)

    def test_the_model_is_not_kept(self):
        model = vit()
        watermark = WatermarkLoss(model, KEY)
        watermark.detach()
        gone = weakref.ref(model)
        del model, watermark
        gc.collect()
        assert gone() is None

    @pytest.mark.parametrize("scheme", [Scheme(bits=32), *LOSSES[:3]], ids=ids)
    def test_evaluation_mode_does_nothing(self, scheme):
        model = vit().eval()
        watermark = WatermarkLoss(model, KEY, scheme, every=1)
        before = copies(watermark)
        loss = torch.tensor(2.0, requires_grad=True)
        assert watermark(loss) is loss
        watermark.step()
        watermark.detach()
        assert all(map(torch.equal, before, watermark.weights()))

    def test_evaluation_before_detach(self):
        """The usual end of a loop: the last steps must not be left without their projection."""
        model = vit()
        watermark = WatermarkLoss(model, KEY, every=100)
        train(model, watermark, steps=6, lr=1e-2)
        assert watermark.measure().margin < 0.9 * watermark.projection.margin
        model.eval()
        watermark.detach()
        assert watermark.measure().margin >= 0.998 * watermark.projection.margin

    def test_frozen_layers_elsewhere_do_not_matter(self):
        model = vit()
        model.vit.embeddings.requires_grad_(False)
        train(model, watermark := WatermarkLoss(model, KEY), steps=2)
        assert watermark.measure().ber < 0.5

    def test_nothing_secret_is_shown(self):
        watermark = WatermarkLoss(vit(), KEY)
        assert "secret" not in repr(watermark)
        assert KEY.fingerprint in repr(watermark)
        assert bytes(range(32)).hex()[:16] not in repr(watermark) + str(vars(watermark))


class TestLoops:
    @MODELS
    def test_plain_loop_with_the_projected_step(self, make):
        model = make()
        watermark = WatermarkLoss(model, KEY, Scheme(bits=32))
        train(model, watermark, steps=12)
        watermark.detach()
        reading = read(model, KEY, watermark)
        assert reading.matched == 32
        assert reading.log10_p < -50
        assert abs(read(model, OTHER, watermark).soft) < 5.0

    @pytest.mark.parametrize("embedding", ["hinge", "bce"])
    @pytest.mark.parametrize("statistic", ["spread", "mean"])
    def test_plain_loop_with_a_loss_term(self, statistic, embedding):
        model = vit()
        scheme = Scheme(bits=16, statistic=statistic, embedding=embedding, weight=0.3)
        watermark = WatermarkLoss(model, KEY, scheme)
        before = watermark.measure()
        train(model, watermark, steps=25, lr=2e-3)
        weights = copies(watermark)
        watermark.detach()
        assert all(map(torch.equal, weights, watermark.weights()))  # detaching adds nothing
        assert before.ber > 0.2
        assert read(model, KEY, watermark).matched == 16

    @pytest.mark.parametrize("scheme", [Scheme(bits=32), *LOSSES[:2]], ids=ids)
    def test_the_task_is_left_alone(self, scheme):
        """The term is added to the loss that is passed, nothing else happens to it."""
        model = vit()
        watermark = WatermarkLoss(model, KEY, scheme)
        loss = model(**images()).loss
        marked = watermark(loss)
        if scheme.embedding == "projection":
            assert marked is loss
        else:
            assert torch.equal(marked, loss + watermark.penalty())

    @pytest.mark.parametrize("scheme", [Scheme(bits=32), *LOSSES[:3]], ids=ids)
    def test_accumulation_with_accelerate(self, scheme):
        """16 images at once and 4 x 4 give the optimizer the same gradient."""
        gradients = [self.accelerated(scheme, micro, 16 // micro) for micro in (16, 4)]
        for name, whole in gradients[0].items():
            if name.endswith("k_proj.bias"):  # zero, but for rounding: softmax cancels it
                assert whole.norm() < 1e-8
                continue
            difference = (whole - gradients[1][name]).norm()
            assert difference <= 1e-3 * whole.norm(), name

    def accelerated(self, scheme: Scheme, micro: int, steps: int) -> dict[str, torch.Tensor]:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
            model = vit()
            batch = images(16)
            data = torch.utils.data.TensorDataset(*batch.values())
            model, optimizer, loader = accelerator.prepare(
                model,
                torch.optim.SGD(model.parameters(), lr=0.1),
                torch.utils.data.DataLoader(data, batch_size=micro),
            )
            watermark = WatermarkLoss(model, KEY, scheme)
            gradients: dict[str, torch.Tensor] = {}
            for pixels, labels in loader:
                with accelerator.accumulate(model):
                    loss = watermark(model(pixel_values=pixels, labels=labels).loss)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        for name, parameter in model.named_parameters():
                            gradients[name] = parameter.grad.clone()
                    optimizer.step()
                    watermark.step()
                    optimizer.zero_grad()
            if scheme.embedding == "projection":
                assert watermark.measure().ber == 0.0
            watermark.detach()
            return gradients
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()

    @pytest.mark.parametrize("scheme", [Scheme(bits=32), LOSSES[0]], ids=ids)
    def test_compiled(self, scheme):
        torch._dynamo.reset()
        model = vit(layers=2)
        compiled = torch.compile(model, backend="eager")
        watermark = WatermarkLoss(compiled, KEY, scheme)
        assert [carrier.name for carrier in watermark.carriers] == [FC1.format(i) for i in range(2)]
        train(compiled, watermark, steps=3 if scheme.embedding == "projection" else 20, lr=2e-3)
        compiled.eval()
        loss = torch.tensor(1.0)
        assert watermark(loss) is loss
        watermark.detach()
        assert read(model, KEY, watermark).matched == 32
        assert read(compiled, KEY, watermark).matched == 32

    def test_compiled_blocks(self):
        torch._dynamo.reset()
        model = vit(layers=2)
        expected = list(unwrapped_parameters(model))
        for i, layer in enumerate(model.vit.layers):
            model.vit.layers[i] = torch.compile(layer, backend="eager")
        assert list(unwrapped_parameters(model)) == expected
        watermark = WatermarkLoss(model, KEY)
        train(model, watermark, steps=2)
        watermark.detach()
        assert read(model, KEY, watermark).matched == 64

    def test_a_saved_and_loaded_state_goes_on(self):
        model = vit()
        train(model, watermark := WatermarkLoss(model, KEY), steps=3)
        watermark.detach()
        fresh = vit()
        fresh.load_state_dict(model.state_dict())
        again = WatermarkLoss(fresh, KEY)
        before = copies(again)
        again.step()
        assert all(map(torch.equal, before, again.weights()))
