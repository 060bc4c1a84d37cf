"""Lean imports: libraries without what they import at their own import and a run never uses.

In: a block of imports. Out: the same modules without torch's compiler, which bitsandbytes and
DeepSpeed load to decorate functions for devices and optimizers of others and transformers for one
kind of mask; without sympy, which the types of torch's distributed tensors bring; and without what
transformers shards and detects objects with. Together they are half of what such a block takes.
What stands for a name imports it when it is called, so whoever does use it waits then.
"""

from __future__ import annotations

import functools
import gc
import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch._compile import _disable_dynamo

UNUSED = ("mlflow", "boto3")
"""Packages that count as absent meanwhile, if nobody imported them before: what DeepSpeed's
autotuner and accelerate's questions about other people's clusters load where it is installed."""
DYNAMO = "torch._dynamo"
SHAPES = "torch.fx.experimental.symbolic_shapes"
PLAIN: dict[str, Callable[..., bool | int]] = {
    "expect_true": lambda one: one,
    "guard_or_false": lambda one: one,
    "guard_or_true": lambda one: one,
    "guard_size_oblivious": lambda one: one,
    "guarding_hint_or_throw": lambda one: one,
    "has_guarding_hint": lambda _: True,
    "is_nested_int": lambda _: False,
    "statically_known_true": lambda one: one,
    "sym_and": lambda *several: functools.reduce(operator.and_, several),
    "sym_eq": lambda one, other: one == other,
    "sym_or": lambda *several: functools.reduce(operator.or_, several),
}
"""What functions of `SHAPES` say of bool, int and tuples of them, which are no symbols."""
MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators of `torch.compiler` and `torch._dynamo` that tell the compiler what to do with a
function: without a compiler it is what it was."""
HIDDEN = "__dynamo_disable"
"""Attribute of a function in which torch keeps what stands for it."""
LATER = {
    # transformers.masking_utils: masks made by vmap; imports torch._dynamo
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
    # torch.distributed.tensor and operations on meta tensors, for shapes that only a compiler does
    # not know; imports sympy
    SHAPES: ("GuardOnDataDependentSymNode", *PLAIN),
    # transformers.distributed: sharding and checkpoints of its own
    "torch.distributed._composable.fsdp": ("fully_shard",),
    "torch.distributed.fsdp": ("CPUOffloadPolicy", "MixedPrecisionPolicy"),
    "torch.distributed.checkpoint.hf_storage": (
        "HuggingFaceStorageReader",
        "HuggingFaceStorageWriter",
    ),
    # transformers.loss: boxes of objects in pictures
    "scipy.optimize": ("linear_sum_assignment",),
    # operations on meta tensors look whether a number is one of its symbols
    "sympy": ("Basic",),
}
"""Modules that are imported when one of these names of theirs is called. Where something else of
them is asked for, they are imported at once, and all of them with `REAL`."""
REAL = (DYNAMO, SHAPES, "torch.utils._sympy")
"""Modules, and parts of them, that take what no stand-in is."""


@contextmanager
def lean() -> Iterator[None]:
    """Import without what is not used; `torch.compile` compiles at a function's first call.

    No garbage is looked for meanwhile either: imports leave none, and it is a tenth of their time.

    Changes this process's modules while it runs, so no other thread may import meanwhile.
    """
    compile_now, marks = torch.compile, {name: getattr(torch.compiler, name) for name in MARKS}
    hidden = [name for name in UNUSED if name not in sys.modules]
    if DYNAMO not in sys.modules:
        torch._dynamo = Compiler(DYNAMO)
    torch.compile = functools.partial(_later, compile_now, lambda: True)
    for name, mark in marks.items():
        setattr(torch.compiler, name, functools.partial(_later, mark, _compiler_is_there))
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: no such package
    collects = gc.isenabled()
    gc.disable()
    try:
        with postponed(*LATER):
            yield
    finally:
        if collects:
            gc.enable()
        torch.compile = compile_now
        for name, mark in marks.items():
            setattr(torch.compiler, name, mark)
        if isinstance(vars(torch).get("_dynamo"), Compiler):
            del torch._dynamo  # torch imports it when it is asked for
        for name in hidden:
            if sys.modules.get(name, compile_now) is None:
                del sys.modules[name]


@contextmanager
def postponed(*names: str) -> Iterator[None]:
    """Import none of these of `LATER` while the block runs, unless they are used."""
    lookout, absent = Lookout(), [name for name in names if name not in sys.modules]
    sys.modules.update({name: Postponed(name) for name in absent})
    sys.meta_path.insert(0, lookout)
    try:
        yield
    finally:
        sys.meta_path.remove(lookout)
        for name in absent:
            _forget(name)


def spare_compiler() -> None:
    """Have what torch hides from its compiler run without it, as long as nobody has imported it.

    torch wraps such functions (meta tensors' operations, custom operations, checkpointing) in
    `_disable_dynamo`. At the first call that imports the compiler for nothing but to hide them from
    it, and keeps what is to be called in an attribute of theirs, which is given here before.
    Checkpointing also asks `torch._dynamo`, whose stand-in stays until it is imported.
    """
    if not _compiler_is_there():
        torch._dynamo = Compiler(DYNAMO)
    wrapper = _disable_dynamo(lambda: None).__code__
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__ is wrapper and one.__closure__:
            held = dict(zip(wrapper.co_freevars, one.__closure__, strict=True))
            function, recursive = (held[name].cell_contents for name in ("fn", "recursive"))
            if type(function) is FunctionType and not hasattr(function, HIDDEN):
                setattr(function, HIDDEN, _until_compiler(function, recursive=recursive))


def _until_compiler(function: FunctionType, *, recursive: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _compiler_is_there():
            return function(*args, **kwargs)
        hidden = importlib.import_module(DYNAMO).disable(function, recursive, wrapping=False)
        setattr(function, HIDDEN, hidden)
        return hidden(*args, **kwargs)

    return call


class Compiler(ModuleType):
    """Stands for `torch._dynamo` as `torch` has it, for what decorates functions by it."""

    def __getattr__(self, name: str) -> Any:
        def real(*args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(DYNAMO), name)(*args, **kwargs)

        if name in MARKS:
            return functools.partial(_later, real, _compiler_is_there)
        if name == "config" and not _compiler_is_there():
            return Settings(f"{DYNAMO}.{name}")
        return getattr(importlib.import_module(DYNAMO), name)


class Settings(ModuleType):
    """Stands for the compiler's settings; checkpointing notes one in case that it compiles."""

    error_on_nested_fx_trace = True

    def __setattr__(self, name: str, value: object) -> None:
        setattr(importlib.import_module(DYNAMO).config, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(DYNAMO).config, name)


class Lookout:
    """Sees the compiler come, or what it is made of."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        """Find nothing, but have the modules themselves imported from now on."""
        if name.startswith(REAL):
            for module in LATER:
                _forget(module)


class Postponed(ModuleType):
    """Stands for a module in `from MODULE import NAME`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in LATER[self.__name__]:
            return getattr(_imported(self.__name__), name)
        return StandIn(name, (), {"_of": self.__name__})


class StandIn(type):
    """Stands for a function or class of a postponed module: what is made or asked is the real one.

    Nothing is an instance of a class that nobody has imported.
    """

    _of: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls._of == SHAPES and all(map(_is_plain, args)):
            return PLAIN[cls.__name__](*args)
        return getattr(_imported(cls._of), cls.__name__)(*args, **kwargs)

    def __instancecheck__(cls, one: object) -> bool:
        module = sys.modules.get(cls._of)
        is_there = module is not None and not isinstance(module, Postponed)
        return is_there and isinstance(one, getattr(module, cls.__name__))


def _is_plain(one: object) -> bool:
    return type(one) in (bool, int) or (type(one) is tuple and all(map(_is_plain, one)))


def _imported(name: str) -> ModuleType:
    """Return the module itself."""
    _forget(name)
    return importlib.import_module(name)


def _forget(name: str) -> None:
    if isinstance(sys.modules.get(name), Postponed):
        del sys.modules[name]


def _compiler_is_there() -> bool:
    return DYNAMO in sys.modules


def _later(
    decorate: Callable[..., Any], due: Callable[[], bool], model: Any = None, **options: Any
) -> Any:
    """Stand for a decorator, with and without options, that acts at the first call when it is due.

    Args:
        decorate: the decorator.
        due: tells at a call whether it is to act.
        model: what it is given.
        **options: of the decorator.
    """
    if model is None:
        return functools.partial(_later, decorate, due, **options)
    if not isinstance(model, FunctionType):
        return decorate(model, **options)

    @functools.lru_cache(maxsize=1)
    def decorated() -> Callable[..., Any]:
        made: Callable[..., Any] = decorate(model, **options)
        return made

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (decorated() if due() else model)(*args, **kwargs)

    return call
