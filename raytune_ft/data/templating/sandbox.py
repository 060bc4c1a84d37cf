"""Sandbox: the source of a chat template in, a renderer out that neither escapes nor runs away.

A chat template comes with a model's files: it is foreign code. Jinja's immutable sandbox keeps it
from Python's internals and from changing what it is given. This module adds limits: on the turns of
all loops and macros, on the size of every text and list that an operation would make, and on time,
looked at in every turn. What remains: a single operation on values under these limits cannot be
interrupted, so comparing lists that were nested in themselves many times can take as long as it
likes; only a process of its own, ended from outside, would stop that.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from raytune_ft.data.templating import sandbox_limits as limits
from raytune_ft.errors import DataError, ModelError

# The fall-back that Llama 3's templates name themselves: with it, a template that asks for the date
# says the same in every run and in every answer, and a guarded one says what it would without.
TODAY = datetime.datetime(2024, 7, 26)

# Names that no template can spell, for what the renderer hands to its own extension.
BUDGET, BRACKETS = "the budget", "the brackets"

# These turn their arguments into text, so their arguments' sizes are looked at first.
WRITING = (
    "capitalize", "e", "escape", "forceescape", "indent", "join", "lower", "replace", "safe",
    "string", "striptags", "title", "trim", "upper", "urlencode", "wordcount",
)  # fmt: skip
SELECTING = (
    "abs", "attr", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items",
    "last", "length", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "round",
    "select", "selectattr", "sort", "sum", "unique",
)  # fmt: skip


class Renderer:
    """One chat template, compiled."""

    def __init__(self, source: str) -> None:
        """Compile; ModelError if the source is no template."""
        environment = Environment()
        self._template = compile_template(source, environment)
        self.has_generation_marks = environment.blocks.found
        self.literals = _inspected(environment.parse(source))
        """Texts that the template looks for in what it is given."""

    def render(self, variables: Mapping[str, Any], brackets: tuple[str, str] | None = None) -> str:
        """Return the text.

        Args:
            variables: what the template may see.
            brackets: written around every `{% generation %}` block; None: nothing is.

        Raises:
            DataError: the template refuses the messages.
            ModelError: it fails, or passes a limit.
        """
        budget = limits.Budget()
        parts: list[str] = []
        own = {BUDGET: budget, BRACKETS: brackets}
        try:
            for part in self._template.generate({**variables, **own}):
                parts.append(part)
                budget.write(part)
        except DataError:
            raise
        except Exception as error:  # a template is foreign code: it may raise anything
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"the model's chat template fails: {type(error).__name__}: {reason}; "
                "set model.template to a prompt template"
            ) from None
        return "".join(parts)


def compile_template(source: str, environment: Environment) -> jinja2.Template:
    """Compile a chat template with its limits; ModelError if the source is no template."""
    try:
        tree = _Counting(environment.blocks).visit(environment.parse(source))
        code = environment.compile(tree)
    except (jinja2.TemplateError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ModelError(f"the model's chat template cannot be read: {reason}") from None
    return jinja2.Template.from_code(environment, code, environment.make_globals({}))


@lru_cache(maxsize=8)
def renderer(source: str) -> Renderer:
    """Return the compiled template of a source; compiling takes some milliseconds."""
    return Renderer(source)


class _Blocks(Extension):
    """`{% generation %}...{% endgeneration %}`, and the calls that count."""

    tags = {"generation"}  # noqa: RUF012  the base class's own declaration

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.found = False

    def parse(self, parser: Parser) -> nodes.Node:
        """Read a block as a call that gets its body."""
        self.found = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("bracket"), [], [], body).set_lineno(line)

    @pass_context
    def bracket(self, context: Context, caller: Macro) -> str:
        """Write a block's body, between the brackets of this rendering if it has any."""
        text = cast(Environment, self.environment).text_of(caller())
        brackets = context.parent.get(BRACKETS)
        return brackets[0] + text + brackets[1] if brackets else text

    @pass_context
    def step(self, context: Context) -> str:
        """Count one turn of a loop or macro."""
        budget = context.parent.get(BUDGET)
        if budget is not None:
            budget.step()
        return ""

    def joined(self, *values: Any) -> Any:
        """Write the operator `~`."""
        return cast(Environment, self.environment).joined(*values)


class _Counting(NodeTransformer):
    """Puts a count into each loop and macro, and `~` where its size is looked at."""

    def __init__(self, blocks: _Blocks) -> None:
        self._blocks = blocks

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  the visitor's naming
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._blocks.call_method("joined", list(node.nodes)).set_lineno(node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(self._blocks.call_method("step"))
        node.body.insert(0, step.set_lineno(node.lineno))
        return node


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with the functions of transformers, and with limits."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Blocks, loopcontrols],
            finalize=limits.check_text,
        )
        self.blocks = next(e for e in self.extensions.values() if isinstance(e, _Blocks))
        writing = {name: limits.guarded(name) for name in WRITING}
        selecting = {name: FILTERS[name] for name in SELECTING}
        self.filters = {**selecting, **writing, "tojson": _to_json}
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": TODAY.strftime,
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join what a macro or a `set` block has written."""
        texts = list(parts)
        limits.check_length(sum(map(len, texts)))
        return "".join(texts)

    def text_of(self, value: Any) -> str:
        """Return what a block has written as text."""
        return str(value)

    def joined(self, *values: Any) -> Any:
        """Write the operator `~`."""
        texts = [str(limits.check_text(value)) for value in values]
        limits.check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result is not too large."""
        limits.check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call what a template names; a method of a text only if its result is not too large."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            limits.check_method(owner, __obj.__name__, [*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Hand out `str.format` for plain places only."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            limits.check_format(value.__self__)
        return wrapped


class _Namespace(Namespace):
    """Jinja's `namespace`; names with a leading underscore are refused, as transformers does."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _inspected(tree: nodes.Template) -> tuple[str, ...]:
    """List the marks (`</think>`) that calls, filters and comparisons name; no words (`user`)."""
    kinds = (nodes.Call, nodes.Compare, nodes.Filter, nodes.Test)
    found = {
        const.value
        for node in tree.find_all(kinds)
        for const in node.find_all(nodes.Const)
        if isinstance(const.value, str) and len(const.value.strip()) > 1
        if not const.value.replace("_", "").isalnum()
    }
    return tuple(sorted(found, key=lambda text: (-len(text), text)))


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name!r} in a namespace")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    limits.check_text(value)
    limits.check_indent(indent)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise DataError(f"the model's chat template refuses the messages: {message}")
