"""The wrapper is the model, but for its soft labels."""

from __future__ import annotations

import copy
import io
import pickle
import stat
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors import safe_open
from soft_models import KEY, calibrated, images, resnet, vit
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from hf_watermark import OwnerKey
from hf_watermark.errors import AttachError, KeyFileError, NotCalibratedError, SoftLabelError
from hf_watermark.softlabels import SoftLabelWatermark

SETTINGS = [
    (classes, features, family)
    for classes in (2, 10)
    for features in ("H", "M")
    for family in ("vit", "resnet")
]


@torch.no_grad()
def logits(model, x, **kwargs):
    return model(pixel_values=x, **kwargs).logits


# Answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "features", "family"), SETTINGS)
def test_soft_labels_change_and_the_top_class_does_not(classes, features, family):
    served = calibrated(classes, features, family=family)
    x = images(1024, seed=1)
    clean, marked = logits(served.model, x), logits(served, x)
    assert torch.equal(clean.argmax(1), marked.argmax(1))
    assert 0.01 < 0.5 * (clean.softmax(1) - marked.softmax(1)).abs().sum(1).mean() < 0.3
    assert torch.allclose(clean.logsumexp(1), marked.logsumexp(1), atol=1e-4)


@pytest.mark.parametrize("features", ["H", "M"])
def test_a_thousand_classes(features):
    served = SoftLabelWatermark(vit(1000, width=96), KEY, features=features).calibrate(images(800))
    assert served.how.top_k == 32
    x = images(256, seed=1)
    clean, marked = logits(served.model, x), logits(served, x)
    assert torch.equal(clean.argmax(1), marked.argmax(1))
    assert ((clean != marked).sum(1) <= 32).all()
    assert (clean != marked).sum() > 256 * 20


@pytest.mark.parametrize("batch", [1, 7, 1024])
@pytest.mark.parametrize("features", ["H", "M"])
def test_an_image_gets_the_same_answer_in_any_batch(batch, features):
    served = calibrated(features=features)
    x = images(batch, seed=2)
    whole = logits(served, x)
    alone = torch.cat([logits(served, one[None]) for one in x[:7]])
    assert torch.allclose(whole[:7], alone, atol=2e-4)
    assert torch.equal(whole, logits(served, x))
    order = torch.randperm(batch)
    assert torch.allclose(logits(served, x[order]), whole[order], atol=2e-4)


def test_output_type_loss_and_hidden_states_are_the_models():
    served = calibrated()
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    ours, theirs = (
        model(pixel_values=x, labels=y, output_hidden_states=True)
        for model in (served, served.model)
    )
    assert type(ours) is type(theirs)
    assert list(ours) == list(theirs)
    assert torch.equal(ours.loss, theirs.loss)
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    assert not torch.equal(ours.logits, theirs.logits)
    assert ours["logits"] is ours.logits


def test_tuples_stay_tuples():
    served = calibrated()
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    loss, marked = served(x, labels=y, return_dict=False)
    assert torch.equal(loss, served.model(x, labels=y).loss)
    assert torch.equal(marked, served(x).logits)
    (alone,) = served(x, return_dict=False)
    assert torch.equal(alone, marked)


