"""Finding the claim that a suspect should be read by, wherever it was said to be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

from hf_watermark import OwnerKey, Scheme
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import make_claim
from hf_watermark.errors import CheckpointError, ClaimError, HubError
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.files import FolderFiles
from hf_watermark.found_claims import find_claim

KEY = OwnerKey(bytes(range(32)), "acme")
SCHEME = Scheme(bits=8)
NAMES = [f"encoder.layer.{i}.dense.weight" for i in (0, 2, 10)]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((32, 16)).astype(np.float32) for name in NAMES}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def claim(folder):
    return make_claim(Checkpoint.open(FolderFiles(folder)), KEY, SCHEME, NAMES)


def test_no_claim(folder):
    assert find_claim(FolderFiles(folder), None, None) is None


def test_the_suspects_own_claim(folder, claim):
    (folder / CLAIM_FILE).write_bytes(claim.to_bytes())
    files = FolderFiles(folder)
    found = find_claim(files, None, None)
    assert (found.claim, found.files) == (claim, files)


def test_a_claim_that_is_given_comes_before_the_suspects_own(folder, claim, tmp_path):
    other = make_claim(Checkpoint.open(FolderFiles(folder)), KEY, Scheme(bits=16), NAMES)
    (folder / CLAIM_FILE).write_bytes(other.to_bytes())
    elsewhere = tmp_path / "owners"
    elsewhere.mkdir()
    path = elsewhere / CLAIM_FILE
    path.write_bytes(claim.to_bytes())
    for given_claim in (claim, path, str(path), elsewhere, str(elsewhere)):
        assert find_claim(FolderFiles(folder), given_claim, None).claim == claim
    assert find_claim(FolderFiles(folder), claim, None).files is None
    assert find_claim(FolderFiles(folder), path, None).files is None
    assert find_claim(FolderFiles(folder), elsewhere, None).files.name == str(elsewhere)


def test_edited_claims_are_refused_wherever_they_come_from(folder, claim):
    edited = dataclasses.replace(claim, owner="thief")
    (folder / CLAIM_FILE).write_bytes(edited.to_bytes())
    for given_claim in (None, edited, folder, folder / CLAIM_FILE):
        with pytest.raises(ClaimError, match="edited"):
            find_claim(FolderFiles(folder), given_claim, None)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100])
def test_unreadable_claims_are_refused(folder, content):
    (folder / CLAIM_FILE).write_bytes(content)
    for given_claim in (None, folder / CLAIM_FILE):
        with pytest.raises(ClaimError, match="unreadable"):
            find_claim(FolderFiles(folder), given_claim, None)


def test_a_huge_claim_is_not_read_whole(folder):
    (folder / CLAIM_FILE).write_bytes(b" ")
    with open(folder / CLAIM_FILE, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="too large"):
        find_claim(FolderFiles(folder), None, None)
    with pytest.raises(ClaimError, match="unreadable"):
        find_claim(FolderFiles(folder), folder / CLAIM_FILE, None)


def test_a_folder_without_the_claim_that_was_promised(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ClaimError, match="no claim in"):
        find_claim(FolderFiles(folder), empty, None)


@pytest.mark.parametrize("given_claim", ["./nowhere.json", "/no/such/claim"])
def test_a_claim_that_is_not_where_it_was_said_to_be(folder, given_claim):
    with pytest.raises(CheckpointError):
        find_claim(FolderFiles(folder), given_claim, None)


@pytest.mark.parametrize("given_claim", ["x" * 300, "a\0b", ""])
def test_a_claim_that_can_be_no_place(folder, given_claim):
    with pytest.raises(HubError):
        find_claim(FolderFiles(folder), given_claim, None)
