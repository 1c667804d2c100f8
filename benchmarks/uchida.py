"""The paper, reproduced: Uchida et al. 2017 on a wide residual network, in this library's terms.

WRN-10-4 on CIFAR-10, T bits in the second convolution of a group, SGD with Nesterov's momentum,
lambda .01: the experiments of Uchida, Nagai, Sakazawa, Satoh, "Embedding Watermarks into Deep
Neural Networks", ICMR 2017 (extended: Nagai et al., IJMIR 2018). Every mark is a `WatermarkLoss`
with `Scheme(statistic="mean", embedding="bce")`: lambda times the cross entropy *summed* over bits,
as in the authors' code, on z = X w with w the mean over output channels.

    matrices    the key matrices direct, diff and random: test error and embedding loss
    pruning     what pruning leaves of mark and accuracy
    situations  from scratch, fine-tuning, distilling, each beside an unmarked twin
    tuning      what fine-tuning without the key leaves of the mark
    capacity    how many bits fit into which group

Every trained model is kept in --cache, so that an interrupted run goes on.

    python benchmarks/uchida.py --long 24 --out benchmarks/results/uchida.json
    python benchmarks/uchida.py --train 640 --epochs 1 --test 200 --parts matrices pruning # a look
    python benchmarks/uchida.py --full --device cuda --out uchida_full.json     # the paper's size
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from embedding import load
from torch import Tensor, nn

from hf_watermark import OwnerKey, Scheme
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import ModelTooSmallError

PARTS = ("matrices", "pruning", "situations", "tuning", "capacity")
MATRICES = ("direct", "diff", "random")
LONG = "random, long"
GROUPS = ("conv2", "conv3", "conv4")
BATCH, RATE, MOMENTUM, DECAY = 64, 0.1, 0.9, 5e-4
DROPS, FACTOR = (0.3, 0.6, 0.8), 0.2  # the paper: after 60, 120 and 160 of 200 epochs
GENTLE = 0.02  # a rate for fine-tuning what is trained; the same drops
RATES = (0, 10, 20, 30, 40, 50, 60, 65, 70, 80, 90, 95)
FULL = {"train": 50_000, "test": 10_000, "epochs": 200, "size": 32}
# Written down from memory but for 8.04 (the authors' slides) and 65% (the abstract). The paper's
# embedding loss is a mean over bits (utility/calc_embed_loss.py of yu4u/dnn-watermark).
PAPER = {
    "source": "from memory; 8.04 also in the authors' slides, the 65% in the abstract",
    "matrices": {
        "none": {"test_error": 8.04},
        "direct": {"test_error": 8.21, "embedding_loss": 1.24e-1},
        "diff": {"test_error": 8.37, "embedding_loss": 6.20e-2},
        "random": {"test_error": 7.97, "embedding_loss": 4.76e-4},
    },
    "pruned_without_an_error": 65,
}


class Group(nn.Module):
    """A residual block of two convolutions, each after a norm and a ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        x = self.first_norm(x).relu()
        return self.shortcut(x) + self.second(self.second_norm(self.first(x)).relu())


