"""Calls in processes of their own, which find torch imported and nothing else that others left."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# A server that has imported torch forks them: the import takes seconds, and there are dozens.
CONTEXT = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
CONTEXT.set_forkserver_preload(["bench.memory"])


def in_fresh_process(
    call: Callable[Arguments, Result], *args: Arguments.args, **options: Arguments.kwargs
) -> Result:
    """What a function of a module returns or raises there; BrokenProcessPool if it was ended."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(call, *args, **options).result()
