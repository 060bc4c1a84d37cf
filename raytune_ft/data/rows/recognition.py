"""Recognition: the first rows of a data set in, the name of their format out.

The decision is one per data set, made from column names and the kinds of their values, never from
chance. `data.sources[].map` overrules it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.data.rows.columns import Row, from_json, names, renamed, shown
from raytune_ft.data.rows.preference import pair_columns, read_columns

SAMPLE_ROWS = 32
"""First rows of a data set that decide on its format."""
_OASST = re.compile(r"\s*###\s*(Human|Assistant):")
_SET_MAP = "set data.sources[].map"
_HINTS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"abstract", "title"}), "arxiv_map_fn"),
    (frozenset({"description", "color"}), "colors_map_fn"),
)
"""Columns of map functions that bring a system text, so that they are not taken unasked."""


@dataclass(frozen=True)
class Recognition:
    """What a data set's rows are; `str` of it is one line for people."""

    name: str | None
    """A format or map function; None if the rows fit none."""
    why: str
    """What told, or what is wrong and what to do."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column that the format expects -> its name in these rows, where they differ."""
    unused: tuple[str, ...] = ()
    """Columns that are not read."""

    def __str__(self) -> str:
        """Write the format, what told, renamed and unread columns."""
        parts = [self.why]
        if self.columns:
            pairs = (f"{expected} from '{shown(own)}'" for expected, own in self.columns.items())
            parts.append(", ".join(pairs))
        if self.unused:
            parts.append(f"not read: {names(self.unused)}")
        return f"{self.name or 'not recognised'} ({'; '.join(parts)})"


@dataclass(frozen=True)
class _Shape:
    """Columns of a question and an answer."""

    name: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    columns: tuple[tuple[str, str], ...] = ()


_SYSTEMS = frozenset({"system", "system_prompt"})
_ALPACA = frozenset({"input", "history", "system"})


def _shape(name: str, question: str, answer: str, *columns: tuple[str, str]) -> _Shape:
    return _Shape(name, frozenset({question, answer}), _SYSTEMS, columns)


_SHAPES = (
    _Shape("alpaca", frozenset({"instruction", "output"}), _ALPACA),
    _Shape(
        "alpaca",
        frozenset({"instruction_zh", "output_zh"}),
        frozenset({"input_zh", "history", "system"}),
        (("instruction", "instruction_zh"), ("input", "input_zh"), ("output", "output_zh")),
    ),
    _Shape("alpaca", frozenset({"instruction", "response"}), _ALPACA, (("output", "response"),)),
    _Shape(
        "alpaca",
        frozenset({"instruction", "context", "response"}),
        frozenset({"history", "system"}),
        (("input", "context"), ("output", "response")),
    ),
    _shape("prompt_completion", "prompt", "completion"),
    _shape("prompt_response", "prompt", "response"),
    _shape("question_answer", "question", "answer"),
    _shape("question_response", "question", "response"),
    _shape("query_response", "query", "response"),
    _shape("input_output", "input", "output"),
    _shape(
        "prompt_completion",
        "problem",
        "solution",
        ("prompt", "problem"),
        ("completion", "solution"),
    ),
)


