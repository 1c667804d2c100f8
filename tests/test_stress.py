"""A run as a whole: images, cells, resuming, the table, the command."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from marked_models import KEY, ROOT, THIEF, refused, run
from PIL import Image

import hf_watermark.cli
from hf_watermark.direct import embed_checkpoint
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import WatermarkError
from hf_watermark.stress import Settings, Stress, attacks_of
from hf_watermark.stress.attacks import Attack
from hf_watermark.stress.examples import attackers_and_test
from hf_watermark.stress.outcomes import Outcome, Record, was_removed
from hf_watermark.stress.plot import plot
from hf_watermark.stress.table import in_words, markdown
from hf_watermark.stress.victims import Victim

COLOURS = {
    "blue": (40, 40, 200),
    "green": (40, 200, 40),
    "grey": (90, 90, 90),
    "red": (200, 40, 40),
}
SIDE = 16


def picture(colour: str, number: int) -> Image.Image:
    """A noisy square of a colour."""
    noise = np.random.default_rng(number).normal(0, 40, (SIDE, SIDE, 3))
    return Image.fromarray((COLOURS[colour] + noise).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, count: int, first: int = 0) -> Path:
    for number in range(first, first + count):
        colour = list(COLOURS)[number % 4]
        (folder / colour).mkdir(parents=True, exist_ok=True)
        picture(colour, number).save(folder / colour / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that tells colours, marked on disk, and in training; images; keys."""
    place = tmp_path_factory.mktemp("stress")
    write_images(place / "images", 160)
    KEY.save(place / "acme.key")
    THIEF.save(place / "thief.key")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        id2label=dict(enumerate(COLOURS)),
        label2id={name: i for i, name in enumerate(COLOURS)},
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(place / "start")
    training, _ = attackers_and_test(place / "images", Victim(place / "start"))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for _ in range(25):
        optimizer.zero_grad()
        model(pixel_values=training.images, labels=training.labels).loss.backward()
        optimizer.step()
    model.save_pretrained(place / "plain")
    embed_checkpoint(place / "plain", KEY, place / "marked")
    mark = WatermarkLoss(model, KEY)
    mark.project()
    mark.release()
    model.save_pretrained(place / "unclaimed")
    return place


@pytest.fixture(scope="module")
def stress(place):
    """A run that is ready."""
    victim = Victim(place / "marked")
    return Stress(victim, KEY, *attackers_and_test(place / "images", victim), SETTINGS)


SETTINGS = Settings(epochs=1, learning_rate=1e-3)


# Images -------------------------------------------------------------------------------------------


