"""The YAML at the head of a model card: our two keys put in and taken out, the rest as found.

The Hub's own round trip (`ModelCard.load(...).save(...)`) loses YAML comments and null keys and
turns `1.10` into `1.1`, so the front matter is edited as text: PyYAML's nodes say where a value
starts and ends, lines are spliced there, and the result is parsed again and compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hf_watermark.errors import CardError
from hf_watermark.evidence import CLAIM_FORMAT

__all__ = ["TAG", "line_break_of", "parse", "split_card", "with_keys", "without_keys"]

TAG = "watermark"

# The Hub's own expression for the front matter (huggingface_hub.repocard.REGEX_YAML_BLOCK).
_FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_WAS = "# hf-watermark: was "
# What PyYAML raises for broken input, not all of it wrapped: `!!bool x` is a KeyError.
_BROKEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def line_break_of(text: str) -> str:
    """That of its first line; a line feed for a lone carriage return, or where there is none."""
    first = _LINE_BREAK.search(text)
    return "\r\n" if first is not None and first[0] == "\r\n" else "\n"


def split_card(text: str) -> tuple[str, str, str, str, str]:
    """BOM, opening line, YAML (whole lines), closing line, body; joined they are the text.

    The three in the middle are empty if there is no front matter.
    """
    bom = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix("\ufeff")
    match = _FRONT_MATTER.search(text)
    if match is None:
        return bom, "", "", "", text
    start, stop, after = match.end(1), match.start(3), match.end()
    stop += 2 if match[3].startswith("\r\n") else 1
    return bom, match[1], text[start:stop], text[stop:after], text[after:]


def parse(front: str) -> dict[Any, Any]:
    """The data of a front matter; none is an empty mapping.

    Raises:
        CardError: If it is invalid, or no mapping.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        data = yaml.safe_load(front)
    except (yaml.YAMLError, *_BROKEN) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 2}"
        raise CardError(
            f"The YAML front matter of README.md is invalid{where}",
            got=getattr(error, "problem", None) or type(error).__name__,
            do="repair what stands between the two lines --- and run it again",
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise CardError(
            "The front matter of README.md is no mapping",
            expected="lines such as `license: mit` between two lines ---",
            got=f"a {type(data).__name__}",
            do="put a blank line before a first line --- that is meant as a rule",
        )
    return data


def with_keys(front: str, fields: dict[str, Any], line_break: str) -> str:
    """A front matter with `watermark` set to `fields`, and the tag.

    Raises:
        CardError: If it is invalid, or has a `watermark` or `tags` of another kind.
    """
    before = parse(front)
    if before.get("watermark") is not None and not _is_ours(before["watermark"]):
        raise CardError(
            "README.md has a YAML key `watermark` of another kind",
            expected=f"format: {CLAIM_FORMAT} in it",
            got=type(before["watermark"]).__name__,
            do="rename that key and run it again",
        )
    if isinstance(before.get("tags"), dict):
        raise CardError(
            "`tags` in README.md is a mapping", expected="a list", do="make it a list of words"
        )
    tags = _tags(before)
    tags = tags if TAG in tags else [*tags, TAG]
    after = {**before, "watermark": fields, "tags": tags}
    edited = _put_tag(_put_watermark(front, fields, line_break), line_break)
    # Aliases, flow mappings and other rarities: the data survive, comments do not.
    return edited if _holds(edited, after) else _dump(after, line_break)


def without_keys(front: str) -> str:
    """A front matter without `watermark` and the tag; as it is if that `watermark` is not ours.

    Raises:
        CardError: If it is invalid.
    """
    before = parse(front)
    tags = _tags(before)
    if not _is_ours(before.get("watermark")):
        return front
    after = {key: value for key, value in before.items() if key != "watermark"}
    after["tags"] = [tag for tag in tags if tag != TAG]
    edited = _drop_watermark(_drop_tag(front))
    if not edited or _holds(edited, after):
        return edited
    return _dump(after, line_break_of(front))


def _dump(data: Mapping[Any, Any], line_break: str = "\n") -> str:
    import yaml

    text: str = yaml.safe_dump(
        dict(data), sort_keys=False, allow_unicode=True, width=math.inf, line_break=line_break
    )
    return text


def _is_ours(value: Any) -> bool:
    form = value.get("format") if isinstance(value, dict) else None
    return isinstance(form, str) and form.startswith("hf-watermark/")


def _tags(data: Mapping[Any, Any]) -> list[Any]:
    tags = data.get("tags")
    if isinstance(tags, list):
        return tags
    return [] if tags is None or tags == "" else [tags]


def _holds(front: str, expected: dict[Any, Any]) -> bool:
    """Whether it parses to these data; dumps compare NaN, 1 and True rightly, and in linear time.

    No tags, an empty list and null are the same, and so are one tag and a list of one.
    """
    try:
        data = parse(front)
    except CardError:
        return False
    return _normal(data) == _normal(expected)


def _normal(data: dict[Any, Any]) -> str:
    others = {key: value for key, value in data.items() if key != "tags"}
    return _dump({**others, "tags": _tags(data)})


def _find(front: str) -> tuple[int, dict[str, tuple[Any, Any]]]:
    """The column of the top-level keys, and the nodes of each key and its value, by name."""
    import yaml

    try:
        root = yaml.compose(front, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, *_BROKEN):
        return 0, {}
    if root is None or root.id != "mapping":
        return 0, {}
    pairs = {key.value: (key, value) for key, value in root.value if isinstance(key.value, str)}
    return root.start_mark.column, pairs


def _end(node: Any) -> int:
    """The index after a node's last sign; a block collection itself ends at the next key."""
    last = node
    while isinstance(last.value, list) and not last.flow_style and last.value:
        last = last.value[-1][1] if isinstance(last.value[-1], tuple) else last.value[-1]
    index: int = last.end_mark.index
    return index


def _next_line(front: str, index: int) -> int:
    if front[:index].endswith(("\r", "\n")):  # block scalars end after their last line break
        return index
    match = _LINE_BREAK.search(front, index)
    return len(front) if match is None else match.end()


def _this_line(front: str, index: int) -> int:
    return max(front.rfind("\n", 0, index), front.rfind("\r", 0, index)) + 1


def _indented(lines: str, column: int) -> str:
    return "".join(" " * column + line for line in lines.splitlines(keepends=True))


def _put_watermark(front: str, fields: dict[str, Any], line_break: str) -> str:
    column, pairs = _find(front)
    block = _indented(_dump({"watermark": fields}, line_break), column)
    if "watermark" not in pairs:
        return front + block
    key, value = pairs["watermark"]
    start = _this_line(front, key.start_mark.index)
    return front[:start] + block + front[_next_line(front, _end(value)) :]


def _put_tag(front: str, line_break: str) -> str:
    column, pairs = _find(front)
    if "tags" not in pairs:  # after `watermark`: there `_drop_tag` knows that the key is ours
        return front + _indented(f"tags:{line_break}- {TAG}{line_break}", column)
    value = pairs["tags"][1]
    start: int = value.start_mark.index
    end = _end(value)
    stop = _next_line(front, end)
    if value.id == "sequence":
        items = value.value
        if any(item.value == TAG for item in items):
            return front
        quote = items[-1].style if items and items[-1].id == "scalar" else None
        word = f"{quote}{TAG}{quote}" if quote in ("'", '"') else TAG
        if not value.flow_style:
            line = _indented(f"- {word}{line_break}", value.start_mark.column)
            return front[:stop] + line + front[stop:]
        at = _end(items[-1]) if items else start + 1
        return front[:at] + (f", {word}" if items else word) + front[at:]
    if value.value == TAG:
        return front
    source = front[start:end]
    if not source:
        return front[:stop] + _indented(f"- {TAG}{line_break}", column) + front[stop:]
    # One tag, or a null that is spelled out: the line is kept in a comment.
    words = [TAG] if value.tag.endswith(":null") or not value.value else [source, TAG]
    lines = "".join(f"- {word}{line_break}" for word in words)
    return front[:start] + _WAS + front[start:stop] + _indented(lines, column) + front[stop:]


def _drop_tag(front: str) -> str:
    _, pairs = _find(front)
    if "tags" not in pairs or pairs["tags"][1].id != "sequence":
        return front
    key, value = pairs["tags"]
    items = value.value
    index = next((i for i, item in enumerate(items) if item.value == TAG), None)
    if index is None:
        return front
    item = items[index]
    if value.flow_style:
        start, stop = item.start_mark.index, _end(item)
        if index:
            start = _end(items[index - 1])
        elif len(items) > 1:
            stop = items[1].start_mark.index
        return front[:start] + front[stop:]
    names = list(pairs)
    if len(items) == 1 and "watermark" in names[: names.index("tags")]:
        start = _this_line(front, key.start_mark.index)
    else:
        start = _this_line(front, item.start_mark.index)
        was = front.find(_WAS, key.end_mark.index, value.start_mark.index)
        if was >= 0 and len(items) <= 2:
            front_line = front[was + len(_WAS) : _next_line(front, was)]
            return front[:was] + front_line + front[_next_line(front, _end(value)) :]
    return front[:start] + front[_next_line(front, _end(item)) :]


def _drop_watermark(front: str) -> str:
    _, pairs = _find(front)
    if "watermark" not in pairs:
        return front
    key, value = pairs["watermark"]
    start = _this_line(front, key.start_mark.index)
    return front[:start] + front[_next_line(front, _end(value)) :]
