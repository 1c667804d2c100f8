"""Probes and outputs on disk, and the command that compares them."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_softlabels_detection import KEY, student, world

from hf_watermark import OwnerKey
from hf_watermark.errors import OutputsError, SoftLabelError
from hf_watermark.softlabels.output_files import read_output_file
from hf_watermark.softlabels.probes import Probes

P = np.random.default_rng(0).dirichlet(np.ones(4), 50)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from hf_watermark.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["probs", "log_probs", "anything"])
def test_arrays_of_numpy(tmp_path, name):
    np.savez(tmp_path / "a.npz", **{name: P})
    np.save(tmp_path / "a.npy", P)
    for file in ("a.npz", "a.npy"):
        assert np.array_equal(read_output_file(tmp_path / file), P)


def test_tables(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": list(range(50)), "probs": P.tolist()}), path)
    assert np.array_equal(read_output_file(path), P)
    pq.write_table(pa.table({f"class {i}": P[:, i] for i in range(4)}), path)
    assert np.array_equal(read_output_file(path), P)
    pq.write_table(pa.table({"label": P.argmax(1)}), path)
    assert np.array_equal(read_output_file(path), P.argmax(1))


def test_files_that_say_nothing(tmp_path):
    with pytest.raises(OutputsError, match="cannot be read; got No such file"):
        read_output_file(tmp_path / "nowhere.npz")
    (tmp_path / "a.npz").write_bytes(b"nothing")
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object))
    for name in ("a.npz", "a.parquet", "a.npy"):
        with pytest.raises(OutputsError, match="cannot be read"):
            read_output_file(tmp_path / name)
    np.savez(tmp_path / "b.npz", x=P, y=P)
    with pytest.raises(OutputsError, match="which array"):
        read_output_file(tmp_path / "b.npz")


def test_probes_saved_and_loaded(tmp_path):
    probes, rng = world(100, margin=(0.2, 0.5), top_k=5)
    probes = probes.with_references([student(probes, rng, 0.0) for _ in range(2)])
    path = tmp_path / "acme.probes"
    probes.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Probes.load(path, KEY)
    for name in ("psi", "log_probs", "seen", "references"):
        assert np.array_equal(getattr(again, name), getattr(probes, name))
    assert (again.margin, again.top_k) == ((0.2, 0.5), 5)
    assert KEY._secret not in path.read_bytes()
    with pytest.raises(SoftLabelError, match="another key"):
        Probes.load(path, OwnerKey(bytes(32)))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"reference_0", b"reference_7"))
    with pytest.raises(SoftLabelError, match="garbled"):
        Probes.load(path, KEY)
    path.write_bytes(content.replace(b"hf-watermark-probes/1", b"hf-watermark-probes/2"))
    with pytest.raises(SoftLabelError, match="another version"):
        Probes.load(path, KEY)
    path.write_bytes(content.replace(b"hf-watermark-probes/1", b"hf-watermark-images/1"))
    with pytest.raises(SoftLabelError, match="garbled"):
        Probes.load(path, KEY)


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def case(tmp_path):
    """A folder with a key, probes, answers of a student and of an innocent, customers."""
    probes, rng = world(600)
    KEY.save(tmp_path / "acme.key")
    probes.save(tmp_path / "acme.probes")
    np.savez(tmp_path / "student.npz", probs=student(probes, rng, recipient="b").round(3))
    np.savez(tmp_path / "innocent.npz", probs=student(probes, rng, 0.0))
    np.savez(tmp_path / "reference.npz", probs=student(probes, rng, 0.0))
    (tmp_path / "customers.txt").write_text("a\nb\n\nc\n")
    return tmp_path


def asked(case, outputs, *more):
    key, probes = case / "acme.key", case / "acme.probes"
    return run("verify-outputs", case / outputs, "--key", key, "--probes", probes, *more)


def test_the_leak_is_named(case):
    done = asked(
        case, "student.npz", "--recipients", case / "customers.txt",
        "--reference", case / "reference.npz", "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    fields = json.loads(done.stdout)
    assert (fields["verdict"], fields["recipient"], fields["tries"]) == ("found", "b", 3)
    assert fields["references"] == 2
    assert fields["outputs"] == "probabilities, rounded to 3 decimals"
    assert (fields["suspect"], fields["revision"]) == (str(case / "student.npz"), None)


def test_in_words(case):
    done = asked(case, "student.npz", "--recipient", "b")
    assert done.returncode == 0
    assert done.stdout.startswith("FOUND")
    assert "600" in done.stdout
    done = asked(case, "innocent.npz")
    assert done.returncode == 1
    assert done.stdout.startswith("NOT FOUND")
    assert "estimate" in done.stdout
    assert asked(case, "innocent.npz", "--format", "quiet").stdout == ""


def test_what_cannot_be_checked(case):
    np.savez(case / "odd.npz", probs=P)
    for outputs, more, message in (
        ("odd.npz", (), "number of classes"),
        ("nowhere.npz", (), "cannot be read"),
        ("student.npz", ("--recipients", case / "nowhere"), "cannot be read"),
        ("student.npz", ("--recipient", "a", "--recipient", "a"), "each once"),
        ("student.npz", ("--alpha", "2"), "alpha"),
    ):
        done = asked(case, outputs, *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_help_shows_an_example():
    done = run("verify-outputs", "--help")
    assert done.returncode == 0
    assert "hf-watermark verify-outputs answers.npz" in done.stdout
