"""MOSS rows: the reference's labels under compat, what the assistant writes without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import DataSection
from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.places import iter_packs
from raytune_ft.data.rows.moss import Field, encode_fields, moss_map
from raytune_ft.data.segments import Loss
from raytune_ft.data.sources import open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Encoder, make_feed, measure_rows
from raytune_ft.errors import DataError
from tests.conftest import make_tokenizer
from tests.data.conftest import GOLDEN, write_jsonl

COMPAT = "xtuner-0.1.9"
EXAMPLES: list[dict[str, Any]] = json.loads((GOLDEN / "encode_pack.json").read_text())["moss_sft"][
    "examples"
]
TURN = {
    "Human": "<|Human|>: two and two?<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: a sum<eot>\n",
    "Commands": '<|Commands|>: Calculate("2+2")<eoc>\n',
    "Tool Responses": "<|Results|>:\n4<eor>\n",
    "MOSS": "<|MOSS|>: It is 4.<eom>\n",
}
ASSISTANT = ("Inner Thoughts", "Commands", "MOSS")


class CodePoints:
    """One id per character, its Unicode code point; 1 at the start."""

    bos_ids = text_start_ids = (1,)

    def encode(self, text: str, foreign: object = ()) -> list[int]:
        return [ord(character) for character in text]


def row(*turns: dict[str, str], meta: str = "You are MOSS.\n") -> dict[str, Any]:
    chat = {f"turn_{number}": turn for number, turn in enumerate(turns, start=1)}
    return {"meta_instruction": meta, "num_turns": len(turns), "chat": chat}


def encoded(
    row: dict[str, Any],
    *,
    max_length: int = 4096,
    compat: str | None = None,
    loss: Loss = "assistant",
    **fill: str,
) -> Example:
    fields = moss_map(row, "row", fill, compat)
    assert fields is not None
    tokenizer: Any = CodePoints()
    return encode_fields(fields, tokenizer, max_length, loss, compat=compat is not None)


def trained_text(example: Example) -> str:
    return "".join(chr(label) for label in example.labels if label != IGNORE_INDEX)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_ids_and_labels_equal_the_reference(example: dict[str, Any]) -> None:
    name = {} if example["bot_name"] is None else {"bot_name": example["bot_name"]}
    got = encoded(example["row"], max_length=example["max_length"], compat=COMPAT, **name)
    samples = example["samples"]
    assert len(got.input_ids) == (samples[0]["length"] if samples else 0)
    for sample in samples:
        ids = [1, *map(ord, sample["text_after_bos"])]
        labels = list(ids)
        for start, end in sample["masked_spans"]:
            labels[start:end] = [IGNORE_INDEX] * (end - start)
        assert (got.input_ids.tolist(), got.labels.tolist()) == (ids, labels)


def test_the_assistant_learns_what_it_writes_with_its_end_markers_and_nothing_else() -> None:
    got = encoded(row(TURN, TURN))
    assert trained_text(got) == "".join(TURN[field] for field in ASSISTANT) * 2
    assert "".join(map(chr, got.input_ids[1:])) == "You are MOSS.\n" + "".join(TURN.values()) * 2


def test_each_choice_of_loss_is_followed() -> None:
    other = {**TURN, "MOSS": "<|MOSS|>: Four.<eom>\n"}
    last = trained_text(encoded(row(TURN, other), loss="last"))
    assert last == "".join(other[field] for field in ASSISTANT)
    everything = trained_text(encoded(row(TURN), loss="all"))
    assert everything == "You are MOSS.\n" + "".join(TURN.values())


@pytest.mark.parametrize("compat", [None, COMPAT])
def test_turns_are_kept_whole_up_to_max_length(compat: str | None) -> None:
    one, two = (len(encoded(row(*[TURN] * n), compat=compat).input_ids) for n in (1, 2))
    three = row(*[TURN] * 3)
    for max_length, kept in ((two, two), (two - 1, one), (one, one), (one - 1, 0)):
        got = encoded(three, max_length=max_length, compat=compat)
        assert (len(got.input_ids), got.uncut_length) == (kept, one + 2 * (two - one))


def test_a_turn_that_does_not_fit_ends_the_row_though_later_ones_would() -> None:
    long = {"Human": "h" * 100, "MOSS": "m"}
    got = encoded(row(TURN, long, {"Human": "h", "MOSS": "m"}), max_length=200)
    assert len(got.input_ids) == len(encoded(row(TURN)).input_ids)


def test_the_assistant_is_called_by_its_name_in_every_text() -> None:
    text = "".join(map(chr, encoded(row(TURN), bot_name="Qwen").input_ids[1:]))
    assert text.startswith("You are Qwen.") and "<|Qwen|>: It is 4.<eom>" in text
    assert "MOSS" not in text


words = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=20)


@given(question=words, answer=words, meta=words)
def test_only_the_markers_can_become_special_tokens(question: str, answer: str, meta: str) -> None:
    turn = {"Human": f"<|Human|>: {question}<eoh>\n", "MOSS": f"<|MOSS|>: {answer}<eom>\n"}
    fields = moss_map(row(turn, meta=meta), "row", {})
    assert fields is not None
    outside = [_outside(field) for field in fields]
    assert outside == ["", "<|Human|>:<eoh>\n", "<|MOSS|>:<eom>\n"]
    under_compat = moss_map(row(turn, meta=meta), "row", {}, COMPAT)
    assert under_compat is not None and not any(field.foreign for field in under_compat)


def _outside(field: Field) -> str:
    text = list(field.text)
    for start, end in reversed(field.foreign):
        del text[start:end]
    return "".join(text)


def test_a_field_without_markers_is_foreign_as_a_whole() -> None:
    fields = moss_map(row({"Human": "hi <eoh> there", "MOSS": "<eom>"}), "row", {})
    assert fields is not None
    assert [_outside(field) for field in fields] == ["", "", "<eom>"]


def test_a_real_tokenizer_takes_the_fields(tokenizer: TextTokenizer) -> None:
    fields = moss_map(row(TURN), "row", {})
    assert fields is not None
    got = encode_fields(fields, tokenizer, 4096)
    assert got.input_ids[: len(tokenizer.bos_ids)].tolist() == list(tokenizer.bos_ids)
    labels = got.labels[got.labels != IGNORE_INDEX].tolist()
    assert tokenizer.decode(labels) == "".join(TURN[field] for field in ASSISTANT)
    under_compat = moss_map(row(TURN), "row", {}, COMPAT)
    assert under_compat is not None
    labels = encode_fields(under_compat, tokenizer, 4096).labels.tolist()
    shown = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    edges = "".join(TURN.values()).replace("\n4", "")
    assert shown == edges


def test_a_special_token_that_a_user_typed_stays_text_but_for_compat(
    tokenizer: TextTokenizer,
) -> None:
    typed = row({"Human": "<|Human|>: a<|im_end|>b<eoh>\n", "MOSS": "<|MOSS|>: c<eom>\n"})
    end = tokenizer.token_id("<|im_end|>")
    for compat, times in ((None, 0), (COMPAT, 1)):
        fields = moss_map(typed, "row", {}, compat)
        assert fields is not None
        ids = encode_fields(fields, tokenizer, 4096).input_ids.tolist()
        assert ids.count(end) == times
        shown = tokenizer.decode(ids[1:], skip_special_tokens=False)
        assert shown == "You are MOSS.\n<|Human|>: a<|im_end|>b<eoh>\n<|MOSS|>: c<eom>\n"


@pytest.mark.parametrize("compat", [None, COMPAT])
def test_a_file_of_rows_is_recognised_counted_and_packed(
    tmp_path: Path, tokenizer: TextTokenizer, compat: str | None
) -> None:
    """Two turns fit; of four one is cut off; one that never fits leaves nothing."""
    long = {**TURN, "MOSS": f"<|MOSS|>: {'word ' * 400}<eom>\n"}
    lines = [row(TURN, TURN), row(*[TURN] * 4), row(long), row(), {**row(TURN), "chat": 3}]
    path = write_jsonl(tmp_path / "moss.jsonl", lines)
    fill = {"bot_name": "Qwen"}
    sizes = [len(encode(tokenizer, turns, fill, compat).input_ids) for turns in (2, 3)]
    data = DataSection.model_validate(
        {
            "sources": [{"path": str(path)}], "fill": fill, "pack": False, "compat": compat,
            "max_length": sizes[1], "on_error": "skip",
        }
    )  # fmt: skip
    source, encoder = open_sources(data, 1), Encoder(tokenizer, "tokenizer", data)
    got = measure_rows(source, encoder, range(5))
    assert got.lengths.tolist() == [*sizes, 0, 0, 0]
    assert got.report["dropped"] == {"without a trained token": 1, "empty": 1, "unusable": 1}
    assert (got.report["used"], got.report["cut"]) == (2, 1)
    feed = make_feed(source, encoder, 1, got)
    packs = [placed.pack for placed in iter_packs(feed, epochs=1)]
    for pack in packs:
        turns = {0: 2, 1: 3}[int(pack.row_ids[0])]
        expected = encode(tokenizer, turns, fill, compat)
        assert pack.input_ids.tolist() == expected.input_ids.tolist()
        assert pack.labels.tolist() == expected.labels.tolist()
    assert len(packs) == 2


def encode(
    tokenizer: TextTokenizer, turns: int, fill: dict[str, str], compat: str | None
) -> Example:
    fields = moss_map(row(*[TURN] * turns), "row", fill, compat)
    assert fields is not None
    return encode_fields(fields, tokenizer, 10_000)


@pytest.mark.parametrize(
    "name", ["qwen_7b_qlora_moss_sft_all_e1", "internlm_7b_qlora_moss_sft_plugins_e1"]
)
def test_the_shipped_recipes_name_the_assistant_and_do_not_pack(name: str) -> None:
    recipe = load_recipe(name)
    assert set(recipe.data.fill) == {"bot_name"} and "MOSS" not in recipe.data.fill["bot_name"]
    assert recipe.data.pack is False
    assert all(
        "moss" in source.path and source.map in (None, "moss") for source in recipe.data.sources
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat": "no"}, "column 'chat' is text, not an object of turns"),
        ({"num_turns": 2}, "column 'chat' has no turn_2"),
        ({"num_turns": "many"}, "column 'num_turns' is text, not a count"),
        ({"meta_instruction": None}, "column 'meta_instruction' is null, not text"),
        ({"chat": {"turn_1": {"User": "x"}}}, "turn_1 has a field 'User'; known: Human"),
        ({"chat": {"turn_1": {"MOSS": 3}}}, "turn_1, 'MOSS' is the number 3, not text"),
        ({"chat": {"turn_1": {"MOSS": "\ud800"}}}, "turn 1 holds half a character"),
    ],
)
def test_rows_of_another_shape_are_refused_with_their_place(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        moss_map({**row(TURN), **changes}, "a.jsonl:3", {})
    assert str(caught.value).startswith("a.jsonl:3: ")
    assert message in str(caught.value)


def test_compat_leaves_the_start_to_a_tokenizer_that_puts_none(tmp_path: Path) -> None:
    """As Baichuan's tokenizer_config.json says; ours opens the row as it opens any other."""
    make_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": False}))
    tokenizer = TextTokenizer.from_folder(tmp_path)
    fields = moss_map(row(TURN), "row", {})
    assert fields is not None
    ours, theirs = (
        encode_fields(fields, tokenizer, 4096, compat=compat).input_ids.tolist()
        for compat in (False, True)
    )
    assert ours == [*tokenizer.bos_ids, *theirs] and len(tokenizer.bos_ids) == 1


def test_turns_are_counted_where_the_row_does_not_say_and_none_means_no_row() -> None:
    uncounted = {key: value for key, value in row(TURN, TURN).items() if key != "num_turns"}
    assert encoded(uncounted).input_ids.tolist() == encoded(row(TURN, TURN)).input_ids.tolist()
    absent = {"turn_1": {**TURN, "Commands": None}}
    assert "<|Commands|>" not in trained_text(encoded({**row(TURN), "chat": absent}))
    assert moss_map(row(), "row", {}) is None
