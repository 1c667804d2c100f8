"""The same training in one process and in several: DDP, FSDP2, tensor parallelism, ZeRO."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trainer import KEY
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_watermark.carriers import Carrier
from hf_watermark.errors import ShardedParameterError
from hf_watermark.parts import part_of, sum_of_parts
from hf_watermark.verify import verify_hub_model

WORKER = Path(__file__).with_name("sharded_training.py")
DEFAULT = "spread-random-32-projection-auto-soft"
HINGE = "spread-random-32-hinge@0.3-auto-soft"
BCE = "spread-random-32-bce@0.3-auto-soft"
MEAN = "mean-random-32-projection-auto-soft"
UCHIDA = "mean-random-32-bce@3.0-auto-soft"


def trained(folder: Path, processes: int, scenarios: list[str]) -> tuple[list[list[dict]], str]:
    """What every process has in the end, by scenario, and what all of them said."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(WORKER.parents[1]),
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), WORKER, folder, *scenarios],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [
        [
            torch.load(folder / f"{name.replace('/', '_')}.{rank}.pt", weights_only=False)
            for rank in range(processes)
        ]
        for name in scenarios
    ]
    return results, done.stderr


def assert_sealed(ranks: list[dict], scenario: str) -> None:
    """By one key in all processes, beside the mark."""
    assert all(result["seal"] == ranks[0]["seal"] for result in ranks), scenario
    seal, soft, margin = ranks[0]["seal"]
    if "/both/" in scenario:  # nothing but carriers would tell which hidden unit is which
        assert seal is None, scenario
        return
    assert soft > 9.0, scenario
    assert margin >= (0.99 if "projection" in scenario else 0.8) * ranks[0]["measured"].margin


