"""Making a claim about what lies on disk, finding carriers that were renamed, checking digests."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hf_watermark import Claim, OwnerKey, Scheme
from hf_watermark.carriers import Carrier, choose_carriers
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import check_digests, locate_carriers, make_claim
from hf_watermark.errors import (
    CarrierError,
    CarrierMissingError,
    ClaimError,
)
from hf_watermark.files import FolderFiles

KEY = OwnerKey(bytes(range(32)), "acme")
SCHEME = Scheme(bits=8)
NAMES = [f"encoder.layer.{i}.dense.weight" for i in (0, 2, 10)]


def model(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "embeddings.weight": rng.standard_normal((32, 16)).astype(np.float32),
        NAMES[0]: rng.standard_normal((32, 16)).astype(np.float32),
        NAMES[1]: rng.standard_normal((32, 16)).astype(np.float16),
        NAMES[2]: rng.standard_normal((8, 4, 3, 3)).astype(np.float32),
        "classifier.weight": rng.standard_normal((10, 16)).astype(np.float32),
        "classifier.bias": rng.standard_normal(10).astype(np.float32),
    }


def opened(folder, tensors=None) -> Checkpoint:
    if tensors is not None:
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(FolderFiles(folder))


@pytest.fixture
def folder(tmp_path):
    opened(tmp_path, model())
    return tmp_path


def by_rows(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32).reshape(len(array), -1)


# Making and checking ------------------------------------------------------------------------------


def test_a_claim_says_what_lies_on_disk(folder):
    claim = make_claim(opened(folder), KEY, SCHEME, NAMES)
    claim.check("here")
    assert claim.commits_to(KEY)
    assert claim.scheme == SCHEME.name
    tensors = model()
    assert [carrier.name for carrier in claim.carriers] == NAMES
    for carrier, dtype in zip(claim.carriers, ("F32", "F16", "F32"), strict=True):
        array = tensors[carrier.name]
        assert (carrier.shape, carrier.dtype) == (array.shape, dtype)
        assert carrier.sha256 == hashlib.sha256(array.tobytes()).hexdigest()
    assert check_digests(opened(folder), claim) == 3
    assert Claim.from_bytes(claim.to_bytes(), "") == claim


def test_the_order_of_the_names_is_kept(folder):
    claim = make_claim(opened(folder), KEY, SCHEME, NAMES[::-1])
    assert [carrier.name for carrier in claim.carriers] == NAMES[::-1]


def test_secret_carriers_stay_out_of_the_public_copy(folder):
    claim = make_claim(opened(folder), KEY, SCHEME, NAMES, secret_carriers=True)
    assert [carrier.name for carrier in claim.carriers] == NAMES
    assert claim.public.carriers == ()
    claim.check_secret_carriers(KEY, "")
    assert check_digests(opened(folder), claim) == 3
    assert check_digests(opened(folder), claim.public) == 0


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["nowhere.weight"], CarrierMissingError),
        ([NAMES[0], NAMES[0]], CarrierError),
        ([], CarrierError),
        (["classifier.bias"], CarrierError),
    ],
)
def test_claims_about_what_is_not_there(folder, names, error):
    with pytest.raises(error) as refused:
        make_claim(opened(folder), KEY, SCHEME, names)
    assert type(refused.value) is error


def header_size(path) -> int:
    with open(path, "rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_single_changed_byte_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("model")
    checkpoint = opened(folder, model())
    claim = make_claim(checkpoint, KEY, SCHEME, NAMES)
    path = folder / "model.safetensors"
    start, content = header_size(path), bytearray(path.read_bytes())
    place = data.draw(st.integers(start, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    changed = next(
        name for name, span in checkpoint.tensors.items() if span.start <= place < span.stop
    )
    if changed not in NAMES:
        assert check_digests(opened(folder), claim) == 3
        return
    with pytest.raises(ClaimError, match="not those claimed") as refused:
        check_digests(opened(folder), claim)
    assert repr(changed) in str(refused.value)
    assert "sha256" in str(refused.value)
    assert "--key" in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_first_and_last_byte_of_every_carrier(folder, name):
    checkpoint = opened(folder)
    claim = make_claim(checkpoint, KEY, SCHEME, NAMES)
    span, path = checkpoint.tensors[name], folder / "model.safetensors"
    before = path.read_bytes()
    for place in (span.start, span.stop - 1):
        content = bytearray(before)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(ClaimError, match=name.replace(".", r"\.")):
            check_digests(opened(folder), claim)
    path.write_bytes(before)
    assert check_digests(opened(folder), claim) == 3


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda tensors: tensors.pop(NAMES[1]), "no such tensor"),
        (lambda tensors: tensors.update({NAMES[1]: tensors[NAMES[1]].T.copy()}), r"\[16, 32\]"),
        (lambda tensors: tensors.update({NAMES[1]: tensors[NAMES[1]][:-1].copy()}), r"\[31, 16\]"),
        (lambda tensors: tensors.update({NAMES[1]: by_rows(tensors[NAMES[1]])}), "F32"),
        (lambda tensors: tensors.update({NAMES[1]: tensors[NAMES[1]].view(np.int16)}), "I16"),
        (lambda tensors: tensors.update({NAMES[1]: -tensors[NAMES[1]]}), r"\.\.\."),
    ],
)
def test_changed_carriers(tmp_path, change, got):
    claim = make_claim(opened(tmp_path, model()), KEY, SCHEME, NAMES)
    tensors = model()
    change(tensors)
    with pytest.raises(ClaimError, match=rf"layer\.2\.dense.*got .*{got}"):
        check_digests(opened(tmp_path, tensors), claim)


def test_sharded_and_repacked_weights_are_the_same_weights(tmp_path):
    claim = make_claim(opened(tmp_path / "one", model()), KEY, SCHEME, NAMES)
    tensors, shards = model(), tmp_path / "shards"
    shards.mkdir()
    files = {f"model-0000{i + 1}-of-00002.safetensors": {} for i in (0, 1)}
    for place, (name, array) in enumerate(reversed(tensors.items())):
        files[[*files][place % 2]][name] = array
    for file, content in files.items():
        save_file(content, shards / file, metadata={"format": "pt"})
    index = {name: file for file, content in files.items() for name in content}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert check_digests(opened(shards), claim) == 3


# Locating -----------------------------------------------------------------------------------------


def saved_as(tensors, renaming):
    return {renaming.get(name, name): array for name, array in tensors.items()}


@pytest.mark.parametrize(
    "renaming",
    [
        {},
        dict(zip(NAMES, ["x.2.weight", "x.1.weight", "y"], strict=True)),
        {NAMES[0]: NAMES[1], NAMES[1]: NAMES[0]},  # names changed places
        {NAMES[0]: "zzz.weight", "embeddings.weight": NAMES[0]},  # another took the name
    ],
)
def test_carriers_are_found_by_their_contents(tmp_path, renaming):
    tensors = model()
    carriers = [Carrier(name, tensors[name].shape) for name in NAMES]
    rows = [by_rows(tensors[name])[:4] for name in NAMES]
    found = locate_carriers(opened(tmp_path, saved_as(tensors, renaming)), carriers, rows)
    assert found == [renaming.get(name, name) for name in NAMES]


@pytest.mark.parametrize("count", [1, 8, 32])
def test_any_number_of_first_rows_will_do(tmp_path, count):
    tensors = model()
    carriers = [Carrier(name, tensors[name].shape) for name in NAMES]
    rows = [by_rows(tensors[name])[:count] for name in NAMES]
    assert locate_carriers(opened(tmp_path, tensors), carriers, rows) == NAMES


def test_equal_carriers_are_found_in_order_and_once(tmp_path):
    """Weights that start out equal, such as zeros: each carrier gets a tensor of its own."""
    names = [f"layer.{i}.weight" for i in (1, 2, 10)]
    tensors = {name: np.zeros((8, 8), np.float32) for name in reversed(names)}
    rows = [np.zeros((2, 8), np.float32)] * 3
    inside = [Carrier(f"renamed.{i}", (8, 8)) for i in range(3)]
    assert locate_carriers(opened(tmp_path, tensors), inside, rows) == names
    kept = [Carrier(names[2], (8, 8)), Carrier(names[0], (8, 8)), Carrier("renamed", (8, 8))]
    assert locate_carriers(opened(tmp_path, tensors), kept, rows) == [names[2], names[0], names[1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(NAMES[1]),
        lambda tensors: tensors[NAMES[1]].__setitem__((0, 0), 7.0),
        lambda tensors: tensors.update({NAMES[1]: tensors[NAMES[1]].T.copy()}),
        lambda tensors: tensors.update({NAMES[1]: tensors[NAMES[0]].astype(np.float16)}),
    ],
)
def test_carriers_that_were_not_saved(tmp_path, change):
    original, tensors = model(), model()
    change(tensors)
    carriers = [Carrier(name, original[name].shape) for name in NAMES]
    rows = [by_rows(original[name])[:4] for name in NAMES]
    with pytest.raises(CarrierMissingError, match=r"layer\.2\.dense.*\[32, 16\]"):
        locate_carriers(opened(tmp_path, tensors), carriers, rows)


def test_a_claim_of_what_transformers_saves_under_other_names(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    network = transformers.ViTForImageClassification(config).to(torch.bfloat16)
    network.save_pretrained(tmp_path)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    carriers = choose_carriers(shapes)
    rows = [network.get_parameter(c.name)[:2].detach().float().numpy() for c in carriers]
    names = locate_carriers(opened(tmp_path), carriers, rows)
    assert names != [carrier.name for carrier in carriers]
    claim = make_claim(opened(tmp_path), KEY, SCHEME, names)
    for claimed, carrier in zip(claim.carriers, carriers, strict=True):
        weight = network.get_parameter(carrier.name).detach().view(torch.int16).numpy()
        assert claimed.sha256 == hashlib.sha256(weight.tobytes()).hexdigest()
        assert (claimed.dtype, claimed.shape) == ("BF16", carrier.shape)
    # Loaded and saved again, the names and bytes are those claimed.
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path, dtype="auto")
    again.save_pretrained(tmp_path / "again")
    assert check_digests(opened(tmp_path / "again"), claim) == 2
