"""A Python configuration read as a syntax tree: nothing of it is imported or run.

Known without running: constants, arithmetic and comparisons of constants, `dict(...)` and
displays, names of imported classes, references between variables, `if` with a known condition.
The rest becomes `Unknown` with its reason.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from raytune_ft.errors import RecipeError
from raytune_ft.importers.draft import Note
from raytune_ft.importers.expressions import Expressions
from raytune_ft.importers.values import Function, Name, Unknown, Value

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


class _Reader(Expressions):
    """Follows the statements of a file, from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.file = PythonFile(self.variables, self.used)

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
                self.variables[node.name] = Value(Function(node.name, _columns(node)), node.lineno)
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
            self.variables[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value.data, list):
            for inner, part in zip(target.elts, value.data, strict=False):
                self._assign(inner, part)
        elif isinstance(target, ast.Subscript | ast.Attribute):
            self._assign_inside(target, value)

    def _assign_inside(self, target: ast.Subscript | ast.Attribute, value: Value) -> None:
        owner = self.value(target.value).data
        key = target.attr if isinstance(target, ast.Attribute) else self.value(target.slice).plain()
        if isinstance(owner, dict) and isinstance(key, str):
            owner[key] = value
        elif isinstance(owner, list) and key in range(-len(owner), len(owner)):
            owner[int(key)] = value
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
            self.variables[name] = Value(Unknown(_NESTED), node.lineno)
        self._note(node, f"a '{word}' statement is not run", "set what it decides in the recipe")

    def _note(self, node: ast.AST, what: str, advice: str) -> None:
        self.file.notes.append(Note(getattr(node, "lineno", 1), what, advice))


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
