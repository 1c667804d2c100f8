"""How many threads BLAS may use."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

__all__ = ["one_thread"]


def one_thread() -> contextlib.AbstractContextManager[object]:
    """One thread for BLAS in the whole process, if threadpoolctl is there to say so.

    Our products are small: a ViT-B is marked in .6 s of one core. Threads gain nothing on idle
    cores, and on shared ones they wait for each other (8 s instead of 2.4 on two busy cores). And
    the sums do not depend on how many cores there are.
    """
    try:
        threadpoolctl: Any = importlib.import_module("threadpoolctl")
    except ImportError:
        return contextlib.nullcontext()
    limits: contextlib.AbstractContextManager[object] = threadpoolctl.threadpool_limits(1, "blas")
    return limits