def recognise(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> Recognition:
    """Tell the format of a data set.

    Args:
        rows: its first rows; the format that most of them have wins, the earlier one if equal.
        columns: expected name -> own name, as `data.sources[].columns`.

    Returns:
        The format; without a name if the rows fit none or several.
    """
    given = dict(columns or {})
    seen = [renamed(row, given) for row in rows]
    fits = [_fit(row) for row in seen]
    known = [fit for fit in fits if fit.name is not None]
    if not known:
        return fits[0] if fits else Recognition(None, f"no row can be read; {_SET_MAP}")
    counts = Counter(fit.name for fit in known)
    name, count = counts.most_common(1)[0]
    chosen = [fit for fit in known if fit.name == name]
    found: dict[str, str] = {}
    for fit in chosen:
        found = {**fit.columns, **found}
    own = {**given, **{expected: given.get(name, name) for expected, name in found.items()}}
    unused = dict.fromkeys(column for fit in chosen for column in fit.unused)
    of = "" if count == len(fits) else f", in {count} of the first {len(fits)} rows"
    return Recognition(name, chosen[0].why + of, own, tuple(unused))


def _fit(row: Row) -> Recognition:
    """Tell the format of one row."""
    present = {name for name, value in row.items() if value is not None}
    for rule in (_preference, _moss, _messages, _pair, _others, _text):
        found = rule(row, present)
        if found is not None:
            return found
    hint = next((f"they fit {name}; " for columns, name in _HINTS if columns <= present), "")
    return Recognition(
        None,
        f"no format fits the columns: {names(row)}; {hint}{_SET_MAP} to "
        "alpaca, sharegpt, openai, prompt_completion, text or another, and data.sources[].columns "
        "to the columns that it reads, or write rows as {'messages': [...]}",
    )


def _found(
    name: str, row: Row, used: Collection[str], columns: Mapping[str, str] | None = None
) -> Recognition:
    told = names(column for column in row if column in used)
    unused = tuple(str(column) for column in row if column not in used)
    word = "column" if len(used) == 1 else "columns"
    return Recognition(name, f"by {word} {told}", columns or {}, unused)


def _preference(row: Row, present: set[str]) -> Recognition | None:
    """Find answers that are compared or marked: learning them all would teach the bad ones too."""
    pair = pair_columns(present)
    if pair is not None:
        columns = dict(zip(("chosen", "rejected"), pair, strict=True))
        renames = {expected: own for expected, own in columns.items() if expected != own}
        read = {columns.get(name, name) for name in read_columns(renamed(row, columns))}
        return _found("preference", row, (read | {"tools"}) & row.keys(), renames)
    if isinstance(row.get("label"), bool) and {"prompt", "completion"} <= present:
        return Recognition(
            None,
            "column label: answers that are marked one by one are learned by KTO, which is "
            f"another method; to learn them all, {_SET_MAP} to prompt_completion",
        )
    return None


def _moss(row: Row, present: set[str]) -> Recognition | None:
    if {"meta_instruction", "chat"} <= present and isinstance(row["chat"], Mapping):
        return _found("moss", row, {"meta_instruction", "chat", "num_turns"} & row.keys())
    return None


_LISTS = {"messages": "openai", "conversations": "sharegpt", "conversation": "conversation"}
"""Column -> format of its list, if the list's objects do not tell otherwise."""
_KEYS = (("role", "openai"), ("from", "sharegpt"))


def _messages(row: Row, present: set[str]) -> Recognition | None:
    """Find the column that is a list of messages by its name."""
    return _list_of(row, [column for column in _LISTS if column in present])


def _others(row: Row, present: set[str]) -> Recognition | None:
    """Find the column that is a list of messages by what it holds."""
    return _list_of(row, [column for column in sorted(present) if _kind(row[column])])


def _list_of(row: Row, lists: Sequence[str]) -> Recognition | None:
    if len(lists) != 1:
        return _either(row, lists) if lists else None
    column = lists[0]
    value = row[column]
    if column == "conversations" and isinstance(value, str) and not _is_list(value):
        return _found("msagent_react_map_fn", row, {column})
    name = _kind(value) or _LISTS[column]
    expected = next(expected for expected, of in _LISTS.items() if of == name)
    used = {column, "tools"} | ({"system"} if name == "sharegpt" else set())
    return _found(name, row, used & row.keys(), {} if expected == column else {expected: column})


def _kind(value: Any) -> str | None:
    """Tell the format of a list of messages by the keys of its first object."""
    items = from_json(value)
    if not isinstance(items, list) or not items or not isinstance(items[0], Mapping):
        return None
    return next((name for key, name in _KEYS if key in items[0]), None)


def _is_list(value: Any) -> bool:
    return isinstance(from_json(value), list)


def _pair(row: Row, present: set[str]) -> Recognition | None:
    """Columns of a question and an answer; the shape that covers the others wins."""
    fitting = [shape for shape in _SHAPES if shape.required <= present]
    covers = {shape: shape.required | shape.optional for shape in fitting}
    best = [
        shape
        for shape in fitting
        if not any(
            other is not shape
            and shape.required <= covers[other]
            and not other.required <= covers[shape]
            for other in fitting
        )
        and not any(shape.required < other.required for other in fitting)
    ]
    if not best:
        return None
    if len(best) > 1:
        return _either(row, sorted({name for shape in best for name in shape.required}))
    shape = best[0]
    if "context" in present - covers[shape]:
        return Recognition(
            None,
            f"column 'context' would be left out of the question by {shape.name}; {_SET_MAP} to "
            f"sql_map_fn, to alpaca with data.sources[].columns, or to {shape.name}",
        )
    columns = {to: own for to, own in shape.columns if own in row}
    return _found(shape.name, row, covers[shape] & row.keys(), columns)


def _either(row: Row, columns: Sequence[str]) -> Recognition:
    return Recognition(
        None,
        f"several of the columns {names(row)} could be learned ({names(columns)}); {_SET_MAP}",
    )


def _text(row: Row, present: set[str]) -> Recognition | None:
    column = next((name for name in ("text", "content") if name in present), None)
    if column is None or not isinstance(row[column], str):
        return None
    columns = {} if column == "text" else {"text": column}
    if not _OASST.match(row[column]):
        return _found("text", row, {column}, columns)
    found = _found("oasst1", row, {column}, columns)
    return Recognition("oasst1", f"{found.why} with '### Human:'", columns, found.unused)
