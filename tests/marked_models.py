"""Marked models made in milliseconds, without training, and what a thief does to them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import CommitOperationAdd, HfApi, save_torch_state_dict
from safetensors.torch import load_file, save_file

import hf_watermark
from hf_watermark import Claim, OwnerKey, Scheme
from hf_watermark.carriers import Carrier, choose_carriers
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.claims import make_claim
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.files import FolderFiles
from hf_watermark.projections import Projection

KEY = OwnerKey(bytes(range(32)), "acme")
THIEF = OwnerKey(bytes(range(32, 64)), "thief")
LAYERS, HIDDEN, MLP = 6, 64, 256
WEIGHTS = "model.safetensors"
BIN = Path(sys.executable).parent
ROOT = str(Path(hf_watermark.__file__).parents[1])

Tensors = dict[str, torch.Tensor]


def another_key(number: int) -> OwnerKey:
    """One of many keys that have marked nothing."""
    return OwnerKey(hashlib.sha256(b"another key %d" % number).digest())


# A tiny ViT of transformers ---------------------------------------------------------------------


@cache
def _vit(key: OwnerKey | None, scheme: Scheme | None) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=MLP,
            num_labels=10,
        )
    )
    if key is not None:
        watermark = WatermarkLoss(model.train(), key, scheme)
        watermark.project()
        watermark.release()
    folder = Path(tempfile.mkdtemp(prefix="marked-vit-"))
    model.save_pretrained(folder)
    return folder


def vit(key: OwnerKey | None = KEY, scheme: Scheme | None = None) -> Tensors:
    """The tensors of a tiny ViT as transformers saves it, marked unless the key is None."""
    return load_file(_vit(key, scheme) / WEIGHTS)


def vit_config() -> bytes:
    """Its config.json."""
    return (_vit(KEY, None) / "config.json").read_bytes()


def fc1(layer: int) -> str:
    """The name of a carrier of the ViT."""
    return f"vit.encoder.layer.{layer}.intermediate.dense.weight"


# Larger ones, of numpy alone --------------------------------------------------------------------


def marked_arrays(
    shapes: Mapping[str, tuple[int, ...]], key: OwnerKey | None, *, strength: float = 0.05, seed=0
) -> Tensors:
    """Gaussian tensors; the default carriers carry a mark of this relative size, in closed form."""
    rng = np.random.default_rng(seed)
    arrays = {n: rng.standard_normal(s).astype(np.float32) * 0.02 for n, s in shapes.items()}
    if key is not None:
        carriers = choose_carriers(shapes)
        projection = Projection(key, Scheme(), carriers)
        for i, carrier in enumerate(carriers):
            w = arrays[carrier.name].reshape(carrier.rows, carrier.columns)
            u = projection.row_signs(i).astype(np.float32) * projection.message_signs
            change = (u @ projection.x(i)).astype(np.float32)
            change *= strength * np.linalg.norm(w) / np.linalg.norm(change)
            arrays[carrier.name] = (w + change).reshape(carrier.shape)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# On disk and on the Hub -------------------------------------------------------------------------


def save_model(
    folder: Path, tensors: Tensors, claim: Claim | None = None, *, shard: str | None = None
) -> Path:
    """Write a model's folder, emptied first; `shard` is the largest size of a file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if shard is None:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    else:
        save_torch_state_dict(tensors, folder, max_shard_size=shard)
    (folder / "config.json").write_bytes(vit_config())
    if claim is not None:
        (folder / CLAIM_FILE).write_bytes(claim.public.to_bytes())
    return folder


def claim_about(
    tensors: Tensors,
    key: OwnerKey = KEY,
    names: list[str] | None = None,
    scheme: Scheme | None = None,
    *,
    secret_carriers: bool = False,
) -> Claim:
    """The owner's own copy of the claim about a model."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(FolderFiles(save_model(Path(folder) / "m", tensors)))
        if names is None:
            names = [carrier.name for carrier in choose_carriers(checkpoint.shapes())]
        return make_claim(
            checkpoint, key, scheme or Scheme(), names, secret_carriers=secret_carriers
        )


def carriers_of(tensors: Tensors) -> tuple[Carrier, ...]:
    """The default carriers."""
    return choose_carriers({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def push(repo: str, files: Mapping[str, bytes] | Path, **kwargs) -> str:
    """Commit files, or a folder, to the Hub that this process uses; the new commit's sha."""
    if isinstance(files, Path):
        files = {path.name: path.read_bytes() for path in sorted(files.iterdir())}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return HfApi().create_commit(repo, operations, commit_message="push", **kwargs).oid


# What a thief does ------------------------------------------------------------------------------


