"""Does one rule serve every image classifier of transformers, and heads beyond classification?

Each architecture of the auto mapping is built small (its own code, sizes shrunk) and trained for a
few steps twice: with the default mark, and without; the latter is then marked on disk without data.
Both marks must be found with the key alone and load with plain `from_pretrained`; the second may
differ from its source in the carriers' bytes only. Nothing must be found in the unmarked one, nor
with another key. Models for detection, segmentation and the like are examined the same way.

    python benchmarks/architectures.py --out benchmarks/results/architectures.json
    python benchmarks/architectures.py --only ViT ResNet
    python benchmarks/architectures.py --table benchmarks/results/architectures.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModelForImageClassification, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_watermark import OwnerKey, Scheme
from hf_watermark.carriers import choose_carriers
from hf_watermark.checkpoint import Checkpoint
from hf_watermark.direct import embed_checkpoint
from hf_watermark.embedding import Measurement, WatermarkLoss
from hf_watermark.evidence import CLAIM_FILE
from hf_watermark.files import FolderFiles
from hf_watermark.verify import verify_hub_model

STEPS = 30  # of training
HEAD_STEPS = 10  # of training a head beyond classification
BATCH = 10  # images a step
ANSWERED = 50  # images that the marked and the unmarked model are compared on
LABELS = 10

Sizes = dict[str, Any]

_BLOCKS: Sizes = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}
_PLAIN: Sizes = {**_BLOCKS, "image_size": 32, "patch_size": 8}
_SWIN: Sizes = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
    "window_size": 4,
}
_PYRAMID: Sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 32, 64, 96]}
_CONVNEXT: Sizes = {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 48, 64, 96]}
_MIT: Sizes = {  # the encoder of SegFormer and GLPN
    "hidden_sizes": [16, 32, 64, 96],
    "num_attention_heads": [1, 2, 4, 8],
}
_PERCEIVER: Sizes = {
    "num_latents": 16,
    "d_latents": 192,
    "num_self_attends_per_block": 4,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "image_size": 16,
}
_TEXT: Sizes = {**_BLOCKS, "vocab_size": 99, "max_position_embeddings": 16}
_TOWERS: Sizes = {"text_config": _TEXT, "vision_config": _PLAIN}
_GEMMA_TEXT: Sizes = {
    **_BLOCKS,
    "head_dim": 24,
    "num_key_value_heads": 2,
    "vocab_size": 11_008,  # its classes are the tokens 10784 and 3771
    "max_position_embeddings": 64,
}
_IMAGE_TOKEN = 11_000

# What makes each architecture small, by its config or else by its label; the rest is its default.
SMALL: dict[str, Sizes] = {
    "Beit": _PLAIN,
    "Bit": {"embedding_size": 32, "hidden_sizes": [128, 128, 256, 256], "depths": [1, 1, 1, 1]},
    "CLIP": {"vision_config": _PLAIN},
    "ConvNext": _CONVNEXT,
    "ConvNextV2": _CONVNEXT,
    # Depths of stage i must exceed i: the library takes the i-th drop path rate of stage i.
    "Cvt": {"embed_dim": [32, 64, 96], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "Data2VecVision": _PLAIN,
    "DeiT": _PLAIN,
    "Dinat": {},
    "Dinov2": _PLAIN,
    "Dinov2WithRegisters": _PLAIN,
    "DonutSwin": _SWIN,
    "EfficientNet": {
        "width_coefficient": 0.5,
        "depth_coefficient": 0.3,
        "hidden_dim": 640,
        "initializer_range": 0.3,
    },
    "FocalNet": {
        "image_size": 64,
        "embed_dim": 32,
        "depths": [1, 1, 2],
        "hidden_sizes": [32, 64, 128],
        "focal_levels": [2, 2, 2],
        "focal_windows": [3, 3, 3],
    },
    "HGNetV2": {
        "stem_channels": [3, 16, 24],
        "stage_in_channels": [24, 32, 64, 128],
        "stage_mid_channels": [24, 32, 64, 64],
        "stage_out_channels": [32, 64, 128, 192],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
        "embedding_size": 24,
        "hidden_sizes": [32, 64, 128, 192],
        "depths": [1, 1, 2, 1],
    },
    "Hiera": {
        "image_size": [64, 64],
        "embed_dim": 32,
        "depths": [1, 1, 2],
        "num_heads": [1, 2, 4],
        "num_query_pool": 2,
        "masked_unit_attention": [True, True, False],
    },
    "IJepa": _PLAIN,
    "ImageGPT": {"n_embd": 96, "n_layer": 4, "n_head": 4, "vocab_size": 257, "n_positions": 64},
    "Levit": {
        "image_size": 64,
        "hidden_sizes": [64, 96, 128],
        "num_attention_heads": [2, 3, 4],
        "depths": [2, 2, 2],
    },
    "MetaClip2": {"vision_config": _PLAIN},
    "MobileNetV1": {"depth_multiplier": 0.5, "classifier_dropout_prob": 0.1},
    "MobileNetV2": {"depth_multiplier": 0.5},
    "MobileViT": {
        "image_size": 64,
        "hidden_sizes": [48, 64, 80],
        "initializer_range": 0.06,
        "neck_hidden_sizes": [16, 16, 24, 32, 48, 64, 192],
    },
    "MobileViTV2": {"image_size": 64, "width_multiplier": 0.5},
    "PerceiverConvProcessing": {**_PERCEIVER, "d_model": 322},
    "PerceiverFourier": {**_PERCEIVER, "d_model": 261},
    "PerceiverLearned": {**_PERCEIVER, "d_model": 512},
    "PoolFormer": _PYRAMID,
    "PPLCNet": {},
    "Pvt": {**_PYRAMID, "image_size": 64, "num_attention_heads": [1, 2, 4, 8]},
    "PvtV2": {**_PYRAMID, "image_size": 64, "num_attention_heads": [1, 2, 4, 8]},
    "RegNet": {
        "hidden_sizes": [32, 64, 96, 192],
        "depths": [1, 2, 2, 2],
        "groups_width": 16,
    },
    "ResNet": {"embedding_size": 32, "hidden_sizes": [64, 64, 128, 256], "depths": [1, 1, 2, 2]},
    "Segformer": _MIT,
    "ShieldGemma2": {
        "text_config": _GEMMA_TEXT,
        "vision_config": _PLAIN,
        "mm_tokens_per_image": 4,
        "image_token_index": _IMAGE_TOKEN,
    },
    "Siglip": {"vision_config": _PLAIN},
    "Siglip2": {"vision_config": {**_BLOCKS, "patch_size": 8, "num_patches": 16}},
    "SwiftFormer": {"depths": [1, 1, 2, 1], "embed_dims": [24, 32, 64, 96]},
    "Swin": _SWIN,
    "Swinv2": _SWIN,
    "TextNet": {"hidden_sizes": [16, 16, 32, 48, 64], "stem_out_channels": 16},
    "TimmWrapper": {},
    "ViT": _PLAIN,
    "ViTMSN": _PLAIN,
}

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_DETR: Sizes = {
    "d_model": 64,
    "num_queries": 10,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
}
_MASKS: Sizes = {
    "hidden_dim": 64,
    "feature_size": 64,
    "mask_feature_size": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "encoder_feedforward_dim": 128,
    "dim_feedforward": 256,
    "num_queries": 10,
}


def _backbone(kind: str, sizes: Sizes, stages: list[str]) -> Sizes:
    return {"backbone_config": {"model_type": kind, **sizes, "out_features": stages}}


# Heads beyond classification: class -> its config and what makes it small.
HEADS: dict[str, tuple[str, Sizes]] = {
    "BeitForSemanticSegmentation": (
        "BeitConfig",
        {**_PLAIN, "out_indices": [1, 2, 3, 4]},
    ),
    "CLIPModel": ("CLIPConfig", _TOWERS),
    "DetrForObjectDetection": (
        "DetrConfig",
        {**_DETR, **_backbone("resnet", SMALL["ResNet"], ["stage4"])},
    ),
    "DPTForDepthEstimation": (
        "DPTConfig",
        {
            **_PLAIN,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 32, 48, 64],
            "fusion_hidden_size": 32,
        },
    ),
    "GLPNForDepthEstimation": ("GLPNConfig", {**_MIT, "decoder_hidden_size": 32}),
    "Mask2FormerForUniversalSegmentation": (
        "Mask2FormerConfig",
        {
            **_MASKS,
            **_backbone(
                "swin", {**_SWIN, "depths": [1, 1, 2, 1], "num_heads": [2, 4, 8, 8]}, _STAGES
            ),
        },
    ),
    "MobileNetV2ForSemanticSegmentation": ("MobileNetV2Config", SMALL["MobileNetV2"]),
    "OwlViTForObjectDetection": (
        "OwlViTConfig",
        {**_TOWERS, "projection_dim": 96},
    ),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {**_MIT, "decoder_hidden_size": 64}),
    "Siglip2Model": ("Siglip2Config", {**SMALL["Siglip2"], "text_config": _TEXT}),
    "SiglipModel": ("SiglipConfig", _TOWERS),
    "Swin2SRForImageSuperResolution": (
        "Swin2SRConfig",
        {"image_size": 16, "embed_dim": 64, "depths": [2, 2], "num_heads": [4, 4]},
    ),
    "UperNetForSemanticSegmentation": (
        "UperNetConfig",
        {
            "hidden_size": 32,
            "auxiliary_channels": 32,
            "auxiliary_in_channels": 64,
            "pool_scales": [1, 2],
            **_backbone("convnext", _CONVNEXT, _STAGES),
        },
    ),
    "ViltForQuestionAnswering": ("ViltConfig", {**_PLAIN, "vocab_size": 99}),
    "ViTMAEForPreTraining": (
        "ViTMAEConfig",
        {
            **_PLAIN,
            "decoder_hidden_size": 64,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 128,
            "mask_ratio": 0.0,
        },
    ),
    "YolosForObjectDetection": (
        "YolosConfig",
        {**_PLAIN, "image_size": [64, 64], "num_detection_tokens": 10},
    ),
}


class NotInstalledError(Exception):
    """An architecture needs a library that is not here: the one reason to skip it."""


@dataclass(frozen=True)
class Architecture:
    """One class of transformers and what makes it small."""

    label: str
    model_class: Any
    config_class: Any
    sizes: Sizes
    classifies: bool = True
    auto: bool = False  # whether the auto class leads to it

    def build(self, seed: int) -> Any:
        """The model with the weights it starts with.

        Raises:
            NotInstalledError: If it needs a library that is not installed.
        """
        set_seed(seed)
        config = self.config_class(**self.sizes)
        config.num_labels = LABELS
        try:
            return self.model_class(config)
        except ImportError as error:
            raise NotInstalledError(" ".join(str(error).split()).split(". ")[0]) from None


def classifiers() -> Iterator[Architecture]:
    """Every class of the auto mapping."""
    for config_class, classes in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items():
        classes = classes if isinstance(classes, tuple) else (classes,)
        for model_class in classes:
            label = model_class.__name__.replace("ForImageClassification", "")
            sizes = SMALL.get(label)
            if sizes is None:
                sizes = SMALL[config_class.__name__.removesuffix("Config")]
            auto = model_class is classes[0]
            yield Architecture(label, model_class, config_class, sizes, auto=auto)


def heads() -> Iterator[Architecture]:
    """Detection, segmentation, depth, restoration and vision with text."""
    for name, (config_name, sizes) in HEADS.items():
        model_class, config_class = getattr(transformers, name), getattr(transformers, config_name)
        yield Architecture(name, model_class, config_class, sizes, classifies=False)


def patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """(n, 3, H, W) -> (n, patches, 3 size^2), as processors of packed images do it."""
    columns = torch.nn.functional.unfold(images, kernel_size=size, stride=size)
    return columns.transpose(1, 2)


def images(count: int, side: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten kinds of coloured quarters under noise, (count, 3, side, side), and which is which."""
    quarters = torch.randn(LABELS, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % LABELS
    noise = torch.randn(count, 3, side, side, generator=generator)
    return torch.nn.functional.interpolate(quarters[labels], side) + noise, labels


def inputs(model: Any, count: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Images, in the form that the architecture takes, with texts where it reads them; labels."""
    config, name = model.config, type(model).__name__
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None) or (32 if name.startswith("Siglip2") else 64)
    side = min(side if isinstance(side, int) else side[0], 64)
    if name.startswith("ImageGPT"):
        side = 8
    pixels, labels = images(count, side, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    given = {"pixel_values": pixels}
    if name.startswith("ImageGPT"):  # reads a palette's colours one by one
        levels = ((pixels.clamp(-2, 2) + 2) * 1.25).round().long()  # 6 of each colour
        return {
            "input_ids": (levels[:, 0] * 36 + levels[:, 1] * 6 + levels[:, 2]).flatten(1)
        }, labels
    if name.startswith("Perceiver"):
        given = {"inputs": pixels}
    elif name.startswith("Siglip2"):
        packed = patches(pixels, vision.patch_size)
        grid = side // vision.patch_size
        given = {
            "pixel_values": packed,
            "pixel_attention_mask": torch.ones(packed.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([[grid, grid]] * count),
        }
    elif name.startswith("ViTMAE"):  # else it masks other patches each time
        given["noise"] = torch.rand(count, (side // config.patch_size) ** 2, generator=generator)
    if name.startswith("ShieldGemma2"):
        words = torch.randint(0, 1000, (count, 8), generator=generator)
        image = torch.full((count, config.mm_tokens_per_image), _IMAGE_TOKEN)
        given["input_ids"] = torch.cat([image, words], dim=1)
        given["token_type_ids"] = (given["input_ids"] == _IMAGE_TOKEN).long()
        labels = labels % 2
    elif name in HEADS and ("text_config" in HEADS[name][1] or "vocab_size" in HEADS[name][1]):
        given["input_ids"] = torch.randint(1, 99, (count, 8), generator=generator)
    return given, labels


_ANSWERS = (  # what a head says, by the names that outputs have for it
    "logits",
    "logits_per_image",
    "predicted_depth",
    "masks_queries_logits",
    "reconstruction",
    "last_hidden_state",  # PP-LCNet's logits
)


def answer(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """(n, K), or as the head shapes it."""
    output = model(**given)
    return next(output[name] for name in _ANSWERS if name in output).float()


@torch.no_grad()
def answers(model: Any) -> torch.Tensor:
    """What the model says about the same images each time."""
    given, _ = inputs(model.eval(), ANSWERED, seed=1)
    return answer(model, given)


def accuracy(model: Any, said: torch.Tensor) -> float:
    """The part of `answers` that names the right kind."""
    labels = inputs(model, ANSWERED, seed=1)[1]
    return _rounded(float((said.argmax(-1) == labels).float().mean()))


def calibrate(model: Any) -> None:
    """Running statistics of what the model sees: averages over a few steps lag behind it."""
    norms = [m for m in model.eval().modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the plain average
    with torch.no_grad():
        answer(model, inputs(model, ANSWERED, seed=2)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def loss_of(said: torch.Tensor, labels: torch.Tensor, classifies: bool) -> torch.Tensor:
    """Of a classifier, cross entropy; any other head learns an arbitrary answer to every kind."""
    if classifies:
        return torch.nn.functional.cross_entropy(said, labels)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(LABELS, *said.shape[1:], generator=generator)
    return torch.nn.functional.mse_loss(said, targets[labels])


def train(
    model: Any, key: OwnerKey | None, *, classifies: bool = True, seed: int = 0
) -> Measurement | None:
    """A few steps of AdamW, marked unless the key is None; how the mark stands then."""
    steps = STEPS if classifies else HEAD_STEPS
    set_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    model.train()
    watermark = WatermarkLoss(model, key) if key is not None else None
    for step in range(steps):
        given, labels = inputs(model, BATCH, seed=100 + step)
        loss = loss_of(answer(model, given), labels, classifies)
        (loss if watermark is None else watermark(loss)).backward()
        optimizer.step()
        decay.step()
        if watermark is not None:
            watermark.step()
        optimizer.zero_grad()
    calibrate(model)
    if watermark is None:
        return None
    watermark.detach()
    return watermark.measure()


def same_outside(source: Path, marked: Path, carriers: list[str]) -> bool:
    """Whether the two folders differ in nothing but the carriers' bytes and the claim."""
    old = Checkpoint.open(FolderFiles(source))
    if {p.name for p in marked.iterdir()} - {CLAIM_FILE} != {p.name for p in source.iterdir()}:
        return False
    for path in source.iterdir():
        a, b = bytearray(path.read_bytes()), bytearray((marked / path.name).read_bytes())
        for name in carriers:
            span = old.tensors[name]
            if span.file == path.name:
                zeros = bytes(span.stop - span.start)
                a[span.start : span.stop] = b[span.start : span.stop] = zeros
        if a != b:
            return False
    return True


def reloaded(architecture: Architecture, folder: Path) -> tuple[Any, bool]:
    """The model as plain transformers loads it, and whether every weight was found and wanted."""
    loader = AutoModelForImageClassification if architecture.auto else architecture.model_class
    model, report = loader.from_pretrained(folder, output_loading_info=True)
    return model, type(model) is architecture.model_class and not any(report.values())


def verdict(folder: Path, key: OwnerKey) -> dict[str, Any]:
    """What a verifier finds without a claim; log10 p of all carriers, corrected for the tries."""
    (folder / CLAIM_FILE).unlink(missing_ok=True)
    evidence = verify_hub_model(folder, key, read="all")
    return {
        "verdict": verify_hub_model(folder, key).verdict,
        "log10_p": _rounded(evidence.log10_p),
        "matched": evidence.matched,
    }


def _rounded(value: float) -> float:
    """Four digits, so that the record does not change with the last bits of a sum."""
    return float(f"{value:.4g}")


def examine(architecture: Architecture, key: OwnerKey, *, seed: int = 0) -> dict[str, Any]:
    """Build, train with the mark and without, mark on disk, verify, reload; a row of the table.

    Args:
        architecture: What to build.
        key: The owner's.
        seed: Of the weights and of the training.

    Raises:
        NotInstalledError: If the architecture needs a library that is not installed.
    """
    unmarked, model = architecture.build(seed), architecture.build(seed)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        plain, trained, direct = (Path(folder) / name for name in ("plain", "trained", "direct"))
        train(unmarked, None, classifies=architecture.classifies, seed=seed)
        before = answers(unmarked)
        unmarked.save_pretrained(plain)
        done = embed_checkpoint(plain, key, direct)
        carriers = [claimed.carrier for claimed in done.claim.carriers]
        names = [carrier.name for carrier in carriers]
        of_module = choose_carriers({n: tuple(p.shape) for n, p in model.named_parameters()})
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        row |= {
            "carriers": len(carriers),
            "first_carrier": names[0],
            # transformers saves under other names: do they lead to the same layers?
            "same_in_module": [c.shape for c in of_module] == [c.shape for c in carriers],
            "frozen": sum(carrier.name not in trainable for carrier in of_module),
            "columns": sum(carrier.columns for carrier in carriers),
            "weights": sum(carrier.weights for carrier in carriers),
            "bits": Scheme.from_name(done.claim.scheme).bits,
            "unmarked": {"verdict": verify_hub_model(plain, key).verdict},
            "direct": {
                "scheme": done.claim.scheme,
                "margin": _rounded(done.margin),
                "largest_change": _rounded(done.largest_change),
                "same_outside_carriers": same_outside(plain, direct, names),
                "with_claim": verify_hub_model(direct, key).verdict,
                "another_key": verify_hub_model(direct, key.for_recipient("another")).verdict,
                **verdict(direct, key),
            },
        }
        marked, loads = reloaded(architecture, direct)
        after = answers(marked)
        row["direct"] |= {
            "reloads": loads,
            "logit_change": _rounded(float((after - before).norm() / before.norm())),
        }
        standing = train(model, key, classifies=architecture.classifies, seed=seed)
        said = answers(model)
        model.save_pretrained(trained)
        again, loads = reloaded(architecture, trained)
        row["trained"] = {
            "scheme": Scheme().name,
            "margin": _rounded(standing.margin),
            "reloads": loads and torch.allclose(answers(again), said, rtol=1e-3, atol=1e-4),
            **verdict(trained, key),
        }
        if architecture.classifies:
            for part, logits in (("unmarked", before), ("direct", after), ("trained", said)):
                row[part]["accuracy"] = accuracy(model, logits)
            same = (after.argmax(-1) == before.argmax(-1)).float().mean()
            row["direct"]["same_top1"] = _rounded(float(same))
    return row


def good(row: dict[str, Any]) -> bool:
    """Whether everything that was tried held."""
    if "direct" not in row:
        return False
    direct, trained = row["direct"], row["trained"]
    return (
        direct["verdict"] == direct["with_claim"] == trained["verdict"] == "found"
        and direct["reloads"]
        and trained["reloads"]
        and direct["same_outside_carriers"]
        and row["unmarked"]["verdict"] == direct["another_key"] == "not found"
    )


def survey(architectures: Iterator[Architecture], key: OwnerKey, *, seed: int) -> dict[str, Any]:
    """A row for each; what cannot be built is skipped, everything else that breaks has failed."""
    rows: dict[str, Any] = {}
    for architecture in architectures:
        started = time.perf_counter()
        try:
            row = examine(architecture, key, seed=seed)
        except NotInstalledError as error:
            row = {"skipped": str(error)}
        except Exception as error:  # one that breaks must not hide the others
            row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        rows[architecture.label] = row
        said = "good" if good(row) else row.get("skipped") or row.get("failed") or json.dumps(row)
        seconds = time.perf_counter() - started
        print(f"{architecture.label}: {said} ({seconds:.1f} s)", file=sys.stderr)
    return rows


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": len(rows),
        "good": sum(good(row) for row in rows.values()),
        "failed": [k for k, row in rows.items() if not good(row) and "skipped" not in row],
        "skipped": [k for k, row in rows.items() if "skipped" in row],
    }


def table(record: dict[str, Any]) -> str:
    """Both surveys as one Markdown table, with what was left out and why."""
    head = (
        "architecture",
        "carriers, the first of them",
        "M",
        "N",
        "log10 p, trained",
        "log10 p, on disk",
        "dW on disk",
        "logits on disk",
        "same top-1",
        "accuracy: unmarked, trained, on disk",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    left = []
    rows = record["classifiers"] | record["heads"]
    for label, row in rows.items():
        if "direct" not in row:
            left.append(f"{label}: {row.get('skipped') or 'failed, ' + row['failed']}")
            continue
        direct, trained = row["direct"], row["trained"]
        accuracies = [one.get("accuracy") for one in (row["unmarked"], trained, direct)]
        cells = (
            label if good(row) else f"**{label}: failed**",
            f"{row['carriers']}, `{_short(row['first_carrier'])}`",
            f"{row['columns']:,}",
            f"{row['weights']:,}",
            f"{trained['log10_p']:.0f}",
            f"{direct['log10_p']:.0f}",
            f"{100 * direct['largest_change']:.1f}%",
            f"{100 * direct['logit_change']:.1f}%",
            f"{100 * direct['same_top1']:.0f}%" if "same_top1" in direct else "",
            ", ".join(f"{100 * one:.0f}%" for one in accuracies if one is not None),
        )
        lines.append(f"| {' | '.join(cells)} |")
    settings = record["settings"]
    notes = [
        f"M columns, N weights, T = {settings['bits']} bits; transformers "
        f"{settings['transformers']}; {settings['steps']} steps of training from random weights "
        f"({settings['head_steps']} for heads beyond classification); answers to "
        f"{settings['images']} images.",
        "Every row that does not say failed was found with the key alone both ways, was not found "
        "unmarked or with another key, loads with `from_pretrained`, and marking it on disk left "
        "every byte outside the carriers as it was.",
        *(
            f"{label}: transformers freezes {row['frozen']} of {row['carriers']} carriers; they "
            "stay as they were, and the others carry their share."
            for label, row in rows.items()
            if row.get("frozen")
        ),
        *(
            f"{label}: the module's names lead to other layers than the checkpoint's do; the mark "
            "of training was found in those that both name."
            for label, row in rows.items()
            if not row.get("same_in_module", True)
        ),
        *(f"Left out: {line}." for line in left),
    ]
    return "\n\n".join(["\n".join(lines), *notes])


def _short(name: str) -> str:
    """A tensor's name from its first numbered part on."""
    found = re.search(r"[^.]+\.\d+\..*", name)
    return (found[0] if found else name).removesuffix(".weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="labels, such as ViT or CLIPModel")
    parser.add_argument("--seed", type=int, default=0, help="of the key and of the weights")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print this record as a table, and do no more")
    options = parser.parse_args()
    if options.table is not None:
        print(table(json.loads(options.table.read_text())))
        return
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums in the same order everywhere
    key = OwnerKey(options.seed.to_bytes(32, "big"), "benchmark")

    def wanted(architectures: Iterator[Architecture]) -> Iterator[Architecture]:
        return (a for a in architectures if not options.only or a.label in options.only)

    rows = {
        "classifiers": survey(wanted(classifiers()), key, seed=options.seed),
        "heads": survey(wanted(heads()), key, seed=options.seed),
    }
    record = {
        "question": "Does one rule serve every image classifier of transformers?",
        "settings": {
            "seed": options.seed,
            "steps": STEPS,
            "head_steps": HEAD_STEPS,
            "batch": BATCH,
            "images": ANSWERED,
            "bits": Scheme().bits,
            "scheme": Scheme().name,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "summary": {name: summary(found) for name, found in rows.items()},
        **rows,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["summary"], indent=2))
    sys.exit(any(found["failed"] for found in record["summary"].values()))


if __name__ == "__main__":
    main()
