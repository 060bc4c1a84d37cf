"""What is known of a Python file without running it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.errors import RecipeError
from raytune_ft.importers.python_file import read_python
from raytune_ft.importers.values import Unknown


def value_of(text: str) -> Any:
    """Return `x` after the last line of a file."""
    value = read_python(text, "c.py").values["x"]
    return value.data if isinstance(value.data, Unknown) else value.plain()


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(plain)
def test_displays_are_read_as_python_writes_them(value: Any) -> None:
    assert value_of(f"x = {value!r}") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = 2 * 512 + -1", 1023),
        ("x = 2 ** 10 // 3 % 5", 1),
        ("x = 'a' + 'b' if 3 > 2 else 'c'", "ab"),
        ("a = 4\na *= 2\nx = a", 8),
        ("d = 'data'\nx = f'{d}/rows.json'", "data/rows.json"),
        ("import os.path as osp\nx = osp.join('a', 'b.json')", "a/b.json"),
        ("x = dict(a=1, **dict(b=2))", {"a": 1, "b": 2}),
        ("x = dict(dict(a=1), b=2)", {"a": 1, "b": 2}),
        ("x = [1, *[2, 3]] + [4]", [1, 2, 3, 4]),
        ("a, b = 1, 2\nx = a + b", 3),
        ("m = dict(llm=dict(path='p'))\nx = m['llm']['path']", "p"),
        ("m = dict(llm=dict(path='p'))\nm['llm']['path'] = 'q'\nx = m.llm.path", "q"),
        ("x = []\nx.append(dict(a=1))", [{"a": 1}]),
        ("x = dict(a=1)\nx.update(a=2, b=3)", {"a": 2, "b": 3}),
        ("if True:\n    x = 1\nelse:\n    x = 2", 1),
        ("x = 1\nif not 3 < 2 and 'a' in ['a']:\n    x = 2", 2),
        ("import torch\nx = torch.float16", "float16"),
        ("from a import B as C\nx = C", "B"),
        ("from a import B\nx = B(1, r=2)", {"type": "B", "0": 1, "r": 2}),
        ("x: int = 3", 3),
        ("x = int(4.0) + len('abc')", 7),
    ],
)
def test_known_without_running(text: str, value: Any) -> None:
    assert value_of(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "x = [i for i in range(3)]",
        "x = open('f').read()",
        "x = 9 ** 9 ** 9",
        "x = 'a' * 10**9",
        "x = [0] * 10**9",
        "x = 1 / 0",
        "x = unknown.thing()['a']",
        "for i in [1]:\n    x = i",
        "try:\n    x = 1\nexcept Exception:\n    x = 2",
        "x = lambda: 1",
        "x = b'bytes'",
        "x = 10**18 * 10**18",
    ],
)
def test_unknown_says_why(text: str) -> None:
    assert isinstance(value_of(text), Unknown)


def test_unknown_condition_leaves_both_branches(tmp_path: object) -> None:
    file = read_python("import os\nif os.getenv('A')['b']():\n    x = 1\n", "c.py")
    assert "x" not in file.values
    assert "neither branch is read" in file.notes[0].what


def test_lines_are_those_of_the_setting() -> None:
    file = read_python("lr = 1\n\nx = dict(\n    a=lr,\n    b=2)\n", "c.py")
    inside = file.values["x"].data
    assert isinstance(inside, dict)
    assert (inside["a"].line, inside["b"].line) == (1, 5)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        read_python(text, "c.py")
    except RecipeError as error:
        assert str(error).startswith("c.py")
