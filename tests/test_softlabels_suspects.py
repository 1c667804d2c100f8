"""A suspect in a folder or on the Hub, run here: its own classes' order, none of its code."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.numpy import load_file, save_file
from soft_models import KEY, calibrated, vit
from test_softlabels_files import run
from transformers import ViTImageProcessor

from hf_watermark.errors import (
    HubError,
    NotSafetensorsError,
    OutputsError,
    SoftLabelError,
    WatermarkError,
)
from hf_watermark.softlabels.classifiers import Classifier
from hf_watermark.softlabels.probe_images import ProbeImages
from hf_watermark.softlabels.suspects import answers_of, named
from hf_watermark.testing import LoopbackHub
from hf_watermark.verify import verify_outputs

N = 160
OWN = tuple(f"kind {i}" for i in range(10))
ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]  # the suspect's class i is the owner's ORDER[i]


def pictures(n=N, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(n)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, picture in enumerate(pictures()):
        picture.save(folder / f"{i:04d}.png")
    return ProbeImages(folder)


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 16, "width": 16})


@torch.no_grad()
def saved(folder, processor, order=ORDER, names=OWN):
    """The owner's model, its classes in another order."""
    model = vit()
    model.classifier.weight.copy_(model.classifier.weight[order].clone())
    model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.id2label = {i: names[place] for i, place in enumerate(order)}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def suspect(tmp_path_factory, processor):
    return saved(tmp_path_factory.mktemp("suspect"), processor)


def test_classes_are_brought_into_the_owners_order(suspect, images, processor):
    answers = Classifier(suspect).answers(images, OWN, batch_size=50)
    x = processor(pictures(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = vit()(pixel_values=x).logits.log_softmax(1).numpy()
    assert answers.shape == (N, 10)
    assert np.allclose(answers, expected, atol=1e-4)


def test_from_a_dataset(suspect, images):
    dataset = datasets.Dataset.from_dict({"image": pictures()}).cast_column(
        "image", datasets.Image()
    )
    told = []
    answers = Classifier(suspect).answers(
        ProbeImages(dataset), OWN, 100, lambda *pair: told.append(pair)
    )
    assert told == [(100, N), (N, N)]
    assert np.allclose(answers, Classifier(suspect).answers(images, OWN), atol=1e-5)


def test_on_the_hub(suspect, images, tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub, hub.in_process():
        api = HfApi(token=hub.token)
        api.create_repo("demo/copy")
        api.upload_folder(repo_id="demo/copy", folder_path=suspect)
        api.upload_file(
            path_or_fileobj=b"boom", path_in_repo="pytorch_model.bin", repo_id="demo/copy"
        )
        answers = Classifier("demo/copy", token=hub.token).answers(images, OWN)
        commit = api.model_info("demo/copy").sha
        for revision in (None, "main", commit):
            assert named("demo/copy", revision, hub.token) == ("demo/copy", commit)
        with pytest.raises(HubError):
            Classifier("demo/nothing", token=hub.token)
        with pytest.raises(HubError):
            named("demo/nothing", None, hub.token)
    assert np.allclose(answers, Classifier(suspect).answers(images, OWN), atol=1e-5)


def changed(suspect, folder, **fields):
    """A copy whose configuration says something else."""
    folder.mkdir()
    for path in suspect.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_other_names(suspect, images, tmp_path):
    generic = changed(suspect, tmp_path / "generic", id2label={i: f"LABEL_{i}" for i in range(10)})
    with pytest.raises(OutputsError, match=r"other classes.*--labels"):
        Classifier(generic).answers(images, OWN)
    theirs = tuple(f"LABEL_{ORDER.index(i)}" for i in range(10))
    assert np.allclose(
        Classifier(generic).answers(images, theirs), Classifier(suspect).answers(images, OWN)
    )
    with pytest.raises(OutputsError, match="what the classes are called"):
        Classifier(generic).answers(images, ())


def test_a_stranger_runs_no_code(suspect, images, tmp_path):
    (tmp_path / "trace").mkdir()
    evil = changed(
        suspect,
        tmp_path / "evil",
        model_type="evil",
        auto_map={
            "AutoConfig": "evil.EvilConfig",
            "AutoModelForImageClassification": "evil.EvilModel",
        },
    )
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'trace' / 'ran')!r}, 'w')")
    with pytest.raises(OutputsError, match="cannot be loaded"):
        Classifier(evil)
    known = changed(
        suspect, tmp_path / "known", auto_map={"AutoModelForImageClassification": "evil.EvilModel"}
    )
    (known / "evil.py").write_text((evil / "evil.py").read_text())
    assert np.isfinite(Classifier(known).answers(images, OWN)).all()
    kernel = changed(suspect, tmp_path / "kernel", _attn_implementation="thief/kernels")
    assert Classifier(kernel).model.config._attn_implementation == "eager"
    kernel = changed(suspect, tmp_path / "kernel2", attn_implementation="thief/kernels")
    assert Classifier(kernel).model.config._attn_implementation == "eager"
    assert not list((tmp_path / "trace").iterdir())


