"""One training run per scenario in every process of a group; run by test_sharding.py.

python -m torch.distributed.run --nproc_per_node 2 tests/sharded_training.py FOLDER SCENARIO ...

A scenario is HOW/ROWS/CARRIERS/OPTIMIZER/SCHEME, such as
fsdp2/257/default/sgd/spread-random-32-projection-auto-soft; the carriers `both` are fc1 and fc2,
and with `frozen` the first block's fc1 does not train.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import ViTConfig, ViTForImageClassification

from hf_watermark import OwnerKey, Scheme
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.extraction import Extraction
from hf_watermark.projections import Projection

KEY = OwnerKey(bytes(range(32)), owner="acme")
LAYERS, BATCH, STEPS = 3, 16, 12


def vit(rows: int) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=64,
        intermediate_size=rows,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_labels=4,
        attn_implementation="eager",
    )
    return ViTForImageClassification(config).train()


def spread_out(model: ViTForImageClassification, how: str, world: int) -> nn.Module:
    """The model as training wraps it."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "tensor":
        mesh = init_device_mesh("cpu", (world,))
        plan = {
            f"vit.layers.{i}.mlp.{name}": style
            for i in range(LAYERS)
            for name, style in (("fc1", ColwiseParallel()), ("fc2", RowwiseParallel()))
        }
        return parallelize_module(model, mesh, plan)
    if how in ("fsdp2", "hybrid", "root", "midway"):
        mesh = init_device_mesh("cpu", (world,))
        if how == "hybrid":
            mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
        for layer in [] if how == "root" else model.vit.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    assert how == "alone", how
    return model


def zero_engine(model: nn.Module, how: str, optimizer: torch.optim.Optimizer) -> nn.Module:
    """A DeepSpeed engine: zero1, zero2, zero3 and zero3whole, which keeps small weights whole."""
    import deepspeed

    # It would be compiled first, for sums that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stage: dict[str, object] = {"stage": int(how[4])}
    if how == "zero3":
        stage["stage3_param_persistence_threshold"] = 0
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": how.endswith("bf16")},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def whole(parameter: torch.Tensor) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    parameter = parameter.detach()
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).clone()


def run(scenario: str) -> dict[str, object]:
    how, rows, which, optimizer, name = scenario.split("/")
    model, scheme = vit(int(rows)), Scheme.from_name(name)
    rank, world = (dist.get_rank(), dist.get_world_size()) if how != "alone" else (0, 1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, BATCH, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 4, (STEPS, BATCH), generator=generator)
    share = slice(None)
    if how not in ("alone", "tensor"):
        share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    both = [f"vit.layers.{i}.mlp.{fc}.weight" for i in range(LAYERS) for fc in ("fc1", "fc2")]
    settings = {"carriers": both} if which == "both" else {}
    if which == "frozen":
        model.vit.layers[0].mlp.fc1.weight.requires_grad_(False)
    early = WatermarkLoss(model, KEY, scheme, **settings) if how == "midway" else None
    zero = how.startswith("zero")
    wrapped = model if zero else spread_out(model, how, world)
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    chosen = kinds[optimizer](
        [p for p in wrapped.parameters() if p.requires_grad],
        lr=0.02 if optimizer == "sgd" else 1e-4,
    )
    if zero:
        wrapped = zero_engine(model, how, chosen)
        images = images.to(next(p for p in model.parameters()).dtype)
    watermark = early or WatermarkLoss(wrapped, KEY, scheme, **settings)
    margins = []
    for x, y in zip(images, labels, strict=True):
        loss = wrapped(pixel_values=x[share], labels=y[share]).loss
        if zero:
            wrapped.backward(watermark(loss))
            wrapped.step()
        else:
            watermark(loss).backward()
            chosen.step()
            chosen.zero_grad()
        watermark.step()
        margins.append(watermark.measure().margin)
    wrapped.eval()
    with torch.no_grad():  # leaves whole parameters behind where the outermost module is sharded
        logits = wrapped(pixel_values=images[0]).logits
    watermark.project()
    measured, reading = watermark.measure(), watermark.read()
    shard = model.get_parameter("vit.layers.0.mlp.fc1.weight")
    local = tuple(shard.to_local().shape) if hasattr(shard, "to_local") else tuple(shard.shape)
    weights = {name: whole(parameter) for name, parameter in model.named_parameters()}
    seal = watermark.seal()
    sealed = watermark.measure().margin
    soft = None
    if seal is not None:
        key, carriers = KEY.sealed(seal.nonce), watermark.carriers
        extraction = Extraction(Projection(key, Scheme.from_name(seal.scheme), carriers))
        for i, weight in enumerate(watermark.weights()):
            extraction.add(i, 0, weight.float().numpy())
        soft = extraction.reading().soft
    watermark.detach()
    print(f"rank {rank} of {world}: {scenario}, holds {list(local)} of fc1", file=sys.stderr)
    return {
        "weights": weights,
        "seal": (seal, soft, sealed),
        "carriers": [carrier.name for carrier in watermark.carriers],
        "logits": logits,
        "measured": measured,
        "margins": margins,
        "bits": (reading.matched, reading.bits),
        "log10_p": reading.log10_p,
        "local": local,
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, scenarios = Path(sys.argv[1]), sys.argv[2:]
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for scenario in scenarios:
        result = run(scenario)
        torch.save(result, folder / f"{scenario.replace('/', '_')}.{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
