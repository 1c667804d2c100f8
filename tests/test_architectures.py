"""The table of architectures: a handful examined anew, and what the record on disk says."""

import importlib.util
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from hf_watermark import OwnerKey

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KEY = OwnerKey(bytes(32), "benchmark")


@cache
def benchmark():
    path = BENCHMARKS / "architectures.py"
    spec = importlib.util.spec_from_file_location("benchmarks_architectures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def architectures():
    module = benchmark()
    return {a.label: a for a in (*module.classifiers(), *module.heads())}


@cache
def record():
    return json.loads((BENCHMARKS / "results" / "architectures.json").read_text())


def check(row):
    assert benchmark().good(row), json.dumps(row, indent=2)
    assert row["direct"]["matched"] == row["trained"]["matched"] == row["bits"] == 64
    assert row["direct"]["log10_p"] < -100
    assert row["trained"]["log10_p"] < -100
    assert row["same_in_module"]


@pytest.mark.parametrize("label", ["ViT", "ResNet", "ConvNext", "Swin", "MobileNetV2"])
def test_a_handful_quickly(label, monkeypatch):
    monkeypatch.setattr(benchmark(), "STEPS", 3)
    check(benchmark().examine(architectures()[label], KEY, seed=5))


def test_a_head_beyond_classification(monkeypatch):
    monkeypatch.setattr(benchmark(), "HEAD_STEPS", 3)
    row = benchmark().examine(architectures()["YolosForObjectDetection"], KEY, seed=5)
    check(row)
    assert "accuracy" not in row["direct"]


@pytest.mark.slow
@pytest.mark.parametrize("label", ["ViT", "ResNet", "ConvNext", "Swin", "MobileNetV2"])
def test_a_handful_as_recorded(label):
    row = benchmark().examine(architectures()[label], KEY)
    check(row)
    kept = record()["classifiers"][label]
    for name in ("carriers", "first_carrier", "columns", "weights", "bits", "parameters"):
        assert row[name] == kept[name]
    for part in ("direct", "trained"):
        assert row[part]["log10_p"] == pytest.approx(kept[part]["log10_p"], rel=0.1)
        assert row[part]["accuracy"] == pytest.approx(kept[part]["accuracy"], abs=0.2)


def test_every_class_of_the_mapping_is_recorded():
    labels = {a.label for a in benchmark().classifiers()}
    if record()["settings"]["transformers"] == benchmark().transformers.__version__:
        assert set(record()["classifiers"]) == labels
    assert len(labels) >= 35


def test_the_record_holds_what_is_promised():
    for name in ("classifiers", "heads"):
        found = record()["summary"][name]
        assert found == benchmark().summary(record()[name])
        assert found["failed"] == []
    assert record()["summary"]["classifiers"]["good"] >= 35
    for row in record()["classifiers"].values():
        assert "skipped" in row or row["weights"] >= 64 * 64
    # The names of the module and those of the file lead to the same layers, in every architecture.
    assert all(
        row["same_in_module"]
        for name in ("classifiers", "heads")
        for row in record()[name].values()
        if "skipped" not in row
    )


def test_the_table_has_a_line_for_each():
    text = benchmark().table(record())
    rows = record()["classifiers"] | record()["heads"]
    done = [label for label, row in rows.items() if "direct" in row]
    assert text.count("\n| ") == len(done)
    for label, row in rows.items():
        assert f"| {label} |" in text if "direct" in row else f"Left out: {label}" in text
    assert "**" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_only_what_needs_a_missing_library_is_skipped(monkeypatch):
    vit = architectures()["ViT"]

    def needs_a_library(config):
        raise ImportError("X requires the natten library.\nInstall it. Or not.")

    def breaks(config):
        raise ValueError("qk_channels must be divisible")

    told = benchmark().survey(
        iter([replace(vit, label="a", model_class=needs_a_library)]), KEY, seed=0
    )
    assert told == {"a": {"skipped": "X requires the natten library"}}
    broken = benchmark().survey(iter([replace(vit, label="b", model_class=breaks)]), KEY, seed=0)
    assert broken == {"b": {"failed": "ValueError: qk_channels must be divisible"}}
    assert benchmark().summary(told | broken) == {
        "architectures": 2,
        "good": 0,
        "failed": ["b"],
        "skipped": ["a"],
    }
    # An import that fails later is no reason to skip.
    monkeypatch.setattr(benchmark(), "answers", needs_a_library)
    monkeypatch.setattr(benchmark(), "STEPS", 1)
    assert "failed" in benchmark().survey(iter([vit]), KEY, seed=0)["ViT"]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("direct", "verdict", "not found"),
        ("trained", "verdict", "not found"),
        ("direct", "with_claim", "not found"),
        ("direct", "another_key", "found"),
        ("unmarked", "verdict", "found"),
        ("direct", "same_outside_carriers", False),
        ("direct", "reloads", False),
        ("trained", "reloads", False),
    ],
)
def test_anything_that_breaks_is_told_as_failed(part, name, value):
    row = record()["classifiers"]["ViT"]
    assert benchmark().good(row)
    broken = row | {part: row[part] | {name: value}}
    assert benchmark().summary({"ViT": broken})["failed"] == ["ViT"]
    one = record() | {"classifiers": {"ViT": broken}, "heads": {}}
    assert "| **ViT: failed** |" in benchmark().table(one)


def test_a_byte_changed_elsewhere_is_seen(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    architectures()["ViT"].build(0).save_pretrained(a)
    architectures()["ViT"].build(0).save_pretrained(b)
    outside = benchmark().same_outside
    assert outside(a, b, [])
    weights = b / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not outside(a, b, [])
    weights.write_bytes((a / "model.safetensors").read_bytes())
    (b / "more.txt").write_text("")
    assert not outside(a, b, [])
