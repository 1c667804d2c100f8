"""Answers of an endpoint, kept line by line as they come: `hf-watermark-answers/1`.

The first line names the format and the endpoint, every other an image's SHA-256 and the answer. A
line that a crash cut short is dropped. Images that were answered are not asked about again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hf_watermark.errors import OutputsError
from hf_watermark.safetensors_ranges import quoted

__all__ = ["FILE_FORMAT", "AnswerLog", "image_key"]

FILE_FORMAT = "hf-watermark-answers/1"


def image_key(content: bytes) -> str:
    """SHA-256 of an image's file, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


class AnswerLog:
    """Answers by image, in memory and, with a path, in a file.

    Args:
        path: Made with the first answer; None keeps nothing.
        endpoint: Whose answers.

    Raises:
        OutputsError: If the file is something else, or another endpoint's.
    """

    def __init__(self, path: str | os.PathLike[str] | None, endpoint: str) -> None:
        self._path = None if path is None else Path(path)
        self._endpoint = endpoint
        self._begun = False
        self.answers: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            self._read(self._path)

    @property
    def said(self) -> str:
        """How many answers there are, and where."""
        where = "none of them kept" if self._path is None else f"kept in {self._path}"
        return f"{len(self.answers)} answers so far, {where}"

    @property
    def advice(self) -> str:
        """What to do when an endpoint failed."""
        if self._path is None:
            return "name a file for the answers (--answers FILE.jsonl), and run it again"
        return "run it again: it goes on from there"

    def add(self, image: str, answer: Any) -> None:
        """Keep one more answer, on disk before anything else is asked.

        Raises:
            OutputsError: If it cannot be written.
        """
        if self._path is not None:
            line = json.dumps({"image": image, "answer": answer}) + "\n"
            text = line if self._begun else self._head() + line
            try:
                with self._path.open("a", encoding="ascii") as file:
                    file.write(text)
            except OSError as error:
                raise OutputsError(
                    f"The answers cannot be written to {self._path}", got=error.strerror
                ) from None
            self._begun = True
        self.answers[image] = answer

    def _head(self) -> str:
        return json.dumps({"format": FILE_FORMAT, "endpoint": self._endpoint}) + "\n"

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            if self._head().encode().startswith(content):  # empty, or cut in the first line
                os.truncate(path, 0)
                return
            whole, _, cut = content.rpartition(b"\n")
            head, *lines = [json.loads(line) for line in whole.split(b"\n")]
            form, endpoint = head["format"], head["endpoint"]
            answers = {str(line["image"]): line["answer"] for line in lines}
        except OSError as error:
            raise OutputsError(f"{path} cannot be read", got=error.strerror) from None
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._foreign("something else") from None
        if form != FILE_FORMAT:
            raise self._foreign(quoted(str(form), 60))
        if endpoint != self._endpoint:
            raise OutputsError(
                f"{path} holds another endpoint's answers",
                expected=self._endpoint,
                got=quoted(str(endpoint), 200),
                do="name another file",
            )
        self.answers, self._begun = answers, True
        if cut:
            os.truncate(path, len(content) - len(cut))

    def _foreign(self, got: str) -> OutputsError:
        return OutputsError(
            f"{self._path} is no file of answers",
            expected=FILE_FORMAT,
            got=got,
            do="name another file",
        )