def renumbered(tensors: Tensors, new_number) -> Tensors:
    """Layers renumbered; None deletes one."""
    kept = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.layer\.)(\d+)(\..*)", name)
        if match is None:
            kept[name] = tensor
        elif (number := new_number(int(match[2]))) is not None:
            kept[f"{match[1]}{number}{match[3]}"] = tensor
    return kept


def like_timm(tensors: Tensors) -> Tensors:
    """Another library's names, their natural order preserved; no q, k and v (timm fuses them)."""
    names = (
        (r"^vit\.encoder\.layer\.", "blocks."),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"attention\.output\.dense", "attn.proj"),
        (r"(\d+)\.output\.dense", r"\1.mlp.fc2"),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"^vit\.layernorm", "norm"),
        (r"^vit\.embeddings\.(\w+)_embeddings\.?(projection)?", r"\1_embed.proj"),
        (r"^vit\.embeddings\.cls_token", "cls_token"),
        (r"^classifier", "head"),
    )
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


def shuffled_names(tensors: Tensors, seed: int = 7) -> Tensors:
    """Names that say nothing, in an order that says nothing."""
    order = np.random.default_rng(seed).permutation(len(tensors))
    return {f"p{order[i]}": tensors[name] for i, name in enumerate(sorted(tensors))}


def identity_layer_first(tensors: Tensors) -> Tensors:
    """One more layer, which adds nothing to the residual stream, in front: the function is kept."""
    moved = renumbered(tensors, lambda number: number + 1)
    first = {
        name: torch.zeros_like(tensor) if "dense" in name else tensor
        for name, tensor in tensors.items()
        if ".layer.0." in name
    }
    return moved | first


def all_but_one_replaced(tensors: Tensors, kept: int = 3) -> Tensors:
    """Random weights in all carriers but one."""
    generator = torch.Generator().manual_seed(5)
    replaced = {
        fc1(i): torch.randn(MLP, HIDDEN, generator=generator) * tensors[fc1(i)].std()
        for i in range(LAYERS)
        if i != kept
    }
    return tensors | replaced


def noisy(tensors: Tensors, sigma: float) -> Tensors:
    """Gaussian noise of this part of every tensor's standard deviation."""
    generator = torch.Generator().manual_seed(6)
    return {
        name: tensor
        + sigma * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def other_head(tensors: Tensors) -> Tensors:
    """Seven other classes."""
    head = {"classifier.weight": torch.randn(7, HIDDEN), "classifier.bias": torch.zeros(7)}
    return tensors | head


def without_prefix(tensors: Tensors) -> Tensors:
    """The base model: no prefix, no head."""
    return {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("vit.")}


# As users run it --------------------------------------------------------------------------------

# The default patience waits 7.5 seconds in all before it gives up, and 10 seconds for every answer.
QUICK = "first_wait=0.01, timeout=2.0"
_IMPATIENT = (
    "import functools, hf_watermark.hub as hub;"
    "hub.Patience = functools.partial(hub.Patience, {});"
    "from hf_watermark.cli import verify_hub_model; verify_hub_model()"
)


def command(*arguments: object, patience: str | None = None) -> list[str]:
    """`verify_hub_model ...`, as a list; with another patience for a failing server."""
    program = [str(BIN / "verify_hub_model")]
    if patience is not None:
        program = [sys.executable, "-c", _IMPATIENT.format(patience)]
    return [*program, *map(str, arguments)]


def run(
    *arguments: object,
    hub=None,
    token: str | None = None,
    patience: str | None = None,
    program: list[str] | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
):
    """Run `verify_hub_model`, or another program, in a process of its own, without a terminal.

    It runs the package that the tests import, whichever one is installed.
    """
    variables = {"PATH": str(BIN), "HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = ROOT
    if hub is not None:
        variables |= hub.environment(token)
    return subprocess.run(
        [*(program or command(patience=patience)), *map(str, arguments)],
        env=variables | dict(environment or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(done, *words: str, stdout: str = "", advice: bool = True) -> str:
    """Check that a command kept the contract of exit status 2; its line.

    Args:
        done: The command's outcome.
        words: What the line must hold.
        stdout: What was printed before.
        advice: Whether it says what to do, beyond what is wrong.
    """
    line = done.stderr
    assert done.returncode == 2, (done.returncode, line, done.stdout)
    assert done.stdout == stdout
    assert line.endswith("\n")
    assert line.count("\n") == 1, line
    assert line.startswith("error: ")
    assert "Traceback" not in line
    assert "Unexpected" not in line
    assert not advice or re.search(r"[.] [A-Z]", line), f"it does not say what to do: {line}"
    for word in words:
        assert word in line, line
    return line


def evidence_of(done) -> dict:
    """The JSON that a command printed."""
    assert done.stdout.count("\n") == 1, (done.stdout, done.stderr)
    return json.loads(done.stdout)
