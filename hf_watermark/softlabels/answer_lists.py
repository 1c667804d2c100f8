"""Answers as HF inference gives them: lists of labels and scores, by name, in whatever order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_watermark.errors import OutputsError
from hf_watermark.projections import Doubles

__all__ = ["class_names", "is_named", "scores_by_class"]

_SHOWN = 5  # names in a message


def class_names(id2label: Mapping[Any, Any] | None, classes: int) -> tuple[str, ...]:
    """The names in a configuration's `id2label`, in the model's order; none if they tell nothing.

    Args:
        id2label: From 0 to K - 1; JSON makes strings of the integers.
        classes: K.
    """
    if not isinstance(id2label, Mapping):
        return ()
    try:
        named = {int(place): str(name) for place, name in id2label.items()}
    except (TypeError, ValueError):
        return ()
    if set(named) != set(range(classes)) or len(set(named.values())) != classes:
        return ()
    return tuple(named[place] for place in range(classes))


def is_named(answers: Any) -> bool:
    """Whether these are answers by name: a list that holds names, or lists of names and scores."""
    if not isinstance(answers, (list, tuple)):
        return False
    first = next((one for one in answers if not isinstance(one, (list, tuple)) or one), None)
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    return isinstance(first, (str, Mapping))


def scores_by_class(answers: Sequence[Any], names: Sequence[str]) -> Doubles:
    """Answers by name as an array (n, K), 0 where they are silent.

    Args:
        answers: For every image `[{"label": "cat", "score": .9}, ...]`, all classes or the best
            few, in any order; or its label alone, `"cat"` or `{"label": "cat"}`.
        names: What the suspect calls the classes, in the order of the marked model's.

    Raises:
        OutputsError: If an answer is none of these, gives a label twice or one that is not in
            `names`, or if the suspect never uses some of them though it shows all that it has.
    """
    places = {name: place for place, name in enumerate(names)}
    if not places or len(places) != len(names):
        raise OutputsError(
            "It is not known what the classes are called",
            expected="the marked model's id2label, each name once",
            got=f"{len(names)} names",
            do="say what the suspect calls them, in your model's order (--labels FILE)",
        )
    scores = np.zeros((len(answers), len(names)))
    for row, answer in enumerate(answers):
        for name, score in _pairs(answer, row):
            if name not in places:
                raise _unknown(name, row, names)
            if scores[row, places[name]]:
                raise OutputsError(f"The answer for image {row} gives {name[:60]!r} twice")
            # A class that is named is not silent, even where its score was rounded to 0.
            scores[row, places[name]] = score or 1e-30
    shown = scores > 0.0
    fewer = shown[:1].sum() not in (1, len(names)) and bool((shown == shown[:1]).all())
    if fewer and np.abs(scores.sum(axis=1) - 1.0).max() < 0.05:
        missing = [name for name, seen in zip(names, shown[0], strict=True) if not seen]
        raise OutputsError(
            "The suspect lacks classes",
            expected=f"{len(names)} labels",
            got=f"never {_listed(missing)}",
            do="a model of other classes cannot be compared",
        )
    return np.where(scores == 1e-30, 0.0, scores)


def _pairs(answer: Any, row: int) -> list[tuple[str, float]]:
    """The names and scores of one image; a batch of one image is unpacked."""
    while isinstance(answer, (list, tuple)) and len(answer) == 1 and not _is_item(answer[0]):
        answer = answer[0]
    items = answer if isinstance(answer, (list, tuple)) else [answer]
    alone = len(items) == 1
    pairs = []
    for item in items:
        if alone and isinstance(item, str):
            item = {"label": item}
        name = item.get("label") if isinstance(item, Mapping) else None
        score = item.get("score", 1.0 if alone else None) if isinstance(item, Mapping) else None
        if not isinstance(score, (int, float)) or isinstance(score, bool):
            raise _no_answer(row, item)
        if not isinstance(name, str) or not 0.0 <= score <= 1.0 + 1e-6:
            raise _no_answer(row, item)
        pairs.append((name, float(score)))
    if not pairs or not math.fsum(score for _, score in pairs):
        raise _no_answer(row, answer)
    return pairs


def _is_item(value: Any) -> bool:
    return isinstance(value, (str, Mapping))


def _no_answer(row: int, got: Any) -> OutputsError:
    return OutputsError(
        f"The answer for image {row} cannot be read",
        expected='[{"label": "cat", "score": 0.9}, ...] with scores from 0 to 1',
        got=ascii(got)[:100],
    )


def _unknown(name: str, row: int, names: Sequence[str]) -> OutputsError:
    return OutputsError(
        f"The answer for image {row} has a label that the marked model lacks",
        expected=_listed(names),
        got=ascii(name)[:60],
        do="if it only has other names, say what the suspect calls your classes (--labels FILE)",
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(ascii(name)[:40] for name in names[:_SHOWN]) + (
        f" and {more} more" if more > 0 else ""
    )
