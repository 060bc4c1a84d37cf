"""A Python configuration read as a syntax tree: nothing of it is imported or run.

Known without running: constants, arithmetic and comparisons of constants, `dict(...)` and
displays, names of imported classes, references between variables, `if` with a known condition.
The rest becomes `Unknown` with its reason.
"""

from __future__ import annotations

import ast
import operator
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.errors import RecipeError
from raytune_ft.importers.draft import Note
from raytune_ft.importers.values import Function, Name, Unknown, Value

MAX_TEXT = 100_000
"""Characters of a text, or items of a list, that arithmetic may make."""
MAX_NUMBER = 10**18

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_PURE: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "min": min,
    "max": max,
    "round": round,
    "len": len,
    "os.path.join": posixpath.join,
}
_NESTED = "it is changed by statements that would have to run"


@dataclass
class PythonFile:
    """The variables of a file after its last line."""

    values: dict[str, Value] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    """Variables that another one refers to."""
    notes: list[Note] = field(default_factory=list)


def read_python(text: str, source: str) -> PythonFile:
    """Read a file; RecipeError with its line if it is no Python."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise RecipeError(
            f"{source}:{error.lineno or 1}: is not Python 3 ({error.msg}); name an XTuner config"
        ) from None
    except (ValueError, RecursionError, MemoryError):
        raise RecipeError(f"{source}: cannot be read as Python; name an XTuner config") from None
    reader = _Reader()
    try:
        reader.run(tree.body)
    except RecursionError:
        raise RecipeError(f"{source}: is nested too deeply; name an XTuner config") from None
    return reader.file


class _Reader:
    def __init__(self) -> None:
        self.file = PythonFile()
        self.imported: dict[str, Name | Unknown] = {}

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Import() | ast.ImportFrom():
                self._import(node)
            case ast.Assign():
                for target in node.targets:
                    self._assign(target, self.value(node.value))
            case ast.AnnAssign() if node.value is not None:
                self._assign(node.target, self.value(node.value))
            case ast.AugAssign():
                target = ast.copy_location(ast.BinOp(node.target, node.op, node.value), node)
                self._assign(node.target, self.value(target))
            case ast.FunctionDef():
                self.file.values[node.name] = Value(
                    Function(node.name, _columns(node)), node.lineno
                )
            case ast.If():
                self._if(node)
            case ast.With() if _is_read_base(node):
                self._read_base(node)
            case ast.Expr() if isinstance(node.value, ast.Call):
                self._call_statement(node.value)
            case ast.Expr() | ast.Pass() | ast.AnnAssign() | ast.ClassDef() | ast.Assert():
                pass
            case _:
                self._not_followed(node)

    def _import(self, node: ast.Import | ast.ImportFrom, reason: str | None = None) -> None:
        module = "" if isinstance(node, ast.Import) else f"{node.module or ''}."
        for alias in node.names:
            name = alias.asname or alias.name
            if isinstance(node, ast.Import) and alias.asname is None:
                name = alias.name.partition(".")[0]
                self.imported[name] = Name(name)
            else:
                dotted = f"{module}{alias.name}".removeprefix(".")
                self.imported[name] = Unknown(reason) if reason else Name(dotted)

    def _read_base(self, node: ast.With) -> None:
        for inner in node.body:
            if isinstance(inner, ast.ImportFrom):
                module = "." * inner.level + (inner.module or "")
                self._import(inner, f"it comes from {module}, which read_base is not followed into")
                names = ", ".join(alias.name for alias in inner.names)
                self._note(
                    inner, f"read_base: {module} is not followed ({names})",
                    "import that file as well, or write its values into this one",
                )  # fmt: skip

    def _if(self, node: ast.If) -> None:
        test = self.value(node.test)
        if isinstance(test.data, Unknown):
            self._note(
                node, f"if: {test.data.reason}, so neither branch is read",
                "set what it decides in the recipe",
            )  # fmt: skip
            return
        self.run(node.body if test.plain() else node.orelse)

    def _assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.file.values[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value.data, list):
            for inner, part in zip(target.elts, value.data, strict=False):
                self._assign(inner, part)
        elif isinstance(target, ast.Subscript | ast.Attribute):
            self._assign_inside(target, value)

    def _assign_inside(self, target: ast.Subscript | ast.Attribute, value: Value) -> None:
        owner = self.value(target.value).data
        key = target.attr if isinstance(target, ast.Attribute) else self.value(target.slice).plain()
        if (isinstance(owner, dict) and isinstance(key, str)) or (isinstance(owner, list) and isinstance(key, int) and -len(owner) <= key < len(owner)):
            owner[key] = value
        else:
            self._note(
                target, f"'{ast.unparse(target)[:60]} = ...' is not followed", "set it there"
            )

    def _call_statement(self, call: ast.Call) -> None:
        """Follow `list.append(x)` and `dict.update(...)`; note other calls."""
        function = call.func
        if isinstance(function, ast.Attribute):
            owner = self.value(function.value).data
            if isinstance(owner, list) and function.attr == "append" and len(call.args) == 1:
                owner.append(self.value(call.args[0]))
                return
            if isinstance(owner, dict) and function.attr == "update":
                given = self._dict_call(call).data
                if isinstance(given, dict):
                    owner.update(given)
                    return
        self._note(call, f"'{ast.unparse(call)[:60]}' is not run", "set what it changes")

    def _not_followed(self, node: ast.stmt) -> None:
        word = type(node).__name__.lower()
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _is_stored(n)]
        for name in names:
            self.file.values[name] = Value(Unknown(_NESTED), node.lineno)
        self._note(node, f"a '{word}' statement is not run", "set what it decides in the recipe")

    def _note(self, node: ast.AST, what: str, advice: str) -> None:
        self.file.notes.append(Note(getattr(node, "lineno", 1), what, advice))

    def value(self, node: ast.expr) -> Value:
        """Return what an expression is known to be."""
        data = self._data(node)
        return data if isinstance(data, Value) else Value(data, node.lineno)

    def _data(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                known = node.value is None or isinstance(node.value, bool | int | float | str)
                return node.value if known else Unknown("it is no plain value")
            case ast.Name():
                return self._variable(node.id)
            case ast.Attribute():
                return self._attribute(node)
            case ast.List() | ast.Tuple() | ast.Set():
                return self._items(node.elts)
            case ast.Dict():
                return self._display(node)
            case ast.Call():
                return self._call(node)
            case ast.BinOp():
                return self._apply(_OPERATORS.get(type(node.op)), [node.left, node.right])
            case ast.UnaryOp():
                return self._apply(_UNARY.get(type(node.op)), [node.operand])
            case ast.Compare() if len(node.ops) == 1:
                operands = [node.left, node.comparators[0]]
                return self._apply(_OPERATORS.get(type(node.ops[0])), operands)
            case ast.BoolOp():
                function = all if isinstance(node.op, ast.And) else any
                return self._apply(lambda *parts: function(parts), node.values)
            case ast.IfExp():
                return self._choice(node)
            case ast.Subscript():
                return self._item(node)
            case ast.JoinedStr():
                return self._apply(lambda *parts: "".join(map(str, parts)), node.values)
            case ast.FormattedValue() if node.format_spec is None and node.conversion == -1:
                return self.value(node.value)
        return Unknown(f"'{ast.unparse(node)[:40]}' would have to run")

    def _variable(self, name: str) -> Value | Name | Unknown:
        if name in self.file.values:
            self.file.used.add(name)
            return self.file.values[name]
        return self.imported.get(name, Name(name))

    def _attribute(self, node: ast.Attribute) -> Any:
        owner = self.value(node.value)
        if isinstance(owner.data, Name):
            return Name(f"{owner.data.dotted}.{node.attr}")
        if isinstance(owner.data, dict) and node.attr in owner.data:
            return owner.data[node.attr]
        if isinstance(owner.data, Unknown):
            return owner
        return Unknown(f"'{ast.unparse(node)[:40]}' would have to run")

    def _items(self, nodes: list[ast.expr]) -> Any:
        items: list[Value] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                inner = self.value(node.value)
                if not isinstance(inner.data, list):
                    return Unknown("a part of it would have to run")
                items += inner.data
            else:
                items.append(self.value(node))
        return items

    def _display(self, node: ast.Dict) -> Any:
        content: dict[str, Value] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                inner = self.value(value).data
                if not isinstance(inner, dict):
                    return Unknown("a part of it would have to run")
                content |= inner
            else:
                content[str(self.value(key).plain())] = self.value(value)
        return content

    def _call(self, node: ast.Call) -> Any:
        function = self.value(node.func)
        if not isinstance(function.data, Name):
            if isinstance(node.func, ast.Attribute) and node.func.attr == "copy":
                return self.value(node.func.value)
            return Unknown(f"'{ast.unparse(node.func)[:40]}(...)' would have to run")
        name = function.data.dotted
        if name == "dict":
            return self._dict_call(node)
        if name in ("list", "tuple") and len(node.args) == 1:
            return self.value(node.args[0])
        if name in ("copy.copy", "copy.deepcopy") and node.args:
            return self.value(node.args[0])
        if name in _PURE and not node.keywords:
            return self._apply(_PURE[name], node.args)
        made = self._dict_call(node)
        if isinstance(made.data, dict):
            return Value({"type": function, **made.data}, node.lineno)
        return made

    def _dict_call(self, node: ast.Call) -> Value:
        """Return the keyword arguments of a call; positional ones are called "0", "1" ..."""
        content: dict[str, Value] = {}
        for place, argument in enumerate(node.args):
            value = self.value(argument)
            spread = isinstance(value.data, dict) and "type" not in value.data
            content |= (
                value.data if spread and isinstance(value.data, dict) else {str(place): value}
            )
        for keyword in node.keywords:
            value = self.value(keyword.value)
            if keyword.arg is not None:
                content[keyword.arg] = value
            elif isinstance(value.data, dict):
                content |= value.data
            else:
                return Value(Unknown("a part of it would have to run"), node.lineno)
        return Value(content, node.lineno)

    def _choice(self, node: ast.IfExp) -> Any:
        test = self.value(node.test)
        if isinstance(test.data, Unknown):
            return test
        return self.value(node.body if test.plain() else node.orelse)

    def _item(self, node: ast.Subscript) -> Any:
        owner, key = self.value(node.value).data, self.value(node.slice).plain()
        if isinstance(owner, dict) and key in owner:
            return owner[key]
        if isinstance(owner, list) and isinstance(key, int) and -len(owner) <= key < len(owner):
            return owner[key]
        return Unknown(f"'{ast.unparse(node)[:40]}' would have to run")

    def _apply(self, function: Callable[..., Any] | None, nodes: list[ast.expr]) -> Any:
        """Compute with constants, inside bounds that a configuration has no need to pass."""
        values = [self.value(node) for node in nodes]
        unknown = next((v for v in values if isinstance(v.data, Unknown)), None)
        if unknown is not None:
            return unknown
        if function is operator.add and all(isinstance(v.data, list) for v in values):
            return [item for v in values for item in v.data]  # type: ignore[union-attr]
        if function is None or not all(_is_small(v.data) for v in values):
            return Unknown("it is computed in a way that is not followed")
        if function is operator.pow and abs(values[1].plain()) > 64:
            return Unknown("the power is too large")
        if function is operator.mul and any(isinstance(v.data, str | list) for v in values):
            return Unknown("it repeats a text or list")
        try:
            result = function(*(v.plain() for v in values))
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            return Unknown(f"it fails: {error}")
        return result if _is_small(result) else Unknown("its value is too large")


def _is_small(data: Any) -> bool:
    if isinstance(data, bool | float | Name) or data is None:
        return True
    if isinstance(data, int):
        return abs(data) <= MAX_NUMBER
    return isinstance(data, str | list) and len(data) <= MAX_TEXT


def _is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _is_read_base(node: ast.With) -> bool:
    expression = node.items[0].context_expr
    return isinstance(expression, ast.Call) and ast.unparse(expression.func).endswith("read_base")


def _columns(function: ast.FunctionDef) -> tuple[str, ...]:
    """Return the names that a map function looks up in its row."""
    argument = function.args.args[0].arg if function.args.args else ""
    found: dict[str, None] = {}
    for node in ast.walk(function):
        key: ast.expr | None = None
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant() as inner):
                key = inner if name == argument else None
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=name), attr="get"), args=[first, *_]
            ):
                key = first if name == argument else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found[key.value] = None
    return tuple(found)
