"""`inspect`: rows as the model will see them, packs, lengths and drops. No Ray, no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from raytune_ft import row_counts, survey
from raytune_ft.chat.text import printable
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.data import places, sources
from raytune_ft.data.encode import Example, encode_conversation
from raytune_ft.data.examples import Encoder
from raytune_ft.data.rows import formats
from raytune_ft.data.segments import Conversation
from raytune_ft.data.sources import RowSource
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.errors import DataError
from raytune_ft.inspection import page, terminal
from raytune_ft.inspection.view import RowView, View, bars_of, pieces_of
from raytune_ft.model import loading
from raytune_ft.planning import count_rows

PACKS_SHOWN = 6
STARTER = "quickstart.yaml"
"""The recipe whose model looks at a bare data file."""


def inspect(config: str, overrides: list[str], rows: int = 3, html: str | None = None) -> None:
    """Print what a recipe, or a bare data file, looks like to the model.

    Args:
        config: a recipe as for `train`, or a data file, folder, glob or address.
        overrides: `key=value` fields.
        rows: how many to show.
        html: write a page there instead.

    Raises:
        RecipeError, ModelError: something that the recipe names cannot be used.
        DataError: a row cannot be used and `data.on_error` is `stop`.
    """
    view = look(recipe_of(config, overrides), config, rows)
    if html is None:
        terminal.show(view)
    else:
        print(page.write_page(view, html))


def recipe_of(config: str, overrides: list[str]) -> Recipe:
    """Read a recipe; for a bare data file, take the default model and that file alone."""
    if not sources.is_data(config):
        return load_recipe(config, overrides)
    own = [f"data.sources=[{{path: {json.dumps(config)}}}]", "data.fill={}", "data.max_length=2048"]
    return load_recipe(STARTER, [*own, *overrides])


def look(recipe: Recipe, title: str, rows: int) -> View:
    """Collect everything that is shown of a recipe's data."""
    survey.check_names(recipe)
    folder = survey.model_folder(recipe.model.path)
    if folder is None:
        folder = loading.prepare_folder(recipe.model.path, _say)
    tokenizer = TextTokenizer.from_folder(folder, recipe.model.eos_token, recipe.model.new_tokens)
    encoder = Encoder.of(recipe, tokenizer)
    opened = sources.open_sources(recipe.data, recipe.train.seed)
    shown = _first_rows(opened, encoder, rows)
    training, _ = sources.split_validation(opened, recipe.data, recipe.train.seed)
    found = row_counts.count_tokens(training, encoder, recipe)
    counted, feed = found.counted, found.feed
    if recipe.data.compat is None:  # its first packs are computed from the sizes of all rows
        feed = make_feed(training, encoder, recipe.train.seed)
    first = places.iter_packs(feed, epochs=1)
    packs = [np.diff(placed.pack.cu_seqlens).tolist() for placed in islice(first, PACKS_SHOWN)]
    return View(
        title=f"{title}, as {Path(recipe.model.path).name} sees it",
        formats=[
            (source.path, str(recognition))
            for source, recognition in zip(recipe.data.sources, opened.recognised, strict=True)
        ],
        rows=shown,
        packs=packs if recipe.data.packing != "none" else [],
        bars=bars_of(found.measured.lengths),
        max_length=recipe.data.max_length,
        counts=list(count_rows(counted, recipe)),
        sampled="" if counted.exact else f"{counted.read:,} of {len(training):,} rows",
    )


def _first_rows(opened: RowSource, encoder: Encoder, rows: int) -> list[RowView]:
    """Show the first rows of each source; dropped ones are shown too, but not counted."""
    views: list[RowView] = []
    sets = opened.sets_of(np.arange(len(opened)))
    for which in np.unique(sets):
        shown = 0
        for number in np.flatnonzero(sets == which).tolist():
            if shown == rows:
                break
            views += _views(opened, number, encoder)
            shown += views[-1].dropped is None
    return views


def _views(opened: RowSource, number: int, encoder: Encoder) -> list[RowView]:
    """Show a row; of a pair, its chosen and its rejected conversation."""
    where, source = opened.where(number), opened.source_of(number)
    try:
        row = opened.rows([number])[0]
        read = formats.to_conversation if encoder.objective == "sft" else formats.to_pair
        found = read(row, source, encoder.data, where)
        example = encoder.encode(row, source, where)
    except DataError as error:
        if encoder.data.on_error == "stop":
            raise
        return [RowView(where, dropped=str(error))]
    if found is None or example is None:
        return [RowView(where, dropped=f"{where}: it has no answer")]
    if isinstance(found, Conversation):
        return [_view(where, found, example, encoder)]
    names = (f"{where}, chosen", f"{where}, rejected")
    return [
        _view(name, side, part, encoder)
        for name, side, part in zip(names, found, _sides(found, example, encoder), strict=True)
    ]


def _sides(pair: Sequence[Conversation], example: Example, encoder: Encoder) -> Iterator[Example]:
    """Part the example of a pair."""
    start = 0
    for side, stop in zip(pair, (example.n_chosen, len(example.input_ids)), strict=True):
        alone = encode_conversation(side, encoder.bound_template, encoder.tokenizer)
        ids, labels = example.input_ids[start:stop], example.labels[start:stop]
        yield Example(ids, labels, alone.uncut_length)
        start = stop


def _view(where: str, found: Conversation, example: Example, encoder: Encoder) -> RowView:
    return RowView(
        where,
        turns=_turns(found),
        pieces=pieces_of(example.input_ids, example.labels, encoder.tokenizer),
        n_tokens=len(example.input_ids),
        n_targets=example.n_targets,
        uncut_length=example.uncut_length,
    )


def _turns(conversation: Conversation) -> list[tuple[str, str]]:
    if conversation.written is not None:
        return [("text", printable("".join(part.text for part in conversation.written)))]
    turns = [("tools", json.dumps(list(conversation.tools)))] if conversation.tools else []
    for message in conversation.messages:
        if message.get("reasoning_content"):
            turns.append(("reasoning", printable(message["reasoning_content"])))
        turns.append((message["role"], printable(message["content"])))
        turns += [("call", printable(json.dumps(call))) for call in message.get("tool_calls") or ()]
    return turns


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
