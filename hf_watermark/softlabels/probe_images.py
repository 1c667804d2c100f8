"""Images on disk or in a `datasets.Dataset`, in a fixed order, as bytes and as pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_watermark.errors import SoftLabelError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ProbeImages", "image_files", "open_images"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_USUAL = ("image", "img")


class ProbeImages:
    """n images, always in the same order.

    Args:
        source: A `datasets.Dataset` with a column of images; a folder that `save_to_disk` wrote; a
            `.parquet` file or a folder of them; or a folder of image files, taken in the order of
            their paths.
        column: Which column; needed if several hold images.

    Raises:
        SoftLabelError: If it holds no images, or cannot be read.
    """

    def __init__(self, source: Any, column: str | None = None) -> None:
        from datasets import Image

        named = "the dataset"
        if isinstance(source, (str, os.PathLike)):
            named = str(source)
            source = open_images(Path(source).expanduser())
        column = _column(source, column, named)
        raw = source.select_columns([column])
        if isinstance(source.features[column], dict) or not _is_image(source.features[column]):
            raw = _cast(raw, column, named)
        self._raw = raw.cast_column(column, Image(decode=False))
        self._column = column
        if not len(raw):
            raise SoftLabelError(f"There are no images in {named}")

    def __len__(self) -> int:
        return len(self._raw)

    def encoded(self, place: int) -> bytes:
        """One image's file, as it lies there: JPEG, PNG or the like.

        Raises:
            SoftLabelError: If it cannot be read.
        """
        item = self._raw[place][self._column] or {}
        try:
            content = item.get("bytes")
            return bytes(content) if content else Path(item["path"]).read_bytes()
        except (OSError, KeyError, TypeError) as error:
            got = getattr(error, "strerror", None) or "nothing"
            raise SoftLabelError(f"Image {place} cannot be read", got=got) from None

    def picture(self, place: int) -> Image:
        """One image as RGB.

        Raises:
            SoftLabelError: If it cannot be decoded.
        """
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise SoftLabelError("Pillow is missing", do="pip install pillow") from None
        try:
            with Image.open(io.BytesIO(self.encoded(place))) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except SoftLabelError:
            raise
        except Exception as error:  # Pillow raises errors of many kinds
            raise SoftLabelError(
                f"Image {place} cannot be decoded",
                expected="PNG, JPEG or another image",
                got=type(error).__name__,
            ) from None

    def batches(self, size: int) -> Iterator[list[Image]]:
        """All pictures, `size` at a time."""
        for start in range(0, len(self), size):
            yield [self.picture(i) for i in range(start, min(start + size, len(self)))]


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, at any depth, in the order in which they are taken."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def open_images(path: Path) -> Any:
    """The dataset on disk; nothing is copied into the cache of `datasets`.

    Args:
        path: A folder that `save_to_disk` wrote; a `.parquet` file or a folder of them; or a folder
            of image files, at any depth, in the order of their paths.

    Raises:
        SoftLabelError: If it is none of these.
    """
    import datasets

    try:
        if path.is_dir() and (path / "state.json").exists():
            return datasets.Dataset.load_from_disk(str(path))
        tables = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if tables and all(table.suffix == ".parquet" for table in tables):
            import pyarrow.parquet

            parts = [datasets.Dataset(pyarrow.parquet.read_table(table)) for table in tables]
            return datasets.concatenate_datasets(parts)
        if path.is_dir():
            columns = {"image": [str(file) for file in image_files(path)]}
            return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        got = "another kind of file" if path.exists() else "No such file or directory"
    except Exception as error:  # datasets and pyarrow have errors of many kinds
        got = getattr(error, "strerror", None) or type(error).__name__
    raise SoftLabelError(
        f"The images in {path} cannot be read",
        expected="a folder of images, parquet, or a folder of datasets' save_to_disk",
        got=got,
    )


def _column(dataset: Any, column: str | None, named: str) -> str:
    try:
        names = list(dataset.column_names)
        images = [name for name in names if _is_image(dataset.features[name])]
    except (AttributeError, TypeError):
        raise SoftLabelError(
            "The images are no dataset",
            expected="a datasets.Dataset (one split), or a path",
            got=type(dataset).__name__,
        ) from None
    if column is None:
        found = images or [name for name in _USUAL if name in names]
        column = found[0] if len(found) == 1 else None
    if column is None or column not in names:
        raise SoftLabelError(
            f"It is not clear which column of {named} holds the images",
            expected="one column of images",
            got=", ".join(names)[:200] or "no columns",
            do="name it (--column NAME)",
        )
    return column


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _cast(dataset: Any, column: str, named: str) -> Any:
    """Parquet that does not say so: a struct of bytes and path, or plain bytes."""
    from datasets import Image

    try:
        return dataset.cast_column(column, Image())
    except Exception as error:  # pyarrow's errors
        raise SoftLabelError(
            f"The column {column!r} of {named} holds no images", got=type(error).__name__
        ) from None
