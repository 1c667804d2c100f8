"""Banks of students named by architecture, and the command that makes them."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from soft_models import KEY, images, vit
from test_softlabels_files import run
from test_softlabels_suspects import pictures
from transformers import ResNetConfig, ViTConfig, ViTImageProcessor

from hf_watermark.errors import SoftLabelError
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.architectures import new_bank, open_bank
from hf_watermark.softlabels.probes import Probes

SMALL = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=8
)
HOW = ("--epochs", "2", "--batch-size", "32", "--json")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A folder with a model, queries and two architectures."""
    folder = tmp_path_factory.mktemp("case")
    vit().save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    queries = datasets.Dataset.from_dict({"image": pictures(64)})
    queries.cast_column("image", datasets.Image()).to_parquet(str(folder / "queries.parquet"))
    SMALL.save_pretrained(folder / "small-resnet")
    VIT.save_pretrained(folder / "small-vit")
    return folder


def references(case, out, *archs):
    chosen = [part for arch in archs for part in ("--arch", case / arch)]
    data = ("--data", case / "queries.parquet", "--out", out)
    return run("references", case / "model", *chosen, *data, *HOW)


def test_students_are_made_once_and_answer(case, tmp_path):
    out = tmp_path / "bank"
    done = references(case, out, "small-resnet", "small-vit")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)["students"]
    assert set(told) == {"small-resnet", "small-vit"}
    assert told == json.loads((out / "bank.json").read_text())["students"]
    again = references(case, out, "small-resnet", "small-vit")
    assert json.loads(again.stdout)["students"] == told
    answers = open_bank(out).answers(images(20))
    assert set(answers) == set(told)
    for one in answers.values():
        assert np.allclose(np.exp(one).sum(1), 1.0, atol=1e-5)
    config = json.loads((out / "small-vit.config.json").read_text())
    assert (config["image_size"], config["num_channels"]) == (16, 3)


def test_answers_go_to_a_file_of_probes_in_the_same_step(case, tmp_path):
    served = SoftLabelWatermark(vit(), KEY, count=16).calibrate(images(640))
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    asked = pictures(40, seed=5)
    probes = served.probes(processor(asked, return_tensors="pt")["pixel_values"])
    probes.save(tmp_path / "acme.probes")
    KEY.save(tmp_path / "acme.key")
    for name, order in (("images", asked), ("others", pictures(40, seed=6))):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(order):
            picture.save(tmp_path / name / f"{i:04d}.png")

    def added(folder):
        return run(
            "references", case / "model", "--arch", case / "small-resnet",
            "--data", case / "queries.parquet", "--out", tmp_path / "bank", *HOW,
            "--probes", tmp_path / "acme.probes", "--key", tmp_path / "acme.key",
            "--images", tmp_path / folder, "--hard-labels",
        )  # fmt: skip

    for _ in range(2):  # the second time there is nothing left to do
        done = added("images")
        assert (done.returncode, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        assert told["references"] == 1
        assert told["students"]["small-resnet"]["labels"] == "hard"
    found = Probes.load(tmp_path / "acme.probes", KEY)
    (answers,) = (
        open_bank(tmp_path / "bank")
        .answers(processor(asked, return_tensors="pt")["pixel_values"])
        .values()
    )
    assert np.allclose(found.references[0], answers, atol=1e-3)
    assert np.array_equal(found.psi, probes.psi)
    done = added("others")
    assert (done.returncode, done.stdout) == (2, "")
    assert "not the probes' images" in done.stderr
    assert len(Probes.load(tmp_path / "acme.probes", KEY).references) == 1


def test_half_of_the_options(case, tmp_path):
    done = run("references", case / "model", "--arch", "resnet", "--data", case / "queries.parquet",
               "--out", tmp_path, "--probes", "acme.probes")  # fmt: skip
    assert done.returncode == 2
    assert "go together" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_refused(case, tmp_path):
    out = tmp_path / "bank"
    x = images(8)
    new_bank(out, [str(case / "small-vit")], 10, x)
    with pytest.raises(SoftLabelError, match="another student"):
        new_bank(out, [str(case / "small-vit")], 7, x)
    with pytest.raises(SoftLabelError, match="knows no architecture"):
        new_bank(out, ["renset"], 10, x)
    with pytest.raises(SoftLabelError, match="No image classifier can be made"):
        new_bank(out, ["bert"], 10, x)
    with pytest.raises(SoftLabelError, match="one name"):
        new_bank(out, ["resnet", "resnet"], 10, x)
    with pytest.raises(SoftLabelError, match="no references"):
        open_bank(tmp_path)
    (tmp_path / "a.config.json").write_text("[]")
    with pytest.raises(SoftLabelError, match="cannot be read"):
        open_bank(tmp_path)
    done = run("references", case / "model", "--data", case / "model", "--arch", "resnet",
               "--out", out)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no images" in done.stderr
