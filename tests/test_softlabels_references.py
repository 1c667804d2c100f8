"""The bank of clean students: resumed where it stopped, fixed by digests, clean."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from soft_models import calibrated, images, resnet, vit

from hf_watermark.errors import SoftLabelError
from hf_watermark.softlabels.references import ReferenceBank

STUDENTS = {"resnet": resnet, "vit-2": lambda: vit(seed=3)}
HOW = {"epochs": 3, "batch_size": 32}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    bank = ReferenceBank(tmp_path_factory.mktemp("bank"), STUDENTS)
    told = []
    bank.distil(vit(), images(128), **HOW, progress=lambda *pair: told.append(pair))
    assert told == [(i, 6) for i in range(1, 7)]
    return bank


def test_students_learn_and_answer(bank):
    x = images(64, seed=1)
    answers = bank.answers(x)
    assert list(answers) == list(STUDENTS)
    for one in answers.values():
        assert one.shape == (64, 10)
        assert np.allclose(np.exp(one).sum(1), 1.0, atol=1e-5)
    probes = calibrated().probes(x).with_references(list(answers.values()))
    assert len(probes.references) == 2
    recorded = json.loads((bank.folder / "bank.json").read_text())["students"]
    assert recorded["resnet"]["epochs"] == 3
    assert len(recorded["resnet"]["sha256"]) == 64
    assert not list(bank.folder.glob("*.partial"))


def test_students_of_labels_alone(tmp_path):
    x, surest = images(128), {}
    for hard, labels in ((False, "soft"), (True, "hard")):
        bank = ReferenceBank(tmp_path / labels, {"vit": lambda: vit(seed=3)})
        bank.distil(vit(), x, epochs=10, batch_size=16, hard_labels=hard)
        assert bank.entries["vit"]["labels"] == labels
        surest[labels] = np.exp(bank.answers(x)["vit"]).max(axis=1).mean()
    assert surest["hard"] > 1.5 * surest["soft"]  # it was never told of a doubt


def test_what_is_there_is_not_made_again(bank):
    before = {path: path.stat().st_mtime_ns for path in bank.folder.iterdir()}
    ReferenceBank(bank.folder, STUDENTS).distil(vit(), images(128), **HOW)
    assert before == {path: path.stat().st_mtime_ns for path in bank.folder.iterdir()}


def test_an_interruption_changes_nothing(bank, tmp_path):
    def stop(done, planned):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ReferenceBank(tmp_path, STUDENTS).distil(vit(), images(128), **HOW, progress=stop)
    assert (tmp_path / "vit-2.partial").exists()
    again = ReferenceBank(tmp_path, STUDENTS)
    assert set(again.entries) == {"resnet"}
    again.distil(vit(), images(128), **HOW)
    x = images(16, seed=1)
    ours, theirs = again.answers(x), bank.answers(x)
    for name in STUDENTS:
        assert np.allclose(ours[name], theirs[name], atol=1e-5)


def test_a_student_that_was_exchanged(bank, tmp_path):
    folder = tmp_path / "bank"
    shutil.copytree(bank.folder, folder)
    copy = ReferenceBank(folder, STUDENTS)
    torch.save(resnet().state_dict(), folder / "resnet.pt")
    with pytest.raises(SoftLabelError, match="not the one"):
        copy.answers(images(4))
    (folder / "resnet.pt").unlink()
    with pytest.raises(SoftLabelError, match="no student"):
        copy.answers(images(4))
    (folder / "bank.json").write_text("{}")
    with pytest.raises(SoftLabelError, match="unreadable"):
        ReferenceBank(folder, STUDENTS)


def test_bad_input(tmp_path):
    with pytest.raises(SoftLabelError, match="name"):
        ReferenceBank(tmp_path, {"../x": resnet})
    with pytest.raises(SoftLabelError, match="clean"):
        ReferenceBank(tmp_path, STUDENTS).distil(calibrated(), images(64))
    with pytest.raises(SoftLabelError, match="other classes"):
        ReferenceBank(tmp_path, {"odd": lambda: resnet(7)}).distil(vit(), images(64))