class Plain(nn.Module):
    """A classifier that is not of transformers."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(768, 40), nn.Linear(40, 5)
        self.form = form

    def forward(self, pixel_values):
        return self.form(8 * self.head(torch.tanh(self.body(pixel_values.flatten(1)))))


@dataclass
class Answer:
    logits: torch.Tensor
    note: str = "kept"


@pytest.mark.parametrize(
    ("form", "find"),
    [
        (lambda z: z, lambda out: out),
        (lambda z: (z, "kept"), lambda out: out[0]),
        (lambda z: {"logits": z, "note": "kept"}, lambda out: out["logits"]),
        (lambda z: Answer(z), lambda out: out.logits),
    ],
)
def test_any_module_that_gives_logits(form, find):
    model = Plain(form).eval()
    served = SoftLabelWatermark(model, KEY).calibrate(images(400))
    x = images(8, seed=1)
    ours, theirs = served(x), model(x)
    assert type(ours) is type(theirs)
    assert torch.equal(find(ours).argmax(1), find(theirs).argmax(1))
    assert not torch.equal(find(ours), find(theirs))
    if not isinstance(ours, torch.Tensor):
        assert "kept" in str(ours)


def test_gradients_flow_to_the_pixels_and_the_weights():
    served = calibrated()
    x = images(4).requires_grad_()
    served(pixel_values=x).logits.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert served.model.classifier.weight.grad.abs().sum() > 0
    served.model.zero_grad()


def test_broken_images_are_passed_through_counted_and_told():
    served = SoftLabelWatermark(vit(), KEY).calibrate(images(640))
    x = images(4)
    whole = logits(served, x)
    x[1] = float("nan")
    with pytest.warns(UserWarning, match="1 rows"):
        marked = logits(served, x)
    assert torch.isnan(marked[1]).all()
    assert torch.allclose(marked[[0, 2, 3]], whole[[0, 2, 3]], atol=1e-5)
    assert served.untouched_rows == 1


@pytest.mark.parametrize("features", ["H", "M"])
def test_margin_mode_changes_close_calls_alone(features):
    served = calibrated(features=features, margin=(0.2, 0.3), family="resnet")
    x = images(2000, seed=3)
    clean, marked = logits(served.model, x).softmax(1), logits(served, x)
    first, second = clean.topk(2, dim=1).indices.T
    changed = marked.argmax(1) != first
    assert 0 < changed.float().mean() < 0.3
    assert torch.equal(marked.argmax(1)[changed], second[changed])
    top = clean.topk(2, dim=1).values
    assert ((top[:, 0] - top[:, 1])[changed] < 0.3).all()
    price = served.distortion(x).expected_price
    assert 0 < price < 0.05
    assert 0.3 < price / served.expected_price < 3


# Customers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["H", "M"])
def test_customers_share_the_model_and_get_answers_of_their_own(features):
    served = calibrated(features=features)
    x = images(6)
    views = [served.for_recipient(name) for name in ("a", "b")]
    answers = [logits(view, x) for view in (served, *views)]
    for i, one in enumerate(answers):
        for other in answers[i + 1 :]:
            assert not torch.allclose(one, other, atol=0.05)
    assert torch.equal(logits(served.for_recipient("a"), x), answers[1])
    assert views[0].model is served.model
    mixed = logits(served, x, recipients=["a", None, "b", "a", "b", None])
    for row, source in enumerate([1, 0, 2, 1, 2, 0]):
        assert torch.allclose(mixed[row], answers[source][row], atol=1e-5)


def test_every_image_needs_a_recipient():
    with pytest.raises(SoftLabelError, match="Every image"):
        calibrated()(images(3), recipients=["a"])
    with pytest.raises(KeyFileError):
        calibrated().for_recipient("")


# Where it runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["H", "M"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_top_class(dtype, features):
    served = SoftLabelWatermark(vit(), KEY, features=features).calibrate(images(640)).to(dtype)
    assert served.lens.own.dtype == torch.float32
    x = images(1024, seed=4).to(dtype)
    clean, marked = logits(served.model, x), logits(served, x)
    assert marked.dtype == dtype
    assert torch.equal(clean.argmax(1), marked.argmax(1))
    assert not torch.equal(clean, marked)


@pytest.mark.parametrize("features", ["H", "M"])
def test_autocast_keeps_the_top_class(features):
    served = calibrated(features=features, family="resnet")
    x = images(1024, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        clean, marked = logits(served.model, x), logits(served, x)
    assert marked.dtype == clean.dtype == torch.bfloat16
    assert torch.equal(clean.argmax(1), marked.argmax(1))


@pytest.mark.parametrize("features", ["H", "M"])
def test_compiles_whole(features):
    torch.compiler.reset()
    served = calibrated(features=features)
    whole = torch.compile(served, fullgraph=True)
    x = images(5, seed=6)
    assert torch.allclose(logits(whole, x), logits(served, x), atol=1e-3)
    with torch.no_grad():
        loss, marked = whole(pixel_values=x, labels=torch.arange(5), return_dict=False)
    assert torch.isfinite(loss)
    assert torch.allclose(marked, logits(served, x), atol=1e-3)


def test_in_a_pipeline():
    from PIL import Image
    from transformers import ViTImageProcessorPil, pipeline

    served = calibrated().for_recipient("customer-17")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    picture = Image.fromarray(noise)
    ours, theirs = (
        pipeline("image-classification", model=model, image_processor=processor)(picture, top_k=10)
        for model in (served, served.model)
    )
    assert ours[0]["label"] == theirs[0]["label"]
    assert {row["label"] for row in ours} == {row["label"] for row in theirs}
    assert [row["score"] for row in ours] != [row["score"] for row in theirs]


def test_threads_do_not_mix():
    from concurrent.futures import ThreadPoolExecutor

    served = calibrated(family="resnet")
    x = images(40, seed=7)
    expected = [logits(served, x[i : i + 1 + i % 3]) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: logits(served, x[i : i + 1 + i % 3]), range(40)))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


# The model is left as it was ----------------------------------------------------------------------


def test_the_model_is_not_changed_and_knows_nothing(tmp_path):
    model = vit()
    before = copy.deepcopy(model.state_dict())
    x = images(4)
    clean = logits(model, x)
    served = SoftLabelWatermark(model, KEY).calibrate(images(640))
    assert torch.equal(logits(model, x), clean)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert set(served.state_dict()) == {f"model.{name}" for name in before}
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(before)
        assert "softlabels" not in str(file.metadata())
    served.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(NotCalibratedError):
        served(x)


def test_calibration_keeps_the_mode_of_every_module():
    model = vit().train()
    model.classifier.eval()
    SoftLabelWatermark(model, KEY).calibrate(images(640))
    assert model.training
    assert not model.classifier.training


def test_nothing_secret_shows():
    served = calibrated()
    assert KEY.fingerprint in repr(served)
    assert "0." not in repr(served.lens.map) + repr(served.probes(images(2)))
    for attempt in (pickle.dumps, copy.deepcopy, lambda x: torch.save(x, io.BytesIO())):
        with pytest.raises(TypeError, match="never pickled"):
            attempt(served)


# Bad input ----------------------------------------------------------------------------------------


def test_before_calibration():
    served = SoftLabelWatermark(vit(), KEY)
    for attempt in (
        lambda: served(images(1)),
        lambda: served.for_recipient("a"),
        lambda: served.probes(images(1)),
        lambda: served.distortion(images(1)),
        lambda: served.save("never"),
    ):
        with pytest.raises(NotCalibratedError, match="calibrate"):
            attempt()


def test_too_few_images_says_how_many():
    with pytest.raises(SoftLabelError, match=r"at least 276 .* got 100"):
        SoftLabelWatermark(vit(), KEY).calibrate(images(100))
    with pytest.raises(SoftLabelError, match="no images"):
        SoftLabelWatermark(vit(), KEY).calibrate(images(0))
    with pytest.raises(SoftLabelError, match="shape"):
        SoftLabelWatermark(vit(), KEY).calibrate(images(10)[0])


def test_models_without_logits():
    headless = ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
        )
    )
    with pytest.raises(AttachError, match="no logits"):
        SoftLabelWatermark(headless, KEY).calibrate(images(640))
    with pytest.raises(AttachError, match="torch module"):
        SoftLabelWatermark("google/vit", KEY)
    one = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_labels=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
        )
    )
    with pytest.raises(AttachError, match="two classes"):
        SoftLabelWatermark(one, KEY).calibrate(images(640))
    with pytest.raises(AttachError, match="no layer"):
        SoftLabelWatermark(vit(), KEY, head="nowhere").calibrate(images(640))


def test_double_wrapping():
    with pytest.raises(AttachError, match="marked already"):
        SoftLabelWatermark(calibrated(), KEY)
    with pytest.raises(AttachError, match="marked already"):
        SoftLabelWatermark(nn.Sequential(calibrated().for_recipient("a")), KEY)


@pytest.mark.parametrize(
    "settings", [{"features": "X"}, {"eps": -1.0}, {"margin": (0.0, 1.0)}, {"count": 2}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(SoftLabelError):
        SoftLabelWatermark(vit(), KEY, **settings)


def test_views_are_not_calibrated():
    with pytest.raises(SoftLabelError, match="customer's view"):
        calibrated().for_recipient("a").calibrate(images(640))


def test_images_that_break_the_model():
    x = images(640)
    x[3] = float("nan")
    with pytest.raises(SoftLabelError, match="NaN"):
        SoftLabelWatermark(vit(), KEY).calibrate(x)


def test_a_model_whose_head_was_exchanged():
    model = vit()
    served = SoftLabelWatermark(model, KEY).calibrate(images(640))
    model.classifier.weight = nn.Parameter(torch.randn(7, 48))
    model.classifier.bias = nn.Parameter(torch.randn(7))
    with pytest.raises(SoftLabelError, match="10 classes"):
        served(images(2))


def test_calibration_from_a_loader():
    x = images(640)
    whole = SoftLabelWatermark(vit(), KEY).calibrate(x)
    loader = torch.utils.data.DataLoader([{"pixel_values": one} for one in x], batch_size=50)
    stream = (batch for batch in loader)
    for batches in (loader, stream, x.numpy()):
        other = SoftLabelWatermark(vit(), KEY).calibrate(batches)
        assert np.allclose(other.lens.map.own, whole.lens.map.own, atol=1e-3)
        assert len(other._digests) == 640


# The side file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"features": "M"}, {"margin": (0.2, 0.3), "eps": 0.5}])
def test_saved_and_loaded(tmp_path, settings):
    served = calibrated(**settings)
    path = tmp_path / "acme.softlabels"
    served.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = SoftLabelWatermark.load(path, vit(), KEY)
    x = images(8, seed=8)
    assert torch.equal(logits(again, x), logits(served, x))
    for name in ("how", "expected_price"):
        assert getattr(again, name) == getattr(served, name)
    assert again.probes(images(5)).seen.all()
    assert not again.probes(x).seen.any()
    assert KEY._secret not in path.read_bytes()


def test_a_side_file_belongs_to_one_key_and_one_model(tmp_path):
    path = tmp_path / "acme.softlabels"
    calibrated().save(path)
    with pytest.raises(SoftLabelError, match="another key"):
        SoftLabelWatermark.load(path, vit(), OwnerKey(bytes(32)))
    with pytest.raises(SoftLabelError, match="another model"):
        SoftLabelWatermark.load(path, vit(7), KEY)
    with pytest.raises(SoftLabelError, match="another model"):
        SoftLabelWatermark.load(path, nn.Linear(3, 10), KEY)
    with pytest.warns(UserWarning, match="not the one"):
        SoftLabelWatermark.load(path, vit(seed=1), KEY)
    with pytest.raises(SoftLabelError, match="another model"):
        SoftLabelWatermark.load(path, resnet(7), KEY)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x08" + bytes(7) + b"{}      ", bytes(100)])
def test_garbled_side_files(tmp_path, content):
    path = tmp_path / "acme.softlabels"
    path.write_bytes(content)
    with pytest.raises(SoftLabelError, match="garbled"):
        SoftLabelWatermark.load(path, vit(), KEY)


def test_side_files_of_other_versions_or_nowhere(tmp_path):
    path = tmp_path / "acme.softlabels"
    calibrated().save(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"softlabels/1", b"softlabels/9"))
    with pytest.raises(SoftLabelError, match="another version"):
        SoftLabelWatermark.load(path, vit(), KEY)
    path.write_bytes(content.replace(b"fingerprint", b"fingerprinx"))
    with pytest.raises(SoftLabelError, match="garbled"):
        SoftLabelWatermark.load(path, vit(), KEY)
    with pytest.raises(SoftLabelError, match="cannot be read"):
        SoftLabelWatermark.load(tmp_path / "nowhere", vit(), KEY)
    with pytest.raises(SoftLabelError, match="cannot be written"):
        calibrated().save(tmp_path / "no" / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["acme.softlabels"]