def test_a_third_is_held_out_and_no_image_is_in_both(place):
    victim = Victim(place / "marked")
    training, test = attackers_and_test(place / "images", victim)
    assert (len(training), len(test)) == (107, 53)
    assert training.images.shape == (107, 3, SIDE, SIDE)
    both = torch.cat([training.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 160
    again, _ = attackers_and_test(place / "images", victim)
    other, _ = attackers_and_test(place / "images", victim, seed=1)
    assert training.digest == again.digest != other.digest
    limited = attackers_and_test(place / "images", victim, limit=51)
    assert [len(part) for part in limited] == [51, 51]


def test_labels_are_the_models_classes(place, tmp_path):
    victim = Victim(place / "marked")
    training, _ = attackers_and_test(place / "images", victim)
    reddest = training.images.mean((2, 3))[training.labels == 3]
    assert (reddest.argmax(1) == 0).all()
    names = list(reversed(COLOURS))  # another order of the same names
    rows = {
        "image": [picture(names[i % 4], i) for i in range(160)],
        "label": [i % 4 for i in range(160)],
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    data.to_parquet(tmp_path / "colours.parquet")
    data.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "colours.parquet", tmp_path / "saved"):
        training, test = attackers_and_test(source, victim)
        assert len(training) + len(test) == 160
        blue = training.images.mean((2, 3))[training.labels == 0]
        assert (blue.argmax(1) == 2).all()


def test_parts_that_are_there_are_kept(place, tmp_path):
    write_images(tmp_path / "train", 60)
    write_images(tmp_path / "test", 52, first=500)
    training, test = attackers_and_test(tmp_path, Victim(place / "marked"))
    assert (len(training), len(test)) == (60, 52)


def test_the_models_own_processor_is_used(place, tmp_path):
    shutil.copytree(place / "marked", tmp_path / "model")
    processor = transformers.ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    processor.save_pretrained(tmp_path / "model")
    plain, own = Victim(place / "marked"), Victim(tmp_path / "model")
    one = picture("red", 1)
    torch.testing.assert_close(
        own.pixel_values([one]), plain.pixel_values([one]) / 2 + 0.5, rtol=0, atol=1e-5
    )


# Cells --------------------------------------------------------------------------------------------


def test_the_victim_before(stress):
    assert stress.before["accuracy"] > 0.9
    assert stress.before["ber"] == 0.0
    assert stress.before["log10_p"] < -6


def test_a_disguise_is_read_raw_and_aligned(stress):
    (attack,) = attacks_of(names=["permutation"])
    outcome = stress.cell(attack)
    assert outcome.lost == 0.0
    assert outcome.reading == "aligned"
    assert outcome.found
    assert outcome.log10_p < -6 < outcome.raw_log10_p
    assert not outcome.removed


def test_widened_and_renamed_copies_are_found(stress):
    for attack in attacks_of(names=["dummy-neurons", "names-timm", "names-random"]):
        outcome = stress.cell(attack)
        assert outcome.found, outcome
        assert outcome.reading == ("aligned" if attack.names is None else "renamed")
        assert outcome.raw_log10_p is None or attack.names is not None


def test_what_is_not_applicable_says_so(stress):
    (attack,) = attacks_of(names=["norms-folded"])
    outcome = stress.cell(attack)
    assert outcome.status == "not applicable"
    assert "batch normalisation" in outcome.note
    assert not outcome.removed


def broken(model, means):
    raise RuntimeError("out of luck")


def ruined(model, means):
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    return model


def test_what_fails_and_what_cannot_be_read(stress):
    outcome = stress.cell(Attack("broken", "erasure", broken, "none"))
    assert outcome.status == "failed"
    assert outcome.note == "RuntimeError: out of luck"
    outcome = stress.cell(Attack("ruined", "erasure", ruined, "none"))
    assert outcome.status == "unreadable"
    assert outcome.found is False
    assert not outcome.removed  # the model is ruined, too


def test_removed_means_gone_while_the_model_is_worth_having():
    assert was_removed(False, 0.049)
    assert not was_removed(False, 0.05)
    assert not was_removed(True, 0.0)
    assert was_removed(False, -0.1)


def test_a_run_goes_on_from_what_is_done(stress, tmp_path):
    said = []
    attacks = attacks_of(names=["prune-65", "fp16", "norms-folded"])
    first = stress.run(attacks[:1], tmp_path, lambda outcome, *_: said.append(outcome.name))
    whole = stress.run(attacks, tmp_path, lambda outcome, *_: said.append(outcome.name))
    assert said == ["prune-65", "fp16", "norms-folded"]
    assert whole.outcomes["prune-65"] == first.outcomes["prune-65"]
    content = json.loads((tmp_path / "stress.json").read_text())
    assert list(content["results"]) == said
    assert KEY.fingerprint == content["settings"]["key_fingerprint"]
    fresh = stress.run(attacks, tmp_path / "fresh").to_dict()
    for row in (*content["results"].values(), *fresh["results"].values()):
        del row["seconds"]
    assert fresh == content
    stress.run(attacks, tmp_path, lambda *_: pytest.fail("it was done"))


def test_a_failed_cell_is_run_again(stress, tmp_path):
    stress.run([Attack("fp16", "quantization", broken, "none")], tmp_path)
    record = stress.run(attacks_of(names=["fp16"]), tmp_path)
    assert record.outcomes["fp16"].status == "read"


def test_another_runs_results_are_left_alone(stress, place, tmp_path):
    stress.run([], tmp_path)
    before = (tmp_path / "stress.json").read_bytes()
    victim = stress.victim
    parts = attackers_and_test(place / "images", victim)
    other = Stress(victim, KEY, *parts, Settings(epochs=2, learning_rate=1e-3))
    with pytest.raises(WatermarkError, match="another run; expected epochs 2; got 1"):
        other.run([], tmp_path)
    assert (tmp_path / "stress.json").read_bytes() == before
    (tmp_path / "stress.json").write_text("{}")
    with pytest.raises(WatermarkError, match="not what a stress run writes"):
        stress.run([], tmp_path)


# Table and picture --------------------------------------------------------------------------------


def some_record() -> Record:
    about = {"family": "pruning", "source": "s", "parameters": {}}
    read = about | {"status": "read", "ber": 0.0, "tries": 2, "reading": "raw"}
    rows = (
        Outcome("stood", **read, accuracy=0.9, lost=0.0, log10_p=-250.0, found=True),
        Outcome("won", **read, accuracy=0.9, lost=0.01, log10_p=-1.0, found=False, removed=True),
        Outcome("burnt", **read, accuracy=0.2, lost=0.7, log10_p=-0.1, found=False),
        Outcome("n/a", **about, status="not applicable", note="no heads"),
        Outcome("sick", **about, status="failed", note="why"),
        Outcome("nan", **about, status="unreadable", accuracy=0.1, lost=0.8, found=False),
    )
    settings = {
        "model_type": "vit",
        "parameters": 1000,
        "attackers_images": 100,
        "test_images": 50,
        "epochs": 5,
        "learning_rate": 1e-4,
        "batch_size": 64,
        "seed": 0,
        "alpha": 1e-6,
    }
    before = {"accuracy": 0.9, "ber": 0.0, "log10_p": -300.0, "reading": "raw", "tries": 2}
    return Record(settings, before, {row.name: row for row in rows})


def test_the_table_tells_every_row():
    for text in (markdown(some_record()), in_words(some_record())):
        assert "The mark stood 1 of the 2 attacks that leave accuracy within 5 points." in text
        assert "Removed by: won." in text
        assert "Lost with the accuracy: burnt, nan." in text
        assert "Not applicable: n/a. Failed: sick." in text
    assert "| won | 90.0 | +1.0 | 0.000 | -1.0 | raw | REMOVED | 0.0 |" in markdown(some_record())
    assert "  n/a: no heads" in in_words(some_record())


def test_the_picture(tmp_path):
    plot(some_record(), tmp_path / "stress.png")
    with Image.open(tmp_path / "stress.png") as image:
        assert image.size[0] > 1000
    plot(some_record().of(()), tmp_path / "empty.png")


# The command --------------------------------------------------------------------------------------


class Done:
    """What a command in this process left, as `marked_models.refused` reads it."""

    def __init__(self, returncode, captured):
        self.returncode, self.stdout, self.stderr = returncode, captured.out, captured.err


@pytest.fixture
def cli(place, monkeypatch, capsys):
    """`hf-watermark stress ...` in this process."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.chdir(place)

    def call(*arguments, model="marked", key="acme.key", data="images", out="out"):
        words = ["stress", model, "--key", key, "--data", data, "--out", out]
        words += ["--epochs", "1", "--learning-rate", "1e-3", *arguments]
        monkeypatch.setattr(sys, "argv", ["hf-watermark", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            hf_watermark.cli.main()
        return Done(ended.value.code, capsys.readouterr())

    return call


def test_the_command_from_end_to_end(place, tmp_path):
    """In a process of its own: what goes where, exit status, files; again, it goes on."""
    words = ["stress", place / "marked", "--key", place / "acme.key", "--data", place / "images"]
    words += ["--out", tmp_path / "out", "--attacks", "prune-65,fine-tune-1x,norms-folded"]
    program = [sys.executable, "-c", "from hf_watermark.cli import main; main()"]
    done = run(*words, "--epochs", "1", program=program, cwd=Path(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Before: accuracy ")
    assert "The mark stood 2 of the 2" in done.stdout
    lines = done.stderr.splitlines()
    assert [line[:6] for line in lines[:3]] == ["[1/3] ", "[2/3] ", "[3/3] "]
    assert len(lines) == 4, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "stress.json",
        "stress.md",
        "stress.png",
    ]
    assert "| prune-65 |" in (tmp_path / "out" / "stress.md").read_text()


def test_formats_and_going_on(cli, tmp_path):
    done = cli("--attacks", "fp16", "--json", out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    content = json.loads(done.stdout)
    assert content["results"]["fp16"]["found"]
    assert done.stderr.startswith("[1/1] fp16: ")
    done = cli("--attacks", "fp16", "--format", "quiet", out=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
    done = cli("--attacks", "fp16,int8", "--json", out=tmp_path)
    assert list(json.loads(done.stdout)["results"]) == ["int8", "fp16"]
    assert done.stderr.startswith("[1/2] int8: ")
    assert done.stderr.count("\n") == 1


def test_a_mark_that_is_removed(cli, tmp_path):
    """Trained marks have no aligned reading."""
    done = cli(
        "--attacks", "permutation,bf16", "--format", "quiet", model="unclaimed", out=tmp_path
    )
    assert (done.returncode, done.stdout) == (1, "permutation\n"), done.stderr


def test_listing_all(cli):
    done = cli("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        attack.name for attack in attacks_of("full")
    ]


def test_refusals(cli, place, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(4):
        picture("red", number).save(flat / f"{number}.png")
    refused(cli(data=flat), "no labels", "a folder for each class", advice=False)
    refused(cli(data=write_images(tmp_path / "few", 60)), "too few images")
    refused(cli(data="nowhere"), "nowhere", "No such file", advice=False)
    rows = {"image": [picture("red", i) for i in range(160)], "label": [i % 5 for i in range(160)]}
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64")}
    beyond = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    beyond.to_parquet(tmp_path / "beyond.parquet")
    beyond.remove_columns("label").to_parquet(tmp_path / "bare.parquet")
    refused(cli(data=tmp_path / "beyond.parquet"), "not the model's classes", "0 to 3", "got 4")
    write_images(tmp_path / "odd", 160)
    (tmp_path / "odd" / "red").rename(tmp_path / "odd" / "pink")
    (tmp_path / "odd" / "white").mkdir()
    picture("red", 0).save(tmp_path / "odd" / "white" / "0.png")
    refused(cli(data=tmp_path / "odd"), "not the model's classes")
    refused(cli(key="thief.key"), "claim does not belong to this key")
    refused(cli(key="thief.key", model="unclaimed"), "does not find its mark", "--claim")
    refused(cli(model="plain"), "does not find its mark")
    refused(cli("--attacks", "prune-66"), "Unknown attack", "prune-65", "--list")
    refused(cli("--attacks", ","), "Unknown attack")
    refused(cli("--suite", "slow"), "slow", advice=False)
    refused(cli("--alpha", "2"), "alpha is out of range")
    refused(cli("--device", "warp"), "device 'warp' cannot be used", advice=False)
    refused(cli("--device", "meta"), "device 'meta' cannot be used", advice=False)
    refused(cli(model="images"), "holds no safetensors")
    other = tmp_path / "text"
    shutil.copytree(place / "marked", other)
    (other / "config.json").write_text('{"model_type": "bert"}')
    refused(cli(model=other), "cannot be loaded", "image classifier", advice=False)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    refused(cli("--attacks", "fp16", out=taken), "cannot be written")


def test_data_without_labels_in_parquet(cli, tmp_path):
    rows = {"image": [picture("red", i) for i in range(4)], "note": ["a"] * 4}
    kinds = {"image": datasets.Image(), "note": datasets.Value("string")}
    bare = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    bare.to_parquet(tmp_path / "bare.parquet")
    refused(cli(data=tmp_path / "bare.parquet"), "no labels", "a column label", advice=False)


def test_results_of_another_run(cli, tmp_path):
    assert cli("--attacks", "fp16", out=tmp_path).returncode == 0
    refused(cli("--attacks", "fp16", "--seed", "1", out=tmp_path), "another run", "--out")
