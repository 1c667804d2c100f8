"""What the Hub tells about a repo: info, listing, tags from the card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import yaml  # type: ignore[import-untyped]
from starlette.responses import JSONResponse, Response

from hf_watermark.testing.accounts import can_read
from hf_watermark.testing.call import Call
from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.store import Commit, Entry, Repo

__all__ = ["front_matter", "list_repos", "repo_info"]

_LISTED = ("private", "tags", "pipeline_tag", "library_name", "createdAt", "likes", "downloads")
_FULL = (*_LISTED, "author", "sha", "lastModified", "gated", "disabled", "siblings")
_INFO = (*_FULL, "cardData", "config", "safetensors", "usedStorage", "spaces", "model-index")
_QUERY = {"author", "search", "filter", "pipeline_tag", "sort", "direction", "limit", "cursor"}
_QUERY |= {"full", "cardData", "config", "expand", "gated"}


def front_matter(text: str) -> object:
    """The YAML block at the top of a card: a dict if all is well, None if there is none.

    Raises:
        yaml.YAMLError: It is not YAML.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0].strip() != "---":
        return None
    try:
        end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
    except StopIteration:
        return None
    loaded: object = yaml.safe_load("\n".join(lines[1:end]))
    return loaded


def _card(repo: Repo, commit: Commit) -> dict[str, Any]:
    entry = commit.files.get("README.md")
    if entry is None:
        return {}
    try:
        data = front_matter(repo.read(entry).decode("utf-8", "replace"))
    except yaml.YAMLError:
        return {}
    # Dates and the like become strings, as they do on the way through the Hub.
    return json.loads(json.dumps(data, default=str)) if isinstance(data, dict) else {}


def _listed(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(one) for one in value] if isinstance(value, list) else []


def _tags(card: dict[str, Any], commit: Commit) -> list[str]:
    tags = _listed(card.get("library_name"))
    if any(path.endswith(".safetensors") for path in commit.files):
        tags.append("safetensors")
    tags += _listed(card.get("tags")) + _listed(card.get("language"))
    tags += [f"dataset:{name}" for name in _listed(card.get("datasets"))]
    relation = card.get("base_model_relation")
    if not isinstance(relation, str):
        is_adapter = "adapter_config.json" in commit.files
        relation = "adapter" if is_adapter else "finetune"
    for base in _listed(card.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    tags += [f"license:{name}" for name in _listed(card.get("license"))]
    tags += _listed(card.get("pipeline_tag"))
    return list(dict.fromkeys([*tags, "region:us"]))


def _sibling(path: str, entry: Entry, *, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs:
            lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
            sibling["lfs"] = lfs
    return sibling


def _safetensors(repo: Repo, commit: Commit) -> dict[str, Any] | None:
    """Numbers of parameters by dtype, from the files' headers."""
    parameters: dict[str, int] = {}
    for path, entry in commit.files.items():
        if not path.endswith(".safetensors"):
            continue
        try:
            with repo.blob_path(entry.sha256).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, 25_000_000)))
            header.pop("__metadata__", None)
            for tensor in header.values():
                dtype, count = tensor["dtype"], math.prod(tensor["shape"])
                parameters[dtype] = parameters.get(dtype, 0) + count
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
    if not parameters:
        return None
    return {"parameters": parameters, "total": sum(parameters.values())}


def _config(repo: Repo, commit: Commit) -> dict[str, Any]:
    entry = commit.files.get("config.json")
    try:
        raw = json.loads(repo.read(entry)) if entry is not None else {}
    except ValueError:
        raw = {}
    return {key: raw[key] for key in ("architectures", "model_type") if key in raw}


def _used_storage(repo: Repo) -> int:
    return sum(path.stat().st_size for path in (repo.folder / "blobs").iterdir())


def _describe(
    repo: Repo, commit: Commit, keys: Iterable[str], *, blobs: bool = False
) -> dict[str, Any]:
    """The asked-for keys of a repo's info; keys that it does not have are left out."""
    card = _card(repo, commit)
    index = card.pop("model-index", None)
    makers: dict[str, Callable[[], Any]] = {
        "author": lambda: repo.namespace,
        "sha": lambda: commit.id,
        "lastModified": lambda: commit.date,
        "createdAt": lambda: repo.created_at,
        "private": lambda: repo.private,
        "gated": lambda: repo.gated,
        "disabled": lambda: False,
        "downloads": lambda: 0,
        "likes": lambda: 0,
        "tags": lambda: _tags(card, commit),
        "pipeline_tag": lambda: card.get("pipeline_tag"),
        "library_name": lambda: card.get("library_name"),
        "cardData": lambda: card or None,
        "model-index": lambda: index,
        "config": lambda: _config(repo, commit) if repo.type == "model" else None,
        "safetensors": lambda: _safetensors(repo, commit) if repo.type == "model" else None,
        "siblings": lambda: [
            _sibling(path, entry, blobs=blobs) for path, entry in commit.files.items()
        ],
        "usedStorage": lambda: _used_storage(repo),
        "spaces": lambda: [],
    }
    described: dict[str, Any] = {"_id": repo.created_at, "id": repo.id}
    if repo.type == "model":
        described["modelId"] = repo.id
    for key in keys:
        value = makers[key]() if key in makers else None
        if value is not None:
            described[key] = value
    return described


async def repo_info(call: Call) -> Response:
    """GET api/T/R[/revision/rev]."""
    commit = call.repo.resolve(call.only_arg() or "main")
    keys: Iterable[str] = call.request.query_params.getlist("expand") or _INFO
    return JSONResponse(_describe(call.repo, commit, keys, blobs=call.flag("blobs")))


async def list_repos(call: Call) -> Response:
    """GET api/T, with filters and pages. `args` is the repo type."""
    query = call.request.query_params
    unknown = set(query.keys()) - _QUERY
    if unknown:
        raise Refusal.bad_request(f"The loopback Hub cannot filter by {sorted(unknown)}")
    (repo_type,) = call.args
    keys: list[str] = query.getlist("expand") or list(_FULL if call.flag("full") else _LISTED)
    keys += [key for key in ("cardData", "config") if call.flag(key)]
    author, search = query.get("author"), query.get("search", "").lower()
    wanted = [tag for one in query.getlist("filter") for tag in one.split(",")]
    wanted += query.getlist("pipeline_tag")
    found: list[tuple[Repo, Commit]] = []
    for repo in call.site.store:
        if repo.type != repo_type or not can_read(call.user, repo):
            continue
        if author not in (None, repo.namespace) or search not in repo.id.lower():
            continue
        if "gated" in query and bool(repo.gated) != call.flag("gated"):
            continue
        commit = repo.resolve("main")
        if not set(wanted) <= {*_tags(_card(repo, commit), commit), repo.type}:
            continue
        found.append((repo, commit))
    sort = query.get("sort", "createdAt")
    found.sort(
        key=lambda pair: pair[1].date if sort == "lastModified" else pair[0].created_at,
        reverse=query.get("direction", "-1") != "1",
    )
    limit = query.get("limit", "")
    size = min(int(limit), call.site.page_size) if limit.isdigit() and int(limit) else None
    chosen, headers = call.page(found, size)
    return JSONResponse([_describe(repo, head, keys) for repo, head in chosen], headers=headers)
