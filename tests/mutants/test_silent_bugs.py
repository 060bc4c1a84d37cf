"""Silent bugs that no other test looks for from outside: C08 and C42 of the known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.data.cache.key import SOURCE, token_key
from raytune_ft.data.encode import Example, encode_conversation, encode_prompt
from raytune_ft.data.examples import Encoder, encode_rows
from raytune_ft.data.segments import Conversation
from raytune_ft.data.sources import open_sources
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import RaytuneError
from tests.data.chat_families import FAMILIES, Family
from tests.data.conftest import chat, tokenizer, tokenizer_folder  # noqa: F401
from tests.data.test_cache_key import SCHEMA, Run, others

READ = ("data.", "model.")
"""Sections whose fields may change tokens."""


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_text_has_the_starts_that_its_template_writes(
    family: Family,
    tokenizer: TextTokenizer,  # noqa: F811
) -> None:
    own = family.tokenizer(tokenizer)
    template = get_template("tokenizer", own)
    (start,) = own.bos_ids
    messages = chat("what is red?", "a river", "and blue?", "a stone")
    for prompting in (False, True):
        given = messages[:3] if prompting else messages
        segments = template.segments(given, add_generation_prompt=prompting)
        written = "".join(segment.text for segment in segments).count(family.bos)
        if prompting:
            ids = encode_prompt(given, template, own)
        else:
            ids = encode_conversation(Conversation(given), template, own).input_ids.tolist()
        assert ids.count(start) == written


class Tokens(Run):
    """A recipe, its tokens and the key under which they would be kept."""

    def tokens(self, field: str, value: Any) -> tuple[list[tuple[bytes, bytes]], str]:
        recipe = self.changed(field, value)
        own = TextTokenizer.from_folder(
            recipe.model.path, recipe.model.eos_token, recipe.model.new_tokens
        )
        rows, encoder = open_sources(recipe.data, recipe.train.seed), Encoder.of(recipe, own)
        found = encode_rows(rows, encoder, np.arange(len(rows)))
        content = [
            (one.input_ids.tobytes(), one.labels.tobytes())
            if isinstance(one, Example)
            else (str(one).encode(), b"")
            for one in found
        ]
        return content, token_key(rows, encoder, recipe.train.seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return Tokens(tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize("field", sorted(name for name in SCHEMA if name.startswith(READ)))
def test_other_tokens_have_another_key(run: Tokens, field: str, tmp_path: Path) -> None:
    """However a field is classified: the tokens themselves are compared."""
    usual, key = run.tokens("train.seed", 42)
    special = {SOURCE + "map": ["text", "alpaca_map_fn"], SOURCE + "path": [str(tmp_path)]}
    for value in special.get(field) or others(SCHEMA[field]):
        try:
            tokens, changed = run.tokens(field, value)
        except RaytuneError:
            continue
        assert tokens == usual or changed != key, (field, value)


def test_some_fields_change_tokens(run: Tokens) -> None:
    usual, _ = run.tokens("train.seed", 42)
    for field, value in (("data.system", "Be brief."), (SOURCE + "loss", "all")):
        assert run.tokens(field, value)[0] != usual
