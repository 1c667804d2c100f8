"""benchmarks/survival.py on a few random images: it resumes, refuses other settings, is shown."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import embedding
import reinit
import survival
import survival_tables


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The script with these arguments; its record."""

    def load(split, count):
        random = torch.Generator().manual_seed(count)
        images = torch.rand(count, 3, 32, 32, generator=random) * 2.0 - 1.0
        return images, torch.arange(count) % 10

    def started(*arguments):
        fixed = "--train 256 --epochs 3 --attackers-images 32 --attack-epochs 1 --test-images 40"
        files = ["--cache", tmp_path / "cache", "--out", tmp_path / "out.json"]
        line = ["survival.py", *fixed.split(), "--seeds", 1, "--hosts", "resnet", *files]
        monkeypatch.setattr(sys, "argv", [str(one) for one in [*line, *arguments]])
        survival.main()
        return json.loads((tmp_path / "out.json").read_text())

    monkeypatch.setattr(embedding, "load", load)
    return started


def test_a_run_goes_on_and_is_shown(run, tmp_path, monkeypatch):
    schemes = ("--schemes", "projection", "closed form")
    first = run(*schemes, "--attacks", "int8")
    assert set(first["results"]) == {"resnet/projection/0", "resnet/closed form/0"}
    row = first["results"]["resnet/closed form/0"]
    assert row["found"]
    assert not row["twin_found"]
    assert row["cells"]["int8"]["accuracy_before"] == pytest.approx(row["accuracy"])
    monkeypatch.setattr(embedding, "train", None)  # nothing is trained again
    more = run(*schemes, "--attacks", "int8", "permutation", "--page", tmp_path / "page")
    assert list(more["attacks"]) == ["int8", "permutation"]
    assert more["results"]["resnet/closed form/0"]["cells"]["int8"] == row["cells"]["int8"]
    cells = [more["results"][f"resnet/{s}/0"]["cells"]["permutation"] for s in schemes[1:]]
    assert [(cell["removed"], cell["reading"][:7]) for cell in cells] == [
        (True, "raw"),
        (False, "aligned"),
    ]
    assert run(*schemes, "--attacks", "int8", "permutation") == more
    with pytest.raises(SystemExit, match="other settings: test_images is 40, not 41"):
        run("--test-images", "41")
    page = (tmp_path / "page" / "survival.md").read_text()
    assert "| permutation | +0.0 | 0.0 † 1/1 | -" in page
    assert "- spread, closed form: removed by nothing." in page
    assert (tmp_path / "page" / "survival.png").stat().st_size > 10_000


def test_a_sealed_model_is_the_trained_one_with_a_seal(run):
    record = run("--schemes", "projection", "sealed", "--attacks", "permutation")
    trained, sealed = (record["results"][f"resnet/{s}/0"] for s in ("projection", "sealed"))
    assert "training_seconds" not in sealed  # nothing was trained again
    assert sealed["found"]
    assert trained["cells"]["permutation"]["removed"]
    assert sealed["cells"]["permutation"]["reading"].startswith("aligned")
    assert sealed["cells"]["permutation"]["found"]


def test_layers_drawn_anew(run, tmp_path, monkeypatch):
    sizes = {"train": 256, "epochs": 1, "attackers_images": 32, "test_images": 40}
    monkeypatch.setattr(survival, "SMALL", {**survival.SMALL, **sizes})
    monkeypatch.setattr(reinit, "RECIPES", {"1x": (1.0, 1)})
    line = ["reinit.py", "--hosts", "resnet", "--seeds", "1", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", line)
    reinit.main()
    marks = json.loads((tmp_path / "out.json").read_text())["results"]["resnet/0"]["marks"]
    assert (marks["default"]["carriers"], marks["every layer"]["carriers"]) == (3, 8)
    left = {
        (mark, redrawn): cells["1x"]
        for mark, row in marks.items()
        for redrawn, cells in row["redrawn"].items()
    }
    found = {case: cell["found"] for case, cell in left.items()}
    assert found == {
        ("default", "none"): True,
        ("default", "default"): False,
        ("every layer", "default"): True,
        ("every layer", "every layer"): False,
    }
    assert [cell["layers"] for cell in left.values()] == [0, 3, 3, 8]


def test_cells_of_a_table():
    found = {"found": True, "removed": False, "log10_p": -20.04, "reading": "raw", "lost": 0.0}
    removed = found | {"found": False, "removed": True, "log10_p": -0.52}
    ruined = removed | {"removed": False, "lost": 0.3, "log10_p": None, "reading": None}
    assert survival_tables._cell([found, found | {"reading": "aligned"}]) == "-20.0, aligned"
    assert survival_tables._cell([found, removed]) == "-0.5 † 1/2"
    assert survival_tables._cell([found, removed, ruined]) == "unreadable † 1/3 ‡ 1/3"
    assert survival_tables._cell([]) == ""
