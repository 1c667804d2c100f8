"""Labelled images: what the attacker trains on, and what nobody trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_watermark.errors import WatermarkError
from hf_watermark.safetensors_ranges import quoted
from hf_watermark.softlabels.probe_images import ProbeImages, image_files, open_images
from hf_watermark.stress.victims import Victim

__all__ = ["Examples", "attackers_and_test"]

_LABELS = ("label", "labels")
_TRAIN, _TEST = ("train", "training"), ("test", "validation", "val")
_TEST_SHARE = 1 / 3
_FEWEST = 50  # in either part: below it, five points are three images
_BATCH = 64


@dataclass(frozen=True)
class Examples:
    """Images as the model takes them, with their labels.

    Attributes:
        images: (n, C, H, W) float32.
        labels: (n,) int64, in the model's order of classes.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def taken(self, places: Tensor) -> Examples:
        """Those in these places."""
        return Examples(self.images[places], self.labels[places])

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        found = hashlib.sha256(self.images.cpu().contiguous().numpy().tobytes())
        found.update(self.labels.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()


def attackers_and_test(
    data: str | Path,
    victim: Victim,
    *,
    seed: int = 0,
    column: str | None = None,
    limit: int | None = None,
) -> tuple[Examples, Examples]:
    """The attacker's part, and a part that is held out to measure accuracy on.

    A folder of two parts, `train` and `test` (or `validation`), is taken as it is; anything else is
    shuffled, and a third is held out.

    Args:
        data: A folder of images, one folder a class; a `.parquet` file or a folder of them, or a
            folder of `save_to_disk`, with columns image and label.
        victim: Whose classes and input size count.
        seed: Of the shuffle.
        column: Which column holds the images, if it is not clear.
        limit: The most images of either part.

    Raises:
        WatermarkError: If there are no labels, too few images, or other classes.
    """
    path = Path(data).expanduser()
    parts = [_part(path, names) for names in (_TRAIN, _TEST)]
    random = torch.Generator().manual_seed(seed)
    if parts[0] is not None and parts[1] is not None:
        read = [_read(part, victim, column, random, limit) for part in parts if part is not None]
        training, test = read
    else:
        most = None if limit is None else 3 * limit
        whole = _read(path, victim, column, random, most)
        held_out = round(_TEST_SHARE * len(whole))
        places = torch.arange(len(whole))  # shuffled already
        training, test = whole.taken(places[held_out:]), whole.taken(places[:held_out])
        training = training.taken(torch.arange(len(training))[:limit])
        test = test.taken(torch.arange(len(test))[:limit])
    for part, what in ((training, "for the attacker"), (test, "to test on")):
        if len(part) < _FEWEST:
            raise WatermarkError(
                f"There are too few images in {quoted(str(data), 200)}",
                expected=f"at least {_FEWEST} {what}",
                got=f"{len(part)}",
                do="take more images of the task",
            )
    return training, test


def _part(path: Path, names: Sequence[str]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _read(
    path: Path, victim: Victim, column: str | None, random: torch.Generator, limit: int | None
) -> Examples:
    """Images and labels in a random order, at most `limit` of them."""
    dataset = open_images(path)
    labels = _labels(dataset, path, victim)
    images = ProbeImages(dataset, column)
    order = torch.randperm(len(images), generator=random)[:limit].tolist()
    parts = [
        victim.pixel_values([images.picture(place) for place in order[start : start + _BATCH]])
        for start in range(0, len(order), _BATCH)
    ]
    wanted = torch.tensor([labels[place] for place in order])
    return Examples(torch.cat(parts).to(victim.device), wanted.to(victim.device))


def _labels(dataset: Any, path: Path, victim: Victim) -> list[int]:
    """One class a row, in the model's order."""
    named = quoted(str(path), 200)
    column = next((name for name in _LABELS if name in dataset.column_names), None)
    if column is not None:
        found = dataset[column]
        values: list[Any] = list(found)
        names = getattr(dataset.features[column], "names", None)
        numbered = all(isinstance(value, int) for value in values)
        if names and numbered and set(names) <= set(victim.names):
            values = [names[value] if 0 <= value < len(names) else value for value in values]
    elif dataset.column_names == ["image"]:  # a folder of files
        values = _folders(path, victim)
    else:
        raise WatermarkError(
            f"The images in {named} have no labels",
            expected="a column label",
            got=", ".join(dataset.column_names)[:200],
        )
    return [_class(value, victim, named) for value in values]


def _folders(path: Path, victim: Victim) -> list[Any]:
    """The class of each file: the folder that it lies in."""
    files = image_files(path)
    names = [file.parent.name if file.parent != path else "" for file in files]
    kinds = sorted(set(names))
    if "" in kinds:
        raise WatermarkError(
            f"The images in {quoted(str(path), 200)} have no labels",
            expected="a folder for each class",
            got="images without one",
        )
    if set(kinds) <= set(victim.names):
        return names
    if all(kind.isdecimal() for kind in kinds):
        return [int(name) for name in names]
    if len(kinds) == victim.classes:  # other names: in the order of datasets' imagefolder
        return [kinds.index(name) for name in names]
    return names


def _class(value: Any, victim: Victim, named: str) -> int:
    if isinstance(value, str) and value in victim.names:
        return victim.names.index(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if 0 <= value < victim.classes:
            return int(value)
        got: object = int(value)
    else:
        got = quoted(str(value), 60)
    raise WatermarkError(
        f"The labels in {named} are not the model's classes",
        expected=f"0 to {victim.classes - 1}, or the names of its classes",
        got=got,
        do="take images of the task that the model was made for",
    )
