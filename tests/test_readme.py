"""README.md is what a stranger runs: every code block is executed, in order, in one folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent


def test_figures_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "tables.py", "--check"])
    assert done.returncode == 0, "run: python benchmarks/tables.py"


def test_the_page_of_architectures_is_that_of_the_result_file():
    record = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())
    page = (ROOT / "docs" / "architectures.md").read_text()
    for label, row in (record["classifiers"] | record["heads"]).items():
        if "direct" in row:
            line = re.search(rf"^\| {label} \|.*$", page, re.MULTILINE)[0]
            for part in ("trained", "direct"):
                assert f"| {row[part]['log10_p']:.0f} |" in line
        else:
            assert f"Left out: {label}: " in page


def test_only_kinds_of_blocks_that_are_run_or_produced():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "text"}
    assert [text for kind, text in BLOCKS if kind == "python"]


def test_make_targets_exist_and_ci_runs_them():
    targets = {
        line.split("#")[0].strip()
        for kind, text in BLOCKS
        if kind == "bash"
        for line in text.splitlines()
        if line.startswith("make ")
    }
    assert targets == {"make demo", "make test"}
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for target in targets:
        assert re.search(rf"^{target.split()[1]}:", makefile, re.MULTILINE)
        assert re.search(rf"^{target}$", ci, re.MULTILINE)


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        image = torch.randn(3, 16, 16, generator=generator)
        return {"pixel_values": image, "labels": torch.tensor(i % 10)}


@pytest.fixture
def acme(loopback_hub, tmp_path, monkeypatch):
    """A user `acme` whose repo `acme/vit-base` holds a small ViT, and a folder to work in."""
    from huggingface_hub import HfApi
    from transformers import ViTConfig, ViTForImageClassification

    token = loopback_hub.add_user("thief")
    thief = HfApi(endpoint=loopback_hub.endpoint, token=token)
    thief.create_repo("thief/vit-copy")
    token = loopback_hub.add_user("acme")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with loopback_hub.in_process(token):
        HfApi().create_repo("acme/vit-base")
        config = ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            num_labels=10,
        )
        ViTForImageClassification(config).push_to_hub("acme/vit-base")
        yield thief, loopback_hub.environment(token)


def write_images(folder):
    """Labelled pictures, a folder for each class."""
    from PIL import Image

    pixels = torch.randint(256, (160, 16, 16, 3), generator=torch.Generator().manual_seed(4))
    for number, picture in enumerate(pixels.to(torch.uint8).numpy()):
        (folder / str(number % 10)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / str(number % 10) / f"{number}.png")


def steal(thief):
    """What a thief does: take the weights and the config, leave claim and card."""
    from huggingface_hub import hf_hub_download

    for name in ("model.safetensors", "config.json"):
        path = hf_hub_download("acme/vit-acme", name)
        thief.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id="thief/vit-copy")


def test_every_block_runs_in_order(acme, monkeypatch, capsys):
    thief, environment = acme
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    namespace = {
        "train_dataset": Pictures(),
        "loader": torch.utils.data.DataLoader(Pictures(), batch_size=4),
        "unlabelled": torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        "queries": torch.randn(4, 3, 16, 16),
        "probes": torch.randn(300, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
    }

    @torch.no_grad()
    def leaked(images):
        """A suspect that answers as customer 17 was answered."""
        view = namespace["served"].for_recipient("customer-17")
        return view(pixel_values=images).logits.softmax(-1)

    namespace["suspect"] = leaked
    write_images(Path("images"))
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    ran = []
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), namespace)  # the README's own words
            ran.append("python")
        elif kind == "bash" and not text.startswith("make "):
            if "thief/" in text:
                steal(thief)
            Path("customers.txt").write_text("".join(f"customer-{i}\n" for i in range(20)))
            for command in text.replace("\\\n", " ").splitlines():
                done = subprocess.run(
                    shlex.split(command),
                    env={**os.environ, **environment, "PATH": path},
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, (command, done.stdout, done.stderr)
                if "trace" in command:
                    assert "the copy of customer-17" in done.stdout
                if "--json" in command:
                    assert json.loads(done.stdout)["verdict"] == "found"
                ran.append(command.split()[0])
    verified = ["verify_hub_model", "verify_hub_model", "python"]
    marked = ["hf-watermark"] * 4 + ["verify_hub_model"]
    softly = ["python", "python"]
    expected = ["hf-watermark", "python", "python", *verified, *marked, *softly, "hf-watermark"]
    assert ran == expected
    assert {path.name for path in Path("stress").iterdir()} == {
        "stress.json",
        "stress.md",
        "stress.png",
    }
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert any(line.startswith("found -") for line in lines)
    assert lines[-1].startswith("found customer-17 -")