def test_what_cannot_be_run(suspect, images, tmp_path, processor):
    pickled = changed(suspect, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(NotSafetensorsError):
        Classifier(pickled)
    with pytest.raises(OutputsError, match="cannot be loaded"):
        Classifier(changed(suspect, tmp_path / "odd", model_type="bert"))
    bare = changed(suspect, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(SoftLabelError, match=r"no image processor.*--processor"):
        Classifier(bare)
    assert Classifier(bare, processor=suspect).answers(images, OWN).shape == (N, 10)
    headless = changed(suspect, tmp_path / "headless")
    tensors = load_file(headless / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "classifier" not in name}
    save_file(kept, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputsError, match="lacks weights"):
        Classifier(headless)
    with pytest.raises(WatermarkError):
        Classifier(tmp_path / "nowhere")


def test_suspects_by_name(suspect, images, tmp_path, processor):
    x = processor(pictures(), return_tensors="pt")["pixel_values"]
    probes = replace(calibrated().probes(x), labels=OWN)
    answers = answers_of(suspect, probes, images)
    assert np.array_equal(answers, Classifier(suspect).answers(images, OWN))
    assert not verify_outputs(answers, None, probes).found
    with pytest.raises(OutputsError, match="--images"):
        answers_of(suspect, probes)
    few = ProbeImages(datasets.Dataset.from_dict({"image": [images.encoded(0)]}))
    with pytest.raises(OutputsError, match=r"expected 160 images; got 1"):
        answers_of(suspect, probes, few)


def test_what_evidence_calls_a_suspect(suspect):
    assert named(suspect) == (str(suspect), None)
    assert named("a.npz") == ("a.npz", None)
    url = "https://user:secret@thief.example:8443/classify?token=secret"
    assert named(url) == ("https://thief.example:8443/classify", None)
    with pytest.raises(OutputsError, match="no URL"):
        named("https://")


def test_the_command(suspect, images, tmp_path, processor):
    """A thief who serves the marked model itself, saved with its classes in another order."""
    x = processor(pictures(), return_tensors="pt")["pixel_values"]
    probes = replace(calibrated().probes(x), labels=OWN)
    KEY.save(tmp_path / "acme.key")
    probes.save(tmp_path / "acme.probes")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(N):
        (folder / f"{i:04d}.png").write_bytes(images.encoded(i))
    common = ("--key", tmp_path / "acme.key", "--probes", tmp_path / "acme.probes", "--json")
    done = run("verify-outputs", suspect, *common, "--images", folder)
    assert (done.returncode, done.stderr) == (1, "")
    fields = json.loads(done.stdout)
    assert fields["outputs"] == "log-probabilities"
    assert (fields["suspect"], fields["revision"]) == (str(suspect), None)
    (tmp_path / "names.txt").write_text("\n".join(OWN[:9]))
    done = run("verify-outputs", suspect, *common, "--images", folder, "--labels",
               tmp_path / "names.txt")  # fmt: skip
    assert done.returncode == 2
    assert "other classes" in done.stderr
    assert done.stderr.count("\n") == 1
