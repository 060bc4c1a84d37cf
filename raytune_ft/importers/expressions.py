"""What the expressions of a Python configuration are known to be, without running any."""

from __future__ import annotations

import ast
import operator
import posixpath
from collections.abc import Callable
from typing import Any

from raytune_ft.importers.values import Name, Unknown, Value

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
_SAME = ("list", "tuple", "copy.copy", "copy.deepcopy")
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


class Expressions:
    """Gives expressions their values, as far as the variables before them are known."""

    def __init__(self) -> None:
        self.variables: dict[str, Value] = {}
        self.used: set[str] = set()
        """Variables that an expression refers to."""
        self.imported: dict[str, Name | Unknown] = {}
        self.readers: dict[type[ast.expr], Callable[[Any], Any]] = {
            ast.Constant: self._constant,
            ast.Name: lambda node: self._variable(node.id),
            ast.Attribute: self._attribute,
            ast.List: lambda node: self._items(node.elts),
            ast.Tuple: lambda node: self._items(node.elts),
            ast.Set: lambda node: self._items(node.elts),
            ast.Dict: self._display,
            ast.Call: self._call,
            ast.BinOp: lambda n: self._apply(_OPERATORS.get(type(n.op)), [n.left, n.right]),
            ast.UnaryOp: lambda n: self._apply(_UNARY.get(type(n.op)), [n.operand]),
            ast.Compare: self._compared,
            ast.BoolOp: self._joined,
            ast.IfExp: self._choice,
            ast.Subscript: self._item,
            ast.JoinedStr: lambda n: self._apply(lambda *p: "".join(map(str, p)), n.values),
            ast.FormattedValue: self._formatted,
        }

    def value(self, node: ast.expr) -> Value:
        """Return what an expression is known to be."""
        data = self._data(node)
        return data if isinstance(data, Value) else Value(data, node.lineno)

    def _data(self, node: ast.expr) -> Any:
        read = self.readers.get(type(node))
        return self._opaque(node) if read is None else read(node)

    def _opaque(self, node: ast.expr) -> Unknown:
        return Unknown(f"'{ast.unparse(node)[:40]}' would have to run")

    def _constant(self, node: ast.Constant) -> Any:
        known = node.value is None or isinstance(node.value, bool | int | float | str)
        return node.value if known else Unknown("it is no plain value")

    def _compared(self, node: ast.Compare) -> Any:
        if len(node.ops) != 1:
            return self._opaque(node)
        operands = [node.left, node.comparators[0]]
        return self._apply(_OPERATORS.get(type(node.ops[0])), operands)

    def _joined(self, node: ast.BoolOp) -> Any:
        function = all if isinstance(node.op, ast.And) else any
        return self._apply(lambda *parts: function(parts), node.values)

    def _formatted(self, node: ast.FormattedValue) -> Any:
        plain = node.format_spec is None and node.conversion == -1
        return self.value(node.value) if plain else self._opaque(node)

    def _variable(self, name: str) -> Value | Name | Unknown:
        if name in self.variables:
            self.used.add(name)
            return self.variables[name]
        return self.imported.get(name, Name(name))

    def _attribute(self, node: ast.Attribute) -> Any:
        owner = self.value(node.value)
        if isinstance(owner.data, Name):
            return Name(f"{owner.data.dotted}.{node.attr}")
        if isinstance(owner.data, dict) and node.attr in owner.data:
            return owner.data[node.attr]
        if isinstance(owner.data, Unknown):
            return owner
        return self._opaque(node)

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
            is_copy = isinstance(node.func, ast.Attribute) and node.func.attr == "copy"
            return self._attribute_owner(node) if is_copy else self._opaque(node.func)
        name = function.data.dotted
        if name in _SAME and len(node.args) == 1:
            return self.value(node.args[0])
        if name in _PURE and not node.keywords:
            return self._apply(_PURE[name], node.args)
        made = self._dict_call(node)
        if isinstance(made.data, dict) and name != "dict":
            return Value({"type": function, **made.data}, node.lineno)
        return made

    def _attribute_owner(self, node: ast.Call) -> Value:
        assert isinstance(node.func, ast.Attribute)  # noqa: S101  asked before
        return self.value(node.func.value)

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
        return self._opaque(node)

    def _apply(self, function: Callable[..., Any] | None, nodes: list[ast.expr]) -> Any:
        """Compute with constants, inside bounds that a configuration has no need to pass."""
        values = [self.value(node) for node in nodes]
        unknown = next((v for v in values if isinstance(v.data, Unknown)), None)
        if unknown is not None:
            return unknown
        if function is operator.add and all(isinstance(v.data, list) for v in values):
            return [item for v in values if isinstance(v.data, list) for item in v.data]
        plain = [v.plain() for v in values]
        if function is None or not all(map(_is_small, plain)) or _grows(function, plain):
            return Unknown("it is computed in a way that is not followed")
        try:
            result = function(*plain)
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            return Unknown(f"it fails: {error}")
        return result if _is_small(result) else Unknown("its value is too large")


def _grows(function: Callable[..., Any], plain: list[Any]) -> bool:
    """Tell whether an operation can make much out of little: a power, a repeated text."""
    if function is operator.pow:
        return not all(isinstance(p, int | float) for p in plain) or abs(plain[1]) > 64
    return function is operator.mul and any(isinstance(p, str | list) for p in plain)


def _is_small(data: Any) -> bool:
    if isinstance(data, bool | float) or data is None:
        return True
    if isinstance(data, int):
        return abs(data) <= MAX_NUMBER
    return isinstance(data, str | list) and len(data) <= MAX_TEXT
