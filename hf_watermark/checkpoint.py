"""A model's weights, found as `from_pretrained` finds them and read by rows.

`Checkpoint` knows which of a model's `Files` hold the weights and where each tensor lies. Only
safetensors are ever opened: unpickling runs a stranger's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from hf_watermark.errors import (
    CarrierMissingError,
    CheckpointError,
    MalformedCheckpointError,
    NotSafetensorsError,
)
from hf_watermark.files import SUFFIX, Files
from hf_watermark.safetensors_ranges import (
    Reader,
    TensorSpan,
    quoted,
    read_header,
    read_rows,
)

__all__ = ["Checkpoint"]

_WEIGHTS = "model.safetensors"
_INDEX_SUFFIX = f"{SUFFIX}.index.json"
_INDEX = f"model{_INDEX_SUFFIX}"
_OTHER_LIBRARIES = ("diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_INDEX_LIMIT = 32 * 2**20
_WORKERS = 8
_CHUNK = 8 * 2**20
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_DO_CONVERT = (
    "convert the model once in a place that you trust (from_pretrained, then save_pretrained), or"
    " with the Space https://huggingface.co/spaces/safetensors/convert, and check the result"
)


class Checkpoint:
    """The tensors of a model, by name, wherever its files put them.

    Attributes:
        files: Where the bytes come from.
        tensors: The span of each tensor by its name.
        weight_files: The paths of the files that hold them.
        bytes_total: Bytes in the weight files.
    """

    def __init__(
        self, files: Files, readers: Mapping[str, Reader], tensors: dict[str, TensorSpan]
    ) -> None:
        self.files = files
        self.tensors = tensors
        self.weight_files = tuple(readers)
        self.bytes_total = sum(reader.size for reader in readers.values())
        self._readers = readers

    @classmethod
    def open(cls, files: Files) -> Checkpoint:
        """Choose the weight files and read their headers, several at a time.

        The choice is that of transformers: ``model.safetensors``, even beside an index; else the
        shards of ``model.safetensors.index.json``; else the one other safetensors file.

        Raises:
            NotSafetensorsError: There are no safetensors weights.
            MalformedCheckpointError: A header or an index is not what its format promises.
            CheckpointError: It is not clear which file holds the weights.
        """
        chosen, promised = _choose(files)
        readers = {path: files.reader(path) for path in chosen}
        headers = _map_concurrently(
            lambda item: read_header(item[1], item[0]), list(readers.items()), _WORKERS
        )
        tensors: dict[str, TensorSpan] = {}
        for header in headers:
            for name, span in header.items():
                if name in tensors:
                    raise MalformedCheckpointError(
                        f"tensor {quoted(name)} of {quoted(files.name, 300)} is in two files",
                        got=f"{quoted(tensors[name].file)} and {quoted(span.file)}",
                        do="publish each tensor once: loaders disagree on which one counts",
                    )
                tensors[name] = span
        for name, path in promised.items():
            if name not in tensors or tensors[name].file != path:
                found = quoted(tensors[name].file) if name in tensors else "no such tensor"
                raise MalformedCheckpointError(
                    f"the index of {quoted(files.name, 300)} misplaces tensor {quoted(name)}",
                    expected=f"it in {quoted(path)}",
                    got=found,
                    do="save the model again with save_pretrained",
                )
        return cls(files, readers, tensors)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far, headers and index included."""
        return self.files.bytes_read

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""
        return {name: span.shape for name, span in self.tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Read rows ``start`` to ``stop`` (excluded) of a tensor.

        Returns:
            (stop - start, columns) float32: dimensions after the first are flattened.

        Raises:
            CarrierMissingError: No tensor has this name.
            CarrierError: Its dtype cannot carry a mark, or weights are not finite.
        """
        span = self._span(name)
        return read_rows(self._readers[span.file], span, start, stop)

    def read_blocks(
        self, blocks: Iterable[tuple[str, int, int]], workers: int = _WORKERS
    ) -> list[npt.NDArray[np.float32]]:
        """Read several ``(name, start, stop)`` at a time, as `read_rows` does.

        Returns:
            One array per block, in the order of the blocks.
        """
        return _map_concurrently(lambda block: self.read_rows(*block), list(blocks), workers)

    def iter_bytes(self, name: str, chunk: int = _CHUNK) -> Iterator[bytes]:
        """Read a tensor's stored bytes, up to ``chunk`` at a time, for a digest.

        Law: whatever ``chunk``, the parts joined are the tensor's bytes in the file.
        """
        if chunk < 1:
            raise CheckpointError("tensors are read in chunks of at least a byte", got=chunk)
        span = self._span(name)
        reader = self._readers[span.file]
        for start in range(span.start, span.stop, chunk):
            yield reader.read(start, min(start + chunk, span.stop))

    def _span(self, name: str) -> TensorSpan:
        try:
            return self.tensors[name]
        except KeyError:
            raise CarrierMissingError(
                f"{quoted(self.files.name, 300)} has no tensor {quoted(name)}",
                got=f"{len(self.tensors)} tensors with other names",
                do="check that the model has the architecture that was marked",
            ) from None


def _choose(files: Files) -> tuple[list[str], dict[str, str]]:
    """The weight files, and the shard of each tensor where an index promises it."""
    if _WEIGHTS in files.sizes:
        return [_WEIGHTS], {}
    top = [path for path in files.sizes if "/" not in path]
    indexes = [path for path in top if path.endswith(_INDEX_SUFFIX)]
    singles = [path for path in top if path.endswith(SUFFIX)]
    known = [path for path in _OTHER_LIBRARIES if path in singles]
    if _INDEX in indexes:
        return _shards(files, _INDEX)
    if len(known) == 1:
        return known, {}
    if len(indexes) == 1 and not known:
        return _shards(files, indexes[0])
    if len(singles) == 1:
        return singles, {}
    if indexes or singles:
        raise CheckpointError(
            f"it is not clear which file of {quoted(files.name, 300)} holds the weights",
            expected=f"{_WEIGHTS} or {_INDEX}",
            got=_listed(indexes + singles),
            do="download the one that is meant and give its path instead",
        )
    _refuse_no_weights(files)


def _refuse_no_weights(files: Files) -> NoReturn:
    pickles = [path for path in files.sizes if path.lower().endswith(_PICKLES)]
    if pickles:
        raise NotSafetensorsError(
            f"{quoted(files.name, 300)} has no safetensors weights, and pickles are never opened:"
            " opening one runs the code in it",
            expected=_WEIGHTS,
            got=_listed(pickles),
            do=_DO_CONVERT,
        )
    below = [path for path in files.sizes if path.endswith(SUFFIX)]
    raise NotSafetensorsError(
        f"{quoted(files.name, 300)} has no weights",
        expected=_WEIGHTS,
        got=f"only {_listed(below)} in folders below" if below else "no weight file",
        do="give the folder that holds the weights" if below else "check the name and the revision",
    )


def _shards(files: Files, index: str) -> tuple[list[str], dict[str, str]]:
    """Read an index; its shards in the order of their names."""
    where = f"{quoted(index)} of {quoted(files.name, 300)}"
    try:
        parsed: Any = json.loads(files.read(index, _INDEX_LIMIT).decode("utf-8"))
    except (ValueError, RecursionError):
        raise MalformedCheckpointError(f"{where} is not JSON", do="publish it again") from None
    promised = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if (
        not isinstance(promised, dict)
        or not promised
        or not all(isinstance(path, str) for path in promised.values())
    ):
        raise MalformedCheckpointError(
            f"{where} has no weight_map", expected="a file name for each tensor"
        )
    shards = sorted(set(promised.values()))
    for path in shards:
        if not _is_plain(path):
            raise MalformedCheckpointError(
                f"{where} points outside the repo or at no safetensors file",
                expected=f"plain names that end in {SUFFIX}",
                got=quoted(path),
                do="do not load this model",
            )
        if path not in files.sizes:
            raise MalformedCheckpointError(
                f"shard {quoted(path)}, which {where} names, is missing",
                do="upload the whole model again",
            )
    return shards, promised


def _is_plain(path: str) -> bool:
    """Whether a path stays inside its folder on every system, and is a safetensors file."""
    parts = path.split("/")
    return (
        path.endswith(SUFFIX)
        and not any(part in ("", ".", "..") for part in parts)
        and not any(sign in path for sign in ("\\", ":", "\0"))
    )


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(quoted(path) for path in sorted(paths)[:6])
    return f"{shown} and {len(paths) - 6} more" if len(paths) > 6 else shown


def _map_concurrently(
    function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int
) -> list[_Result]:
    """Map in threads, results in order; the first error stops what has not started."""
    if len(items) <= 1 or workers <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(workers, len(items)), "hf_watermark") as executor:
        return list(executor.map(function, items))
