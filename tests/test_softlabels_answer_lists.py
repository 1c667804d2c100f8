"""Label/score lists become the arrays they came from, in the owner's order, or are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_models import calibrated, images
from test_softlabels_detection import student, world
from test_softlabels_outputs import distributions, top

from hf_watermark.errors import OutputsError
from hf_watermark.softlabels.answer_lists import class_names, is_named, scores_by_class
from hf_watermark.softlabels.output_files import read_output_file
from hf_watermark.softlabels.outputs import Outputs
from hf_watermark.verify import verify_outputs

NAMES = ("cat", "dog", "ship", "frog")
GOOD = [{"label": "dog", "score": 0.7}, {"label": "cat", "score": 0.3}]


def lists(p, names, k=None, decimals=None):
    """As transformers' pipeline gives them: best first, so many as `top_k` says."""
    rows = []
    for row in p if decimals is None else p.round(decimals):
        order = np.argsort(-row, kind="stable")[:k]
        rows.append([{"label": names[i], "score": float(row[i])} for i in order])
    return rows


@given(st.integers(2, 12), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=40)
def test_lists_are_the_arrays_they_came_from(classes, seed, data):
    p = distributions(20, classes, seed)
    names = [f"class {i}" for i in range(classes)]
    assert np.array_equal(scores_by_class(lists(p, names), names), p)
    order = data.draw(st.permutations(range(classes)))
    renamed = scores_by_class(lists(p, names), [names[i] for i in order])
    assert np.array_equal(renamed, p[:, order])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_best_few(k):
    names = [f"class {i}" for i in range(10)]
    p = distributions()
    read = Outputs.read(lists(p, names, k), 10, names)
    assert read.kind == f"probabilities, top {k} only"
    assert np.allclose(read.log_probs, Outputs.read(top(p, k), 10).log_probs)


def test_a_threshold_instead_of_a_number():
    names = [f"class {i}" for i in range(10)]
    p = np.where(distributions(sharp=1.0) > 0.05, distributions(sharp=1.0), 0.0)
    rows = [[item for item in row if item["score"]] for row in lists(p, names)]
    read = Outputs.read(rows, 10, names)
    assert read.kind == "probabilities, unlikely classes left out"
    assert np.isfinite(read.log_probs).all()
    assert np.exp(read.log_probs).sum(1).max() < 1.2


def test_rounded_to_nothing_is_not_twice():
    rows = [[{"label": "cat", "score": 1.0}, *({"label": n, "score": 0.0} for n in NAMES[1:])]] * 9
    assert Outputs.read(rows, 4, NAMES).kind == "labels only"
    rows[0] = [*rows[0], {"label": "dog", "score": 0.0}]
    with pytest.raises(OutputsError, match="'dog' twice"):
        scores_by_class(rows, NAMES)


@pytest.mark.parametrize("form", ["names", "items", "lists"])
def test_labels_alone(form):
    rows = {
        "names": ["dog", "cat"],
        "items": [{"label": "dog"}, {"label": "cat"}],
        "lists": [[{"label": "dog"}], [{"label": "cat"}]],
    }[form]
    read = Outputs.read(rows, 4, NAMES)
    assert read.labels_only
    assert list(read.labels) == [1, 0]


def test_a_batch_of_one_is_unpacked():
    full = [*GOOD, {"label": "ship", "score": 0.0}, {"label": "frog", "score": 0.0}]
    assert np.array_equal(scores_by_class([[full]], NAMES), [[0.3, 0.7, 0, 0]])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "image 1 cannot be read"),
        (None, "image 1 cannot be read"),
        ({"error": "overloaded"}, "image 1 cannot be read.*overloaded"),
        ([{"label": "dog"}, {"label": "cat"}], "image 1 cannot be read"),
        ([{"label": "dog", "score": "0.5"}], "cannot be read"),
        ([{"label": "dog", "score": True}], "cannot be read"),
        ([{"label": "dog", "score": float("nan")}], "cannot be read"),
        ([{"label": "dog", "score": 1.5}], "cannot be read"),
        ([{"label": 1, "score": 0.5}], "cannot be read"),
        ([{"label": "dog", "score": 0.0}], "cannot be read"),
        ([{"label": "Dog", "score": 0.7}], "label that the marked model lacks.*--labels"),
        ([*GOOD, {"label": "dog", "score": 0.1}], "twice"),
    ],
)
def test_what_is_no_answer(answer, message):
    with pytest.raises(OutputsError, match=message):
        scores_by_class([GOOD, answer], NAMES)


def test_a_suspect_of_fewer_classes():
    with pytest.raises(OutputsError, match=r"lacks classes.*'ship', 'frog'"):
        scores_by_class([GOOD, GOOD[::-1]], NAMES)
    few = [[{"label": "dog", "score": 0.5}, {"label": "cat", "score": 0.3}]] * 3
    assert Outputs.read(few, 4, NAMES).kind.startswith("probabilities, top 2 only")


@pytest.mark.parametrize("names", [(), ("cat", "cat", "dog", "ship")])
def test_names_that_tell_nothing(names):
    with pytest.raises(OutputsError, match="what the classes are called"):
        scores_by_class([GOOD], names)


def test_names_of_a_configuration():
    assert class_names({"1": "dog", 0: "cat"}, 2) == ("cat", "dog")
    for odd in (None, {0: "cat"}, {0: "cat", 1: "cat"}, {0: "cat", 2: "dog"}, {"x": "cat"}, 7):
        assert class_names(odd, 2) == ()
    assert calibrated().probes(images(8, seed=5)).labels == tuple(f"LABEL_{i}" for i in range(10))


def test_arrays_are_not_named():
    for values in ([[0.5, 0.5]], [1, 2], np.eye(3), [], [[]], np.array(["a"]), "cat", None):
        assert not is_named(values)


def test_a_verdict_from_lists(tmp_path):
    probes, rng = world(1000)
    names = tuple(f"class {i}" for i in range(10))
    p = student(probes, rng)
    plain = verify_outputs(p, None, probes)
    from_lists = verify_outputs(lists(p, names), None, replace(probes, labels=names))
    assert from_lists.log10_p == pytest.approx(plain.log10_p)
    few = verify_outputs(lists(p, names, 5, 3), None, replace(probes, labels=names))
    assert few.found
    assert few.outputs == "probabilities, top 5 only, rounded to 3 decimals"
    with pytest.raises(OutputsError, match="what the classes are called"):
        verify_outputs(lists(p, names), None, probes)
    path = tmp_path / "acme.probes"
    replace(probes, labels=names).save(path)
    assert type(probes).load(path, probes.key).labels == names


def test_files_of_lists(tmp_path):
    rows = lists(distributions(30, 4), NAMES, 2)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"id": range(30), "answers": rows}), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert read_output_file(tmp_path / name) == rows
    (tmp_path / "a.json").write_text(json.dumps([[0.5, 0.5], [0.1, 0.9]]))
    assert read_output_file(tmp_path / "a.json").shape == (2, 2)
    for odd in ('{"error": 1}', "[1, ", "\xff"):
        (tmp_path / "a.json").write_text(odd, encoding="latin-1")
        with pytest.raises(OutputsError, match="cannot be read"):
            read_output_file(tmp_path / "a.json")
