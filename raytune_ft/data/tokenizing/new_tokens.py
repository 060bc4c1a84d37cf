"""New tokens: a vocabulary in, the same with a user's own tokens behind its last one.

They are the user's: in rows, prompts and answers their text becomes the one id, also inside text
that is foreign to the template, where the model's own control tokens stay plain text.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from raytune_ft.errors import RecipeError

NewToken = tuple[str, tuple[int, ...]]
"""A token's text, and the ids that the vocabulary gave for it before."""


def add_tokens(backend: Tokenizer, texts: Sequence[str], where: str) -> tuple[NewToken, ...]:
    """Add `texts` behind the last id, in their order; return them with their former ids.

    Args:
        backend: changed in place.
        texts: each is found as it is written, before any normalisation.
        where: the model's folder, as a message begins with.

    Raises:
        RecipeError: a text is no new token, or the vocabulary cannot be continued.
    """
    before = [tuple(backend.encode(text, add_special_tokens=False).ids) for text in texts]
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    first = max(vocabulary.values(), default=-1) + 1
    for number, text in enumerate(texts):
        if not text.strip():
            raise RecipeError("model.new_tokens: a token of blanks; leave it out")
        known = backend.token_to_id(text)
        if known is not None:
            twice = "stands there twice" if known >= first else f"is token {known} of {where}"
            raise RecipeError(f"model.new_tokens: '{text}' {twice}; leave it out")
        backend.add_tokens([AddedToken(text, normalized=False, special=False)])
        found = backend.token_to_id(text)
        if found != first + number:
            raise RecipeError(
                f"model.new_tokens: '{text}' would get id {found}, and the last token of {where} "
                f"is {first - 1}: its vocabulary has gaps; use words that it has"
            )
    return tuple(zip(texts, before, strict=True))
