"""A suspect's answers in a file, one row a probe, in the probes' order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import OutputsError
from hf_watermark.softlabels.answer_lists import is_named

__all__ = ["read_output_file"]

_NAMES = ("probs", "log_probs", "labels", "label", "answers")
_DO = (
    "store one of probs (n, K), log_probs (n, K) or labels (n,) in .npz, .npy or .parquet, or "
    "label/score lists in .json"
)


def read_output_file(path: str | os.PathLike[str]) -> npt.NDArray[Any] | list[Any]:
    """The array of answers in a file, or its label/score lists, for `verify_outputs`.

    Args:
        path: `.npz` or `.npy` (never a pickle), or `.parquet` with a column `probs` or `log_probs`
            of lists, or `labels` of integers, or with one numeric column for each class and nothing
            else. An array or column that is alone may have any name. `.json` with one list of all
            answers, or `.jsonl` with an answer on each line; these, and a parquet column, may be
            label/score lists as HF inference gives them.

    Raises:
        OutputsError: If it cannot be read, or does not say which array is meant.
    """
    where = Path(path)
    try:
        if where.suffix == ".parquet":
            return _parquet(where)
        if where.suffix in (".json", ".jsonl"):
            return _rows(_json(where))
        loaded: Any = np.load(where, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return np.asarray(loaded[_chosen(list(loaded.files), where)])
    except OutputsError:
        raise
    except Exception as error:  # zipfile, numpy and pyarrow have errors of many kinds
        got = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise OutputsError(f"The outputs in {where} cannot be read", got=got, do=_DO) from None


def _json(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        if lines and isinstance(lines[0], dict) and "format" in lines[0]:
            raise OutputsError(
                f"{path} holds an endpoint's answers, by image",
                do="give the endpoint itself, with --answers for this file and --images",
            )
        return lines
    answers = json.loads(text)
    if not isinstance(answers, list):
        raise ValueError("no list")
    return answers


def _rows(answers: list[Any]) -> npt.NDArray[Any] | list[Any]:
    return answers if is_named(answers) else np.asarray(answers)


def _parquet(path: Path) -> npt.NDArray[Any] | list[Any]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    names = list(table.column_names)
    known = [name for name in _NAMES if name in names]
    if not known and len(names) > 1:
        return np.stack([table[name].to_numpy() for name in names], axis=1)
    column = table[_chosen(names, path)]
    return _rows(column.to_pylist())


def _chosen(names: list[str], path: Path) -> str:
    known = [name for name in _NAMES if name in names] or names
    if len(known) != 1:
        raise OutputsError(
            f"{path} does not say which array holds the outputs",
            expected=f"one of {', '.join(_NAMES)}",
            got=", ".join(names)[:200] or "nothing",
            do=_DO,
        )
    return known[0]