def assert_same(alone: dict, other: dict, scenario: str) -> None:
    assert other["carriers"] == alone["carriers"], scenario
    assert other["bits"] == alone["bits"] == (32, 32), scenario
    for name in alone["carriers"]:
        one, two = alone["weights"][name], other["weights"][name]
        assert float((one - two).norm() / one.norm()) <= 1e-5, (scenario, name)
    assert other["log10_p"] == pytest.approx(alone["log10_p"], rel=1e-4), scenario
    torch.testing.assert_close(other["logits"], alone["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_two_processes_as_one(tmp_path):
    """257 rows: the first process holds 129 of them, the other 128. All in one start of each."""
    uneven = [f"257/default/sgd/{scheme}" for scheme in (DEFAULT, HINGE, BCE, MEAN, UCHIDA)]
    even = f"256/default/adamw/{DEFAULT}"
    columns = [f"256/both/sgd/{scheme}" for scheme in (DEFAULT, HINGE, MEAN)]
    runs = {run: ["ddp", "fsdp2"] for run in (*uneven, even)} | {run: ["tensor"] for run in columns}
    runs[uneven[0]] += ["root", "midway"]
    runs[f"257/frozen/sgd/{DEFAULT}"] = ["fsdp2"]
    alone, _ = trained(tmp_path, 1, [f"alone/{run}" for run in runs])
    scenarios = [f"{how}/{run}" for run, hows in runs.items() for how in hows]
    results, said = trained(tmp_path, 2, scenarios)
    expected = dict(zip(runs, alone, strict=True))
    for scenario, ranks in zip(scenarios, results, strict=True):
        how, run = scenario.split("/", 1)
        rows = int(run.split("/", 1)[0])
        assert_sealed(ranks, scenario)
        for rank, result in enumerate(ranks):
            assert_same(expected[run][0], result, scenario)
            held = rows if how == "ddp" else rows // 2 + rows % 2 * (1 - rank)
            assert result["local"] == (held, 64), scenario
            assert f"rank {rank} of 2: {scenario}, holds [{held}, 64]" in said


@pytest.mark.distributed
def test_zero_as_one_process(tmp_path):
    """DeepSpeed trains a master copy: a change that misses it is gone at the next step."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux alone")
    rows = {scheme: f"257/default/sgd/{scheme}" for scheme in (DEFAULT, HINGE, BCE, MEAN, UCHIDA)}
    runs = {
        rows[DEFAULT]: ["zero1", "zero2", "zero3", "zero3whole", "zero2bf16", "zero3bf16"],
        rows[HINGE]: ["zero2", "zero3", "zero3whole"],
        rows[BCE]: ["zero3"],
        rows[MEAN]: ["zero1", "zero3"],
        rows[UCHIDA]: ["zero3whole"],
        f"257/frozen/sgd/{DEFAULT}": ["zero2", "zero3"],
    }
    alone, _ = trained(tmp_path, 1, [f"alone/{run}" for run in runs])
    scenarios = [f"{how}/{run}" for run, hows in runs.items() for how in hows]
    results, said = trained(tmp_path, 2, scenarios)
    expected = dict(zip(runs, (one for (one,) in alone), strict=True))
    for scenario, ranks in zip(scenarios, results, strict=True):
        how, run = scenario.split("/", 1)
        assert_sealed(ranks, scenario)
        for rank, result in enumerate(ranks):
            assert f"rank {rank} of 2: {scenario}" in said
            if how.endswith("bf16"):
                assert result["bits"] == (32, 32), scenario
                assert result["measured"].margin >= 3.99, scenario
                assert result["log10_p"] == pytest.approx(expected[run]["log10_p"], rel=1e-2)
                continue
            assert_same(expected[run], result, scenario)
            assert result["margins"] == pytest.approx(expected[run]["margins"], rel=1e-3, abs=1e-3)


TRAINER = """
import json, sys
from pathlib import Path
import deepspeed, torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_trainer import *

folder, stage = Path(sys.argv[1]), int(sys.argv[3])
config = {
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0,
                          "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}
trainer = WatermarkTrainer(
    model=vit(), train_dataset=Images(), eval_dataset=Images(12), watermark_key=KEY,
    args=arguments(folder, deepspeed=config, max_steps=13, save_strategy="steps", save_steps=6,
                   eval_strategy="steps", eval_steps=6, per_device_train_batch_size=4),
)
trainer.train()
trainer.save_model()
report = {
    "world": torch.distributed.get_world_size(), "wrapped": type(trainer.model_wrapped).__name__,
    "margin": trainer.watermark.measure().margin,
    "logged": [e["watermark_margin"] for e in trainer.state.log_history if "loss" in e],
}
(folder / f"report-{torch.distributed.get_rank()}.json").write_text(json.dumps(report))
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_trainer_with_zero(tmp_path, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux alone")
    script = tmp_path / "script.py"
    script.write_text(TRAINER)
    here = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2", str(script), str(tmp_path), str(here), str(stage),
        ],
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]
    assert reports[0]["world"] == 2
    assert reports[0]["wrapped"] == "DeepSpeedEngine"
    assert reports[0]["margin"] >= 3.99
    # Projected at steps 1 and 11, and not thrown away in between.
    assert min(reports[0]["logged"]) > 2.0
    for folder in ("", "checkpoint-6", "checkpoint-12"):
        evidence = verify_hub_model(tmp_path / folder, KEY)
        assert (evidence.found, evidence.matched) == (True, 64)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_copies_of_two_shards(tmp_path):
    run = f"256/default/sgd/{DEFAULT}"
    ((alone,),), _ = trained(tmp_path, 1, [f"alone/{run}"])
    (ranks,), _ = trained(tmp_path, 4, [f"hybrid/{run}"])
    for result in ranks:
        assert_same(alone, result, "hybrid")
        assert result["local"] == (128, 64)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


class FourFold:
    """A mesh of four processes seen by one of them; only what parts ask is there."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def get_coordinate(self) -> list[int]:
        return [self._rank]

    def size(self, axis: int) -> int:
        return 4

    def get_group(self, axis: int) -> str:
        return "the four"


class Piece:
    """A parameter of which one process of four holds a chunk, as torch.chunk cuts it."""

    def __init__(self, whole: torch.Tensor, dim: int, rank: int) -> None:
        self.device_mesh, self.placements = FourFold(rank), (Shard(dim),)
        chunks = whole.chunk(4, dim)
        empty = whole.narrow(dim, 0, 0)
        self.local = chunks[rank] if rank < len(chunks) else empty

    def to_local(self) -> torch.Tensor:
        return self.local


class TestParts:
    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("size", [3, 8, 9, 10, 13])
    def test_every_weight_is_in_one_part(self, size, dim):
        shape = (size, 6, 3, 3) if dim == 0 else (6, size, 3, 3)
        whole = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape)
        carrier = Carrier("conv", shape)
        seen = torch.zeros(carrier.rows, carrier.columns)
        for rank in range(4):
            part = part_of(carrier, Piece(whole, dim, rank))
            assert part.groups == ("the four",)
            assert seen[part.rows, part.columns].shape == part.matrix().shape
            seen[part.rows, part.columns] += part.matrix()
        torch.testing.assert_close(seen, whole.reshape(carrier.rows, carrier.columns))

    def test_splits_that_are_no_blocks(self, group):
        carrier = Carrier("conv", (8, 8, 3, 3))
        tensor = distribute_tensor(torch.randn(8, 8, 3, 3), group, [Shard(2)])
        with pytest.raises(ShardedParameterError, match=r"'conv' is sharded in a way") as caught:
            part_of(carrier, nn.Parameter(tensor))
        assert "embed into the saved checkpoint" in str(caught.value)

    def test_copies_are_whole(self, group):
        tensor = distribute_tensor(torch.randn(8, 8), group, [Replicate()])
        part = part_of(Carrier("dense", (8, 8)), nn.Parameter(tensor))
        assert part.groups == ()
        assert part.matrix().shape == (8, 8)

    def test_the_gradient_stays_in_shards(self, group):
        model = fully_shard(nn.Sequential(nn.Linear(6, 9)), mesh=group)
        weight = model.get_parameter("0.weight")
        part = part_of(Carrier("0.weight", (9, 6)), weight)
        (total,) = sum_of_parts([part], [part.matrix().square().sum()])
        total.backward()
        assert isinstance(weight.grad, DTensor)
        assert weight.grad.placements == (Shard(0),)
        torch.testing.assert_close(weight.grad.full_tensor(), 2 * weight.detach().full_tensor())
