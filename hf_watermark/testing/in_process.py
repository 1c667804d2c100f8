"""Pointing clients that are already imported at another endpoint.

`HF_ENDPOINT` and the like are read when `huggingface_hub` and `datasets` are imported, and copied
from module to module under a few names. All copies are swapped, and swapped back at the end, also
in modules that were imported in between.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

__all__ = ["patched_clients"]

_PACKAGES = ("huggingface_hub", "transformers", "datasets", "accelerate", "peft", "hf_watermark")
_UNSET = (
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_OIDC_RESOURCE",
    "HF_STORED_TOKENS_PATH",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
)


def _constants(environment: Mapping[str, str]) -> dict[str, Any]:
    """Values by the names under which the clients keep them."""
    endpoint, home = environment["HF_ENDPOINT"], environment["HF_HOME"]
    datasets_cache = environment["HF_DATASETS_CACHE"]
    return {
        "ENDPOINT": endpoint,
        "HF_ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HUB_DATASETS_URL": endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HOME": home,
        "HF_CACHE_HOME": home,
        "HF_HUB_CACHE": environment["HF_HUB_CACHE"],
        "HUGGINGFACE_HUB_CACHE": environment["HF_HUB_CACHE"],
        "HF_ASSETS_CACHE": environment["HF_ASSETS_CACHE"],
        "HF_TOKEN_PATH": environment["HF_TOKEN_PATH"],
        "HF_STORED_TOKENS_PATH": os.path.join(home, "stored_tokens"),
        "HF_DATASETS_CACHE": datasets_cache,
        "DOWNLOADED_DATASETS_PATH": os.path.join(datasets_cache, "downloads"),
        "EXTRACTED_DATASETS_PATH": os.path.join(datasets_cache, "downloads", "extracted"),
        "HF_MODULES_CACHE": environment["HF_MODULES_CACHE"],
        "AGENT_HARNESSES_PATH": os.path.join(home, ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_UPDATE_CHECK": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
    }


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] in _PACKAGES:
            yield module


def _shared_apis() -> Iterator[Any]:
    """The `HfApi` objects that modules share: each keeps the endpoint it was made with."""
    from huggingface_hub import HfApi

    for module in _modules():
        for value in list(vars(module).values()):
            if isinstance(value, HfApi):
                yield value


def _like(value: Any, old: object) -> Any:
    """The value in the type of what it replaces."""
    return Path(value) if isinstance(old, Path) else value


def _reset_clients() -> None:
    """Drop pooled connections and what was remembered about the former endpoint."""
    import huggingface_hub
    from huggingface_hub import hf_file_system

    huggingface_hub.close_session()
    for api in _shared_apis():
        api._whoami_cache.clear()
    hf_file_system.HfFileSystem.clear_instance_cache()


@contextlib.contextmanager
def patched_clients(environment: Mapping[str, str]) -> Iterator[None]:
    """Make clients in this process see `environment`, and undo it at the end.

    Args:
        environment: `LoopbackHub.environment()`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    endpoint = environment["HF_ENDPOINT"]
    before = {key: os.environ.get(key) for key in (*environment, *_UNSET)}
    former = {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HOME": constants.HF_HOME,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_ASSETS_CACHE": constants.HF_ASSETS_CACHE,
        "HF_TOKEN_PATH": constants.HF_TOKEN_PATH,
        "HF_DATASETS_CACHE": os.path.join(constants.HF_HOME, "datasets"),
        "HF_MODULES_CACHE": os.path.join(constants.HF_HOME, "modules"),
    }
    # For modules imported inside the block, which copied our values.
    fallback = {**_constants(former), "HF_HUB_OFFLINE": constants.HF_HUB_OFFLINE}
    fallback["HF_HUB_DISABLE_XET"] = constants.HF_HUB_DISABLE_XET
    fallback["HF_HUB_DISABLE_TELEMETRY"] = constants.HF_HUB_DISABLE_TELEMETRY
    fallback["HF_HUB_DISABLE_UPDATE_CHECK"] = constants.HF_HUB_DISABLE_UPDATE_CHECK
    ours = _constants(environment)
    saved: list[tuple[ModuleType, str, Any]] = []

    def put(module: ModuleType, name: str, value: Any) -> None:
        saved.append((module, name, vars(module)[name]))
        setattr(module, name, value)

    host = (urlsplit(endpoint).hostname or "").lower()
    try:
        for key in _UNSET:
            os.environ.pop(key, None)
        os.environ.update(environment)
        for module in _modules():
            for name in ours.keys() & vars(module).keys():
                old = vars(module)[name]
                if isinstance(old, (str, bool, Path)):
                    put(module, name, _like(ours[name], old))
        put(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {host})
        put(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(endpoint)})
        for api in _shared_apis():
            api.endpoint = endpoint
        _reset_clients()
        yield
    finally:
        for api in _shared_apis():
            if api.endpoint == endpoint:
                api.endpoint = former["HF_ENDPOINT"]
        for module, name, value in reversed(saved):
            setattr(module, name, value)
        known = {(id(module), name) for module, name, _ in saved}
        for module in _modules():
            for name in ours.keys() & vars(module).keys():
                now = vars(module)[name]
                if (id(module), name) not in known and now == _like(ours[name], now):
                    setattr(module, name, _like(fallback[name], now))
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        _reset_clients()
