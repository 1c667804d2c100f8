r"""Does a student distilled from marked answers carry the mark, and does anybody else seem to?

A teacher of CIFAR-10 answers queries through `SoftLabelWatermark`; thieves learn from the answers
alone, in every way that `students.py` knows, also to be rid of the mark; the owner reads their
signs from what the students answer. Beside them stand innocents: students of the clean teacher, a
model of its own, another customer's student, and wrong keys. References are fixed by name below,
and distilled before any suspect is looked at. Every trained model is kept in --cache, so that an
interrupted run goes on, and several processes may fill one cache.

    python benchmarks/distillation.py --cache runs/distillation --out distillation.json
    python benchmarks/distillation.py --train 2000 --queries 1500 --epochs 2 --seeds 0   # a look
    python benchmarks/distillation.py --classes 2 --size 32 --epochs 5 --teacher-epochs 8 \
        --beyond --out distillation_two_classes.json
    python benchmarks/distillation.py --full --device cuda                               # a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import students
import torch
from students import Data, Recipe, answers, host, train
from torch import Tensor, nn

from hf_watermark import OwnerKey
from hf_watermark.significance import log10_rademacher_tail
from hf_watermark.softlabels import SoftLabelWatermark
from hf_watermark.softlabels.detection import (
    CLASSES,
    PAIR,
    agreement,
    class_weights,
    fewest_probes,
    pair_weights,
)
from hf_watermark.softlabels.outputs import Outputs
from hf_watermark.softlabels.probes import Probes
from hf_watermark.verify import verify_outputs

MARGIN = {10: (0.12, 0.3), 2: (0.25, 0.3)}
MARGIN_KEYS = 7400  # from here on: none that the settings or the readings were chosen on
EPS = {10: 1.0, 2: 2.0}
COUNTS = (200, 300, 500, 1000, 2000, 5000)
CUSTOMERS = 1000
BEYOND = ("erasures", "colluders", "variants")
# Fixed before any suspect was trained: the teacher's own architecture and another, neither of them
# the weak suspect's, and what a student of labels alone looks like. In margin mode also what the
# account's own queries teach whoever gets unmarked labels.
LOGGED = "the account's queries, hard labels"
REFERENCES = {  # how each learns, whether from labels alone, and from which images
    "same architecture": (Recipe("resnet", batch=128), False, "reference"),
    "same architecture, hard labels": (Recipe("resnet", batch=128), True, "reference"),
    "another architecture": (Recipe("bottleneck", batch=128), False, "reference"),
    LOGGED: (Recipe("resnet"), True, "queries"),
}
BANK = [name for name in REFERENCES if name != LOGGED]
# Chosen on other keys: students of labels learn H alone less well than the image's own features.
MARGIN_FEATURES = "M"
WEAK = Recipe("regnet", share=2 / 3, epochs=1.25)
PATIENT = Recipe("resnet", epochs=1.75)  # labels alone take longer to learn


@dataclass(frozen=True)
class Suspect:
    """A model to be asked.

    Attributes:
        name: In the tables.
        kind: `student`, `hard labels`, `variant`, `erasure` or `innocent`.
        make: Trains it, or loads what it is made of.
        margin: Whether the answers were served, and are read, in margin mode.
        customers: Whose answers it learnt; empty for the owner's own signs.
        together: Other suspects whose probabilities it averages, in place of training anything.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    margin: bool = False
    customers: tuple[str, ...] = ()
    together: tuple[str, ...] = ()


