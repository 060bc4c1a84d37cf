"""Cache key (C42): what changes tokens changes it, nothing else does; every field is classified."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from raytune_ft.config.schema import Recipe, Source
from raytune_ft.data.cache.key import FIELDS, SOURCE, token_key
from raytune_ft.data.examples import Encoder
from raytune_ft.data.sources import open_sources, split_validation
from raytune_ft.data.templating.templates import PROMPTS
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.conftest import make_tokenizer
from tests.data.conftest import write_jsonl


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name == "sources":
            yield from leaves(Source, SOURCE)
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


SCHEMA = dict(leaves(Recipe))
EFFECT = {field: effect for effect, fields in FIELDS.items() for field in fields}


def test_every_field_of_the_schema_is_classified_once() -> None:
    assert set(EFFECT) == set(SCHEMA)
    assert sum(len(fields) for fields in FIELDS.values()) == len(SCHEMA)


def others(field: FieldInfo) -> Iterator[Any]:
    """Values that a field may have, beside its default, made of its type alone."""
    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    for value in candidates(field.annotation):
        try:
            found = adapter.validate_python(value)
        except ValidationError:
            continue
        if found != default and type(found) is type(value):
            yield value


def candidates(kind: Any) -> Iterator[Any]:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        yield from inside
    elif origin is tuple:
        yield tuple(0.5 for _ in inside)
    elif origin is list:
        yield from ([next(candidates(inside[0]))], [])
    elif origin is dict:
        yield {"loss": next(candidates(inside[1]))}
    elif inside and not hasattr(kind, "__metadata__"):
        for part in inside:
            yield from candidates(part)
    elif inside:
        yield from candidates(inside[0])
    elif kind is not type(None):
        numbers = {bool: [True, False], int: [3, 77], float: [0.25, 3.0]}
        yield from numbers.get(kind, ["another"])


def test_values_are_generated_for_every_field() -> None:
    assert [name for name, field in SCHEMA.items() if not list(others(field))] == []


class Run:
    """A recipe over two files, and its key as training computes it."""

    def __init__(self, folder: Path) -> None:
        (folder / "model").mkdir()
        make_tokenizer(folder / "model")
        words = ["river", "stone", "cloud", "green"]
        rows = [
            {"instruction": f"{a} {b} {c}", "output": c}
            for a, b, c in itertools.product(words, repeat=3)
        ]
        self.path = write_jsonl(folder / "rows.jsonl", rows)
        self.model = folder / "model"
        self.recipe: dict[str, Any] = {
            "model": {"path": str(self.model)},
            "data": {"sources": [{"path": str(self.path)}]},
            "train": {"lr": 5.0},  # min_lr may be anything below
        }

    def changed(self, field: str, value: Any) -> Recipe:
        changed = json.loads(json.dumps(self.recipe))
        if field.startswith(SOURCE):
            changed["data"]["sources"][0][field.removeprefix(SOURCE)] = value
        else:
            section, name = field.split(".")
            changed.setdefault(section, {})[name] = value
        return Recipe.model_validate(changed)

    def key(self, field: str = "train.seed", value: Any = 42) -> str:
        made = self.changed(field, value)
        tokenizer = TextTokenizer.from_folder(
            made.model.path, made.model.eos_token, made.model.new_tokens
        )
        rows = open_sources(made.data, made.train.seed)
        training, _ = split_validation(rows, made.data, made.train.seed)
        return token_key(training, Encoder.of(made, tokenizer), made.train.seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("key"))


@pytest.mark.parametrize("field", sorted(FIELDS["value"] | FIELDS["order"]))
def test_a_field_that_changes_tokens_changes_the_key(run: Run, field: str) -> None:
    known = {run.key()}
    values = list(others(SCHEMA[field]))
    if field == SOURCE + "map":
        values = ["alpaca_map_fn", "text"]
    if field == SOURCE + "columns":
        values = [{"output": "instruction"}]
    for value in values:
        key = run.key(field, value)
        assert key not in known, (field, value)
        known.add(key)


NEED_ANOTHER = {
    "eval.export", "eval.metric", "eval.metrics", "eval.mode", "eval.patience",
    "run.min_workers",
}  # fmt: skip
"""Accepted with held-out rows, with another metric or with more workers, only."""


@pytest.mark.parametrize("field", sorted(FIELDS["none"]))
def test_any_other_field_keeps_the_key(run: Run, field: str) -> None:
    accepted = 0
    for value in others(SCHEMA[field]):
        with contextlib.suppress(ValidationError):  # a pair that the schema refuses
            assert run.key(field, value) == run.key(), (field, value)
            accepted += 1
    assert accepted or field in NEED_ANOTHER


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.validation", 0.25),
        (SOURCE + "limit", 7),
        (SOURCE + "weight", 2.0),
        (SOURCE + "weight", 0.5),
        ("data.max_length", 100),
        ("data.over_length", "split"),
        ("data.pack", "concat"),
        ("model.eos_token", "a"),
        ("model.template", "default"),
    ],
)
def test_what_a_field_makes_counts(run: Run, field: str, value: Any) -> None:
    assert run.key(field, value) != run.key()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.over_length", "drop"),  # as `cut`, tokens are kept up to max_length
        ("data.over_length", "error"),
        ("data.pack", "none"),
        ("data.pack", False),
        (SOURCE + "access", "copy"),
        (SOURCE + "split", "train"),
        (SOURCE + "map", None),
    ],
)
def test_what_makes_the_same_tokens_shares_the_key(run: Run, field: str, value: Any) -> None:
    assert run.key(field, value) == run.key()


def test_files_count_by_content_and_order_not_by_place(run: Run, tmp_path: Path) -> None:
    text = run.path.read_text(encoding="utf-8")
    copy = tmp_path / "moved.jsonl"
    copy.write_text(text, encoding="utf-8")
    assert run.key(SOURCE + "path", str(copy)) == run.key()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(text.replace("green", "groen", 1), encoding="utf-8")
    assert run.key(SOURCE + "path", str(changed)) != run.key()
    lines = text.splitlines(keepends=True)
    changed.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    assert run.key(SOURCE + "path", str(changed)) != run.key()


def test_files_known_by_size_and_time_are_told_apart_if_they_share_both(
    run: Run, tmp_path: Path
) -> None:
    keys = set()
    for word in ("river", "stone"):
        path = tmp_path / f"{word}.parquet"
        table = pa.table({"instruction": [word], "output": [word]})
        parquet.write_table(table, path, compression="none", write_statistics=False)
        os.utime(path, ns=(10**18, 10**18))
        keys.add(run.key(SOURCE + "path", str(path)))
    assert len({path.stat().st_size for path in tmp_path.glob("*.parquet")}) == 1
    assert len(keys) == 2


def test_a_tokenizer_counts_by_content_not_by_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    make_tokenizer(tmp_path / "same")
    assert run.key("model.path", str(tmp_path / "same")) == run.key()
    for name, change in [
        ("tokenizer.json", ('"add_prefix_space": false', '"add_prefix_space": true')),
        ("tokenizer_config.json", ("{{", "{{ 'x' }}{{")),
    ]:
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        make_tokenizer(folder)
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert change[0] in text
        path.write_text(text.replace(*change, 1), encoding="utf-8")
        assert run.key("model.path", str(folder)) != run.key(), name


def test_every_value_of_a_tokenizer_counts(run: Run, tokenizer: TextTokenizer) -> None:
    made = Recipe.model_validate(run.recipe)
    rows = open_sources(made.data, 42)
    spec = tokenizer.spec
    changes: dict[str, Any] = {
        "tokenizer_json": spec.tokenizer_json + " ",
        "bos_ids": (*spec.bos_ids, 5),
        "eos_id": spec.eos_id + 1,
        "extra_stop_ids": frozenset({1, 2}),
        "named_tokens": (("pad_token", "river"),),
        "chat_template": None,
        "silent_ids": frozenset({9}),
        "adds_bos": not spec.adds_bos,
        "new_tokens": (("<new>", (5,)),),
    }
    assert set(changes) == set(vars(spec))
    keys = {token_key(rows, Encoder(tokenizer, "default", made.data), 42)}
    for name, value in changes.items():
        other = TextTokenizer(replace(spec, **{name: value}))
        keys.add(token_key(rows, Encoder(other, "default", made.data), 42))
    assert len(keys) == 1 + len(changes)


def test_a_template_counts_by_its_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytune_ft.data.cache import key as module

    plain = run.key("model.template", "default")
    changed = {**PROMPTS, "default": replace(PROMPTS["default"], instruction="{input}?")}
    monkeypatch.setattr(module, "PROMPTS", changed)
    assert run.key("model.template", "default") != plain
    monkeypatch.setattr(module, "PROMPTS", {**PROMPTS, "zephyr": PROMPTS["default"]})
    assert run.key("model.template", "zephyr") == plain
