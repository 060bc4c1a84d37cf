"""Lean imports: libraries without what they import at their own import and a run never uses.

In: a block of imports. Out: the same modules without torch's compiler, a second of every start,
which bitsandbytes and DeepSpeed load to decorate functions for devices and optimizers of others,
and without mlflow, which DeepSpeed's autotuner loads where it is installed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

UNUSED = ("mlflow",)
"""Packages that count as absent meanwhile, if nobody imported them before."""


@contextmanager
def lean() -> Iterator[None]:
    """Import without what is not used; `torch.compile` compiles at a function's first call.

    Changes this process's modules while it runs, so no other thread may import meanwhile.
    """
    compile_now = torch.compile
    hidden = [name for name in UNUSED if name not in sys.modules]
    torch.compile = functools.partial(_later, compile_now)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: no such package
    try:
        yield
    finally:
        torch.compile = compile_now
        for name in hidden:
            if sys.modules.get(name, compile_now) is None:
                del sys.modules[name]


def _later(compile_now: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    """Stand for `torch.compile`, as a decorator with and without options."""
    if model is None:
        return functools.partial(_later, compile_now, **options)
    if not isinstance(model, FunctionType):
        return compile_now(model, **options)

    @functools.lru_cache(maxsize=1)
    def compiled() -> Callable[..., Any]:
        made: Callable[..., Any] = compile_now(model, **options)
        return made

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