class Run:
    """One seed: its teacher, references and suspects, trained once and kept."""

    def __init__(self, seed: int, data: Data, options: argparse.Namespace) -> None:
        self.seed, self.data, self.options = seed, data, options
        classes = options.classes
        self.folder = options.cache / f"k{classes}-{options.features}-seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key = OwnerKey((7100 + seed).to_bytes(32, "big"))
        self.teacher = self.kept("teacher", self._teacher)
        eps = options.eps or EPS[classes]
        shown = data.seen(data.calibration[0]).cpu()
        self.served = SoftLabelWatermark(self.teacher, self.key, eps, options.features)
        self.served.calibrate(shown).eval()
        margin = tuple(options.margin or MARGIN[classes])
        firm_key = OwnerKey(((options.margin_keys or MARGIN_KEYS) + seed).to_bytes(32, "big"))
        self.firm = SoftLabelWatermark(self.teacher, firm_key, eps, MARGIN_FEATURES, margin)
        self.firm.calibrate(shown).eval()

    # Models -----------------------------------------------------------------------------------

    def kept(self, name: str, make: Callable[[], nn.Module], arch: str = "resnet") -> nn.Module:
        """A model from the cache, or made and put there."""
        from transformers import set_seed

        path = self.folder / f"{name.replace(' ', '_').replace(',', '')}.pt"
        if not path.exists():
            set_seed(100 * self.seed + sum(name.encode()) % 97)
            model = make()
            torch.save({"arch": model.arch, "state": model.state_dict()}, path)
        stored = torch.load(path, map_location=self.options.device)
        model = host(stored["arch"], self.options.classes).to(self.options.device)
        model.load_state_dict(stored["state"])
        return model.eval()

    def _teacher(self) -> nn.Module:
        arch, epochs = self.options.teacher, self.options.teacher_epochs
        return self._fit(Recipe(arch, batch=128), *self.data.teacher, epochs=epochs)

    def _fit(self, recipe: Recipe, images: Tensor, targets: Tensor, epochs: int) -> nn.Module:
        arch = self.options.teacher if recipe.arch == "resnet" else recipe.arch
        model = host(arch, self.options.classes)
        train(model, images, targets, self.data, epochs=epochs, seed=self.seed, recipe=recipe)
        model.arch = arch  # type: ignore[assignment]
        return model

    def said(self, source: Any, part: str = "queries") -> Tensor:
        """Probabilities (n, K) that a source answers."""
        return answers(source, getattr(self.data, part)[0], self.data).exp()

    def learnt(
        self,
        recipe: Recipe,
        targets: Callable[[], Tensor],
        part: str = "queries",
    ) -> Callable[[], nn.Module]:
        """A student of targets, (n, K) probabilities or (n,) labels of the whole part."""

        def make() -> nn.Module:
            images = getattr(self.data, part)[0]
            count = round(recipe.share * len(images))
            epochs = max(1, round(recipe.epochs * self.options.epochs))
            return self._fit(recipe, images[:count], targets()[:count], epochs)

        return make

    def reference(self, name: str) -> dict[str, Any]:
        """What a clean student says, made beforehand."""
        recipe, hard, part = REFERENCES[name]

        def targets() -> Tensor:
            said = self.said(self.teacher, part)
            return said.argmax(-1) if hard else said

        return self.outputs(f"reference {name}", self.learnt(recipe, targets, part))

    # Suspects ---------------------------------------------------------------------------------

    def suspects(self) -> Iterator[Suspect]:
        """All that are asked about, the needed ones first."""
        same = Recipe("resnet")
        served, firm, clean = self.served, self.firm, self.teacher
        said, learnt = self.said, self.learnt

        def soft(of: Any, recipe: Recipe = same) -> Callable[[], nn.Module]:
            return learnt(recipe, lambda: said(of))

        def hard(of: Any, recipe: Recipe = same) -> Callable[[], nn.Module]:
            return learnt(recipe, lambda: said(of).argmax(-1))

        yield Suspect("strong", "student", soft(served))
        yield Suspect("weak", "student", soft(served, WEAK))
        # Without margin mode the labels are the clean model's: an innocent, whoever was asked.
        yield Suspect("hard labels", "innocent", hard(served), True)
        yield Suspect("margin, hard labels", "hard labels", hard(firm, PATIENT), True)
        if self.options.classes > 2:
            yield Suspect("margin, weak, hard labels", "hard labels", hard(firm, WEAK), True)
        yield Suspect("clean strong", "innocent", soft(clean))
        yield Suspect("clean weak", "innocent", soft(clean, WEAK))
        yield Suspect("own labels", "innocent", learnt(same, lambda: self.data.queries[1]))
        if self.options.classes > 2:
            other = served.for_recipient("customer-1")
            yield Suspect("another customer's", "innocent", soft(other), False, ("customer-1",))
        beyond = self.options.beyond if self.seed in self.options.beyond_seeds else ()
        if "erasures" in beyond:
            yield from self._erasures()
        if "colluders" in beyond and self.options.classes > 2:
            yield from self._colluders()
        if "variants" in beyond:
            yield from self._variants(said, learnt)

    def _variants(self, said: Any, learnt: Any) -> Iterator[Suspect]:
        same, served = Recipe("resnet"), self.served
        recipes = {
            "temperature 4": Recipe("resnet", temperature=4.0),
            "half hard labels": Recipe("resnet", hard=0.5),
            "a third of the queries": Recipe("resnet", share=1 / 3, epochs=2.0),
        }
        for name, recipe in recipes.items():
            yield Suspect(name, "variant", learnt(recipe, lambda: said(served)))
        rounded = learnt(same, lambda: _shares((said(served) * 100).round()))
        yield Suspect("answers rounded to 2 decimals", "variant", rounded)
        if self.options.classes > 2:
            top = learnt(same, lambda: _shares(_top(said(served), 3)))
            yield Suspect("answers cut to the top 3", "variant", top)
        yield Suspect("fine-tuned on true labels", "variant", self._tuned)
        yield Suspect("half of the weights pruned", "variant", lambda: self._changed("strong"))
        for beside, other in (("an unmarked one", "own labels"), ("the weak one", "weak")):
            name = f"mean with {beside}"
            yield Suspect(name, "variant", nn.Module, together=("strong", other))

    def _colluders(self) -> Iterator[Suspect]:
        for count in (2, 3):
            names = tuple(f"customer-{10 * count + i}" for i in range(count))
            views = [self.served.for_recipient(name) for name in names]

            def mean(views: Any = views) -> Tensor:
                return sum(self.said(one) for one in views) / len(views)

            make = self.learnt(Recipe("resnet"), mean)
            yield Suspect(f"{count} customers together", "variant", make, False, names)

    def _erasures(self) -> Iterator[Suspect]:
        same, queries = Recipe("resnet"), self.data.queries[0]

        def changed(how: Callable[[Tensor], Tensor], recipe: Recipe = same) -> Any:
            return self.learnt(recipe, lambda: how(self.said(self.served)))

        def own_log_probs() -> Tensor:
            return answers(self._again("hard labels"), queries, self.data)

        def without_features(said: Tensor) -> Tensor:
            own = students.penultimate(self._again("hard labels"), queries, self.data)
            low = students.low_resolution(queries)
            return students.explained(said, own_log_probs(), torch.cat([low, own], 1))

        smoothed = changed(students.smoothed_labels, Recipe("resnet", weight_decay=5e-3))
        yield Suspect("label smoothing, weight decay", "erasure", smoothed)
        views = self.learnt(
            same, lambda: students.of_views(self.served, queries, self.data, self.seed)
        )
        yield Suspect("mean of 6 views", "erasure", views)
        again = self.learnt(
            same, lambda: self.said(self._again("strong"), "reference"), "reference"
        )
        yield Suspect("self-distillation on other images", "erasure", again)
        yield Suspect("mean of 20 nearest answers", "erasure", changed(students.of_neighbours))
        yield Suspect("low-res and own features out", "erasure", changed(without_features))
        onto = changed(lambda said: students.explained(said, own_log_probs(), None))
        yield Suspect("projected on own student", "erasure", onto)
        yield Suspect("class means", "erasure", changed(students.class_means))

    def _again(self, name: str) -> nn.Module:
        path = self.folder / f"{name.replace(' ', '_')}.pt"
        if not path.exists():
            raise SystemExit(f"{name} has to be made first")
        return self.kept(name, self._teacher)

    def _tuned(self) -> nn.Module:
        model = self._again("strong")
        images, labels = (part[:5000] for part in self.data.calibration)
        epochs = max(1, self.options.epochs // 2)
        train(model, images, labels, self.data, epochs=epochs, seed=self.seed, rate=0.01)
        model.arch = self.options.teacher  # type: ignore[assignment]
        return model

    def _changed(self, name: str) -> nn.Module:
        model = students.pruned(self._again(name), 0.5)
        model.arch = self.options.teacher  # type: ignore[assignment]
        return model

    def _ensemble(self, names: Sequence[str]) -> Callable[..., Any]:
        models = [self._again(name) for name in names]

        def answer(pixel_values: Tensor) -> SimpleNamespace:
            said = [one(pixel_values=pixel_values).logits.softmax(-1) for one in models]
            return SimpleNamespace(logits=torch.stack(said).mean(0).log())

        return answer

    def outputs(
        self, name: str, make: Callable[[], nn.Module], together: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A model's log-probabilities of probes and queries, and its accuracy on other images."""
        path = self.folder / f"{name.replace(' ', '_').replace(',', '')}.npz"
        if not path.exists():
            model = self._ensemble(together) if together else self.kept(name, make)
            images, labels = self.data.test
            right = answers(model, images, self.data).argmax(-1) == labels
            probes = answers(model, self.data.probes[0], self.data).numpy()
            queries = answers(model, self.data.queries[0], self.data).numpy()
            accuracy = right.float().mean().item()
            np.savez(path, probes=probes, queries=queries, accuracy=accuracy)
            print(f"seed {self.seed}: {name} {accuracy:.1%}", file=sys.stderr, flush=True)
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}


def _shares(p: Tensor) -> Tensor:
    return p / p.sum(1, keepdim=True)


def _top(p: Tensor, count: int) -> Tensor:
    return torch.where(p >= p.topk(count).values[:, -1:], p, 0.0)


def posted(classes: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What a suspect's owner may do to its answers: probabilities (n, K) in."""

    def heated(p: np.ndarray) -> np.ndarray:
        q = p ** (1 / 3)
        return q / q.sum(axis=1, keepdims=True)

    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "as it is": lambda p: p,
        "temperature 3": heated,
        "2 decimals": lambda p: p.round(2),
        "1 decimal": lambda p: p.round(1),
        "labels": lambda p: p.argmax(axis=1),
    }
    if classes > 3:
        changes["top 3"] = lambda p: np.where(p >= np.sort(p, axis=1)[:, [-3]], p, 0.0)
    return changes


def readings(run: Run) -> dict[str, Any]:
    """Every statistic of one seed."""
    data = run.data
    bank = [run.reference(name) for name in BANK]
    banks = {False: bank, True: [*bank, run.reference(LOGGED)]}
    fresh = {m: view(run, m, data.probes[0]) for m in (False, True)}
    logged = view(run, True, data.queries[0])
    found: dict[str, Any] = {}
    wrong: list[float] = []
    for suspect in run.suspects():
        said = run.outputs(suspect.name, suspect.make, suspect.together)
        if run.options.train_only:
            continue
        row: dict[str, Any] = {"kind": suspect.kind, "accuracy": float(said["accuracy"])}
        probes, bank = fresh[suspect.margin], banks[suspect.margin]
        core = suspect.kind not in ("variant", "erasure")
        row["fresh"] = {
            name: {
                str(count): judged(change(np.exp(said["probes"][:count])), probes, bank, "probes")
                for count in (COUNTS if name == "as it is" else (2000, 5000))
                if count >= fewest_probes(probes.features)
            }
            for name, change in posted(run.options.classes).items()
            if name == "as it is" or (suspect.kind != "innocent" and core)
        }
        alone = np.exp(said["probes"][:2000])
        if suspect.margin:
            row["logged"] = {
                name: judged(change(np.exp(said["queries"])), logged, bank, "queries")
                for name, change in posted(run.options.classes).items()
                if name in ("as it is", "labels")
            }
        if core:
            row["teacher_only"] = judged(alone, probes, [], "probes")
            row["wrong_keys"], t = _wrong(run, suspect, alone, probes, bank)
            wrong += t
        if suspect.customers:
            row["customers"] = _traced(run, suspect, alone, probes, bank)
        found[suspect.name] = row
        t = {k: v["t"] for k, v in row["fresh"]["as it is"].items()}
        more = {k: v["t"] for k, v in row.get("logged", {}).items()}
        print(f"seed {run.seed}: {suspect.name} {row['accuracy']:.1%} {t} {more}", file=sys.stderr)
    images, labels = (torch.cat(pair) for pair in zip(data.probes, data.test, strict=True))
    seen = data.seen(images).cpu()
    right = answers(run.teacher, images, data).argmax(-1) == labels
    return {
        "teacher_accuracy": float(right.float().mean()),
        "references": {name: float(run.reference(name)["accuracy"]) for name in REFERENCES},
        "distortion": run.served.distortion(seen, labels).to_dict(),
        "margin_distortion": run.firm.distortion(seen, labels).to_dict(),
        "margin_expected_price": run.firm.expected_price,
        "wrong_keys": _null(wrong) | {"ranks": _ranks(wrong)} if wrong else None,
        "suspects": found,
    }


def view(run: Run, margin: bool, images: Tensor) -> Probes:
    return (run.firm if margin else run.served).probes(run.data.seen(images).cpu(), 500)


def judged(
    said: np.ndarray, probes: Probes, bank: list[dict[str, Any]], part: str
) -> dict[str, Any]:
    count = len(said)
    given = [one[part][:count] for one in bank]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no probe was used for calibration
        evidence = verify_outputs(said, None, _first(probes, count), given)
    return {
        "t": round(evidence.t, 3),
        "log10_p": round(evidence.log10_p, 3),
        "reading": evidence.reading,
    }


def _first(probes: Probes, count: int) -> Probes:
    parts = {name: getattr(probes, name)[:count] for name in ("psi", "log_probs", "seen")}
    return dataclasses.replace(probes, **parts)


def _weights(said: np.ndarray, probes: Probes, bank: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    probes = _first(probes, len(said))
    outputs = Outputs.read(said, probes.classes)
    given = [one["probes"][: len(said)].astype(np.float64) for one in bank]
    weights = {CLASSES: class_weights(outputs, probes, given)}
    if probes.margin is not None:
        weights[PAIR] = pair_weights(outputs, probes, given)
    return weights


def _wrong(
    run: Run, suspect: Suspect, said: np.ndarray, probes: Probes, bank: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[float]]:
    """What keys say that nobody used, other ones for every suspect, and every t."""
    found, every = {}, []
    for reading, weights in _weights(said, probes, bank).items():
        names = (f"wrong {suspect.name} {reading} {i}" for i in range(run.options.wrong))
        t = [agreement(weights, probes.signs(name)) for name in names]
        found[reading] = _null(t)
        every += t
    return found, every


def _null(t: list[float]) -> dict[str, float]:
    from scipy import stats

    return {
        "count": len(t),
        "ks_p": float(stats.kstest(t, "norm").pvalue),
        "sd": statistics.pstdev(t),
        "largest": max(t),
        "smallest_log10_p": min(log10_rademacher_tail(one) for one in t),
    }


def _ranks(t: list[float]) -> list[tuple[int, float]]:
    """Some of the largest values, with their ranks."""
    ordered = sorted(t, reverse=True)
    ranks = np.unique(np.geomspace(1, len(t), 80).astype(int))
    return [(int(rank), round(ordered[rank - 1], 3)) for rank in ranks]


def _traced(
    run: Run, suspect: Suspect, said: np.ndarray, probes: Probes, bank: list[dict[str, Any]]
) -> dict[str, Any]:
    """Which of a thousand customers, from one pass over the outputs."""
    names = [f"customer-{i}" for i in range(CUSTOMERS)]
    weights = _weights(said, probes, bank)[CLASSES]
    t = {name: agreement(weights, probes.signs(name)) for name in names}
    best = sorted(t, key=t.__getitem__, reverse=True)
    return {
        "of": CUSTOMERS,
        "t": {name: round(t[name], 3) for name in suspect.customers},
        "best_other_t": round(max(t[name] for name in names if name not in suspect.customers), 3),
        "named_first": best[0] in suspect.customers,
        "all_ahead": set(best[: len(suspect.customers)]) == set(suspect.customers),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a `Run` and its data depend on."""
    parser.add_argument("--classes", type=int, choices=[2, 10], default=10)
    parser.add_argument("--features", choices=["H", "M"], default="H")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=15_000)
    parser.add_argument("--calibration", type=int, default=5_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--teacher", choices=["resnet", "resnet18"], default="resnet")
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=48, help="pixels that the models see")
    parser.add_argument("--eps", type=float, help="1, and 2 for two classes")
    parser.add_argument("--margin", type=float, nargs=2, help="lambda and tau; has its own --cache")
    parser.add_argument("--margin-keys", type=int, help="their first number, with --margin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("build/distillation"))
    parser.add_argument("--out", type=Path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--beyond", nargs="*", choices=BEYOND, default=BEYOND)
    parser.add_argument("--beyond-seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--wrong", type=int, default=1000, help="wrong keys for every suspect")
    parser.add_argument("--full", action="store_true", help="ResNet-18, 30 epochs, 128 pixels")
    parser.add_argument("--train-only", action="store_true", help="fill the cache, read nothing")
    options = parser.parse_args()
    if options.full:
        options.teacher, options.size, options.epochs, options.teacher_epochs = (
            "resnet18",
            128,
            30,
            30,
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    data = Data(options)
    hidden = {"out", "cache", "threads", "device", "train_only"}
    hidden |= set() if options.margin_keys else {"margin_keys"}
    record: dict[str, Any] = {
        "question": "Does a student of marked answers carry the mark?",
        "settings": {k: v for k, v in vars(options).items() if k not in hidden}
        | {
            "eps": options.eps or EPS[options.classes],
            "margin": options.margin or MARGIN[options.classes],
            "margin_features": MARGIN_FEATURES,
            "bank": BANK,
            "bank_in_margin_mode": list(REFERENCES),
        },
        "results": {},
    }
    if options.out is not None and options.out.exists():  # go on from there
        before = json.loads(options.out.read_text())
        if before["settings"] == json.loads(json.dumps(record["settings"])):
            record["results"] = before["results"]
    for seed in options.seeds:
        if str(seed) in record["results"]:
            continue
        record["results"][str(seed)] = readings(Run(seed, data, options))
        record["results"] = dict(sorted(record["results"].items(), key=lambda row: int(row[0])))
        if options.out is not None and not options.train_only:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