class WideResNet(nn.Module):
    """WRN-10-k of Zagoruyko and Komodakis 2016: groups of one block each, of 16k, 32k and 64k.

    The authors' code normalises after the convolutions and leaves the shortcuts as they are; that
    diverged here at the rate of .1.
    """

    def __init__(self, k: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.conv2 = Group(16, 16 * k, 1)
        self.conv3 = Group(16 * k, 32 * k, 2)
        self.conv4 = Group(32 * k, 64 * k, 2)
        self.norm = nn.BatchNorm2d(64 * k)
        self.fc = nn.Linear(64 * k, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)  # the default of the authors' framework

    def forward(self, x: Tensor) -> Tensor:
        """Images, (n, 3, h, w), to logits, (n, classes)."""
        x = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return self.fc(self.norm(x).relu().mean(dim=(2, 3)))


def fresh(seed: int, device: str) -> WideResNet:
    torch.manual_seed(seed)
    return WideResNet().to(device, memory_format=torch.channels_last)


def key_of(seed: int) -> OwnerKey:
    return OwnerKey((17_000 + seed).to_bytes(32, "big"))


def mark(
    model: nn.Module, seed: int, matrix: str = "random", bits: int = 256, group: str = "conv2"
) -> WatermarkLoss:
    """The mark of the paper in one group, attached."""
    scheme = Scheme(statistic="mean", key_matrix=matrix, embedding="bce", bits=bits)
    return WatermarkLoss(model, key_of(seed), scheme, carriers=[f"{group}.second.weight"])


@torch.no_grad()
def standing(watermark: WatermarkLoss) -> dict[str, float]:
    """How the mark stands: the paper's E_R as a mean over bits, BER, and p as a verifier has it."""
    bits, weight = watermark.scheme.bits, watermark.scheme.weight
    assert weight is not None
    return {
        "embedding_loss": float(watermark.penalty()) / weight / bits,
        "ber": watermark.measure().ber,
        "log10_p": watermark.measure().log10_p,
    }


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flips, and shifts of up to 5/32 of the side, drawn for every image."""
    n, _, side, _ = images.shape
    reach = round(side * 5 / 32)
    padded = nn.functional.pad(images, (reach,) * 4)
    shift = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator)
    flip = torch.rand((n, 1), generator=generator) < 0.5
    along = torch.arange(side)[None]
    rows = (along + shift[0]).to(images.device)
    columns = (torch.where(flip, side - 1 - along, along) + shift[1]).to(images.device)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part.contiguous(memory_format=torch.channels_last))
                      for part in images.split(500)])  # fmt: skip


def test_error(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """In percent."""
    images, labels = data
    return 100 * float((logits_of(model, images).argmax(-1) != labels).double().mean())


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    epochs: int,
    seed: int,
    rate: float = RATE,
    watermark: WatermarkLoss | None = None,
) -> int | None:
    """Train on labels or probabilities; the step, to ten, after which every bit was right."""
    images, targets = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY
    )
    total = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [round(drop * total) for drop in DROPS], FACTOR
    )
    model.train()
    step, complete = 0, None
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            logits = model(augmented(images[batch.to(images.device)], generator))
            loss = nn.functional.cross_entropy(logits, targets[batch.to(targets.device)])
            (loss if watermark is None else watermark(loss)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if watermark is not None and complete is None and step % 10 == 0:
                complete = step if watermark.measure().ber == 0.0 else None
    return complete


class Bench:
    """Trained models, from the cache or made and put there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.seed = options, options.device, options.seed
        settings = {name: getattr(options, name) for name in (*FULL, "seed")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.folder = options.cache / digest[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}  # of processor time, by model
        images, labels = self._load("train", min(2 * options.train, 50_000))
        # At the paper's size there are no other images: it fine-tunes on those it trained on.
        self.data = images[: options.train], labels[: options.train]
        self.other = images[options.train :], labels[options.train :]
        self.test = self._load("test", options.test)

    def _load(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        images, labels = load(split, count)
        if self.options.size != images.shape[-1]:
            images = nn.functional.interpolate(images, self.options.size, mode="area")
        return images.to(self.device), labels.to(self.device)

    def trained(
        self,
        name: str,
        start: Callable[[], nn.Module],
        data: tuple[Tensor, Tensor],
        *,
        marked: dict[str, Any] | None = None,
        **how: Any,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A model trained from `start`, with a mark unless `marked` is None, and its row."""
        path = self.folder / f"{name}.pt"
        if path.exists():
            kept = torch.load(path, weights_only=True)
            model = fresh(self.seed, self.device)
            model.load_state_dict(kept["weights"])
            self.seconds[name] = kept["row"]["processor_seconds"]
            return model, kept["row"]
        began, used = time.perf_counter(), time.process_time()
        model = start()
        watermark = None if marked is None else mark(model, self.seed, **marked)
        complete = train(model, data, seed=self.seed, watermark=watermark, **how)
        row: dict[str, Any] = {"test_error": test_error(model, self.test)}
        if watermark is not None:
            row |= {"steps_to_ber_0": complete, **standing(watermark)}
            watermark.detach()
        self.seconds[name] = row["processor_seconds"] = time.process_time() - used
        row["seconds"] = time.perf_counter() - began
        torch.save({"weights": model.state_dict(), "row": row}, path)
        print(name, row, file=sys.stderr, flush=True)
        return model, row

    @property
    def few(self) -> int:
        """Epochs of fine-tuning without the key."""
        return max(1, self.options.epochs // 4)

    def scratch(self, name: str, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Trained from random weights."""
        how = {"epochs": self.options.epochs, "data": self.data, **more}
        return self.trained(name, lambda: fresh(self.seed, self.device), **how)

    def plain(self) -> tuple[nn.Module, dict[str, Any]]:
        """The unmarked host."""
        return self.scratch("none")

    def marked(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        """The host with the paper's mark: of a key matrix, or `random` trained for longer."""
        if name != LONG:
            return self.scratch(name, marked={"matrix": name})
        epochs = self.options.long
        return self.scratch(f"random-{epochs}-epochs", marked={"matrix": "random"}, epochs=epochs)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The marked hosts that are compared."""
        return MATRICES if self.options.long is None else (*MATRICES, LONG)

    def read(self, model: nn.Module, **marked: Any) -> dict[str, float]:
        """The mark of a model that was trained without it, or attacked."""
        watermark = mark(model.eval(), self.seed, **marked)
        found = standing(watermark)
        watermark.detach()
        return found


def matrices(bench: Bench) -> dict[str, Any]:
    """Test error and embedding loss by key matrix; the unmarked model is read with the key, too."""
    model, row = bench.plain()
    rows = {"none": {**row, "read_as": {m: bench.read(model, matrix=m) for m in MATRICES}}}
    return rows | {host: bench.marked(host)[1] for host in bench.hosts}


def situations(bench: Bench) -> dict[str, Any]:
    """From scratch, fine-tuning, distilling: without the mark and with it, the same schedule."""
    teacher, without = bench.plain()
    rows = {"from scratch": {"with": bench.marked("random")[1], "without": without}}
    taught = bench.data[0], logits_of(teacher, bench.data[0]).softmax(-1)
    others: dict[str, dict[str, Any]] = {
        "fine-tuning": {"start": lambda: copy.deepcopy(teacher), "data": bench.data},
        "distilling": {"start": lambda: fresh(bench.seed + 1, bench.device), "data": taught},
    }
    rows |= {situation: {} for situation in others}
    for label, marked in (("with", {}), ("without", None)):
        if marked is None and not bench.options.twins:
            break
        for situation, how in others.items():
            rows[situation][label] = bench.trained(
                f"{situation}-{label}", epochs=bench.options.epochs, marked=marked, **how
            )[1]
    return rows


def tuning(bench: Bench) -> dict[str, Any]:
    """The marked model, fine-tuned without the key: the mark before and after."""
    model, row = bench.marked("random")
    rows: dict[str, Any] = {"before": row}
    for label, data, rate in (
        ("the same images", bench.data, GENTLE),
        ("other images", bench.other, GENTLE),
        ("other images, at the training's rate", bench.other, RATE),
    ):
        if not len(data[0]):
            continue
        name = "tuned-" + label.replace(" ", "-").replace(",", "").replace("'", "")
        after, found = bench.trained(
            name, lambda: copy.deepcopy(model), data, epochs=bench.few, rate=rate
        )
        rows[label] = {**found, "rate": rate, "epochs": bench.few, **bench.read(after)}
    return rows


@torch.no_grad()
def pruned(model: nn.Module, how: str, percent: int, seed: int) -> nn.Module:
    """A copy with a share of the embedded layer's weights, or of every layer's, set to zero."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in copied.named_parameters():
        if weight.dim() < 2 or (how != "every layer" and name != "conv2.second.weight"):
            continue
        size = weight.detach().abs().flatten().cpu()
        order = (
            torch.randperm(len(size), generator=generator) if "random" in how else size.argsort()
        )
        kept = torch.ones_like(size)
        kept[order[: round(len(size) * percent / 100)]] = 0.0
        weight.mul_(kept.view(weight.shape).to(weight.device))
    return copied


def pruning(bench: Bench) -> dict[str, Any]:
    """BER and accuracy against the share of weights that is set to zero."""
    rows: dict[str, Any] = {}
    for host in bench.hosts:
        path = (
            bench.folder
            / f"pruning {host} {bench.options.long if host == LONG else bench.options.epochs}.json"
        )
        if not path.exists():
            path.write_text(json.dumps(_pruning_of(bench, host)))
        rows[host] = json.loads(path.read_text())
    return rows


def _pruning_of(bench: Bench, host: str) -> dict[str, Any]:
    model, _ = bench.marked(host)
    matrix = host.split(",")[0]
    rows: dict[str, Any] = {}
    for how in ("embedded layer", "embedded layer, at random", "every layer"):
        rows[how] = []
        for percent in RATES:
            attacked = pruned(model, how, percent, bench.seed)
            found = {"percent": percent, **bench.read(attacked, matrix=matrix)}
            if matrix == "random":
                found["test_error"] = test_error(attacked, bench.test)
            rows[how].append(found)
    return rows


def capacity(bench: Bench) -> dict[str, Any]:
    """Bits by group, each a training of a quarter of the length; refused where T exceeds M."""
    rows: dict[str, Any] = {}
    for group in GROUPS:
        rows[group] = {}
        for bits in (256, 512, 1024, 2048):
            marked = {"bits": bits, "group": group}
            epochs = max(1, round(bench.options.epochs * bench.options.capacity_share))
            try:
                name = f"{group}-{bits}-{epochs}-epochs"
                row = bench.scratch(name, marked=marked, epochs=epochs)[1]
            except ModelTooSmallError as error:
                row = {"refused": str(error).split(":")[0]}
            rows[group][str(bits)] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=3_000)
    parser.add_argument("--test", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--long", type=int, help="epochs of a further `random`; none if not said")
    parser.add_argument("--twins", action=argparse.BooleanOptionalAction, default=True,
                        help="unmarked ones in the situations, too")  # fmt: skip
    parser.add_argument("--size", type=int, default=16, help="side of the images in pixels")
    parser.add_argument("--full", action="store_true", help=f"the paper's size: {FULL}")
    parser.add_argument("--capacity-share", type=float, help="of the epochs; 0.25, or 1 if --full")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("build/uchida"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.full:
        vars(options).update(FULL)
    if options.capacity_share is None:
        options.capacity_share = 1.0 if options.full else 0.25
    hidden = ("out", "cache", "threads", "full", "parts", "twins")
    record: dict[str, Any] = {
        "question": "Does Uchida et al. 2017 come out as published, in this library's terms?",
        "settings": {
            **{k: v for k, v in vars(options).items() if k not in hidden},
            "host": "WRN-10-4",
            "batch": BATCH,
            "rate": RATE,
            "drops": DROPS,
            "factor": FACTOR,
            "momentum": MOMENTUM,
            "weight_decay": DECAY,
            "weight": mark(fresh(0, "cpu"), 0).scheme.weight,
            "gentle_rate": GENTLE,
        },
        "paper": PAPER,
        "results": {},
    }
    if options.out is not None and options.out.exists():
        kept = json.loads(options.out.read_text())
        if kept["settings"] == json.loads(json.dumps(record["settings"])):
            record = kept
    bench = Bench(options)
    for part in options.parts:
        record["results"][part] = globals()[part](bench)
        record["processor_seconds"] = {**record.get("processor_seconds", {}), **bench.seconds}
        print(f"{part}: {time.process_time():.0f} s", file=sys.stderr, flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
