"""Fixtures: name this module in `pytest_plugins` of a `conftest.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_watermark.testing.hub import LoopbackHub

__all__ = ["loopback_hub", "loopback_server"]


@pytest.fixture
def loopback_server(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A fresh loopback Hub; clients in this process do not know of it."""
    with LoopbackHub(tmp_path / "loopback_hub") as hub:
        yield hub
    bugs = [served.error for served in hub.requests if served.error is not None]
    assert not bugs, f"the loopback Hub itself failed:\n{bugs[0]}"


@pytest.fixture
def loopback_hub(loopback_server: LoopbackHub) -> Iterator[LoopbackHub]:
    """A fresh loopback Hub that the clients in this process, and its children, use."""
    with loopback_server.in_process():
        yield loopback_server
