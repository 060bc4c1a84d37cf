"""New tokens: a model in, the same with rows for tokens that were added to its vocabulary.

A row begins as the mean of the rows of the pieces that the old vocabulary gave for the token's
text, in the embedding and, where it is not tied to it, in the output head. A matrix with rows to
spare keeps its size; none is ever made smaller.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raytune_ft.errors import RecipeError
from raytune_ft.model.silence import quiet

Pieces = Mapping[int, Sequence[int]]
"""A new token's id -> the ids that its text had before."""


def check_place(folder: Path) -> None:
    """Refuse a model whose own files have no place for added tokens; RecipeError says what to do.

    For what is written in the base's own layout: a model trained in full, or merged so.
    """
    from raytune_ft.model.original import Original
    from raytune_ft.model.side_files import is_native

    if not is_native(Original.of(folder)):
        raise RecipeError(
            f"model.new_tokens: the files of {folder} are read by the model's own code, which has "
            "no place for them; train an adapter (model.method: lora), and merge it with layout "
            "native"
        )


def make_room(model: Any, pieces: Pieces) -> None:
    """Give every new token its row, in place; which weights are trained does not change.

    Raises:
        RecipeError: the model's head is not a plain matrix of rows.
    """
    if not pieces:
        return
    _check_head(model)
    old = model.get_input_embeddings().weight.shape[0]
    widen(model, max(pieces) + 1)
    for table in tables(model):
        weight = table.weight
        with torch.no_grad():
            known = weight[: min(old, *pieces)].float()
            everything = known.mean(0)
            weight[old:] = everything.to(weight)
            for id_, former in pieces.items():
                rows = [row for row in former if row < len(known)]
                start = known[rows].mean(0) if rows else everything
                weight[id_] = start.to(weight)


def widen(model: Any, rows: int) -> None:
    """Let embedding and head have at least `rows` rows; what the new ones hold is not said."""
    embedding = model.get_input_embeddings()
    if rows <= embedding.weight.shape[0]:
        return
    trained = embedding.weight.requires_grad
    with quiet(), torch.random.fork_rng():
        model.resize_token_embeddings(rows, mean_resizing=False)
    for table in tables(model):
        table.weight.requires_grad_(trained)


def tables(model: Any) -> list[Any]:
    """Return the embedding, and the output head where it is a matrix of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    return [embedding] if tied else [embedding, head]


def trained_rows(
    model: Any, ids: Collection[int], targets: Sequence[str], whole: Sequence[str]
) -> dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices`: which rows of which module are trained.

    Args:
        model: with rows for `ids`.
        ids: of the new tokens.
        targets: names of modules that get low-rank updates.
        whole: names of modules that are trained in full, new rows among them.

    Raises:
        RecipeError: the recipe trains the same rows otherwise as well.
    """
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module in (embedding, head)]
    for name in names:
        if _named(name, targets):
            raise RecipeError(
                f"lora.targets: '{name}' is the table of model.new_tokens; leave it out, or name "
                "it in lora.modules_to_save"
            )
    in_full = [name for name in names if _named(name, whole)]
    if len(in_full) == len(names):
        return None
    if in_full:
        other = next(name for name in names if name not in in_full)
        raise RecipeError(
            f"lora.modules_to_save: has '{in_full[0]}' without '{other}', where model.new_tokens "
            "have rows as well; name both, or neither"
        )
    chosen = names if len(tables(model)) > 1 else names[:1]
    return {name: sorted(ids) for name in chosen}


def _named(name: str, wanted: Sequence[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _check_head(model: Any) -> None:
    head = model.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and head.bias is None and not hasattr(head, "fold")
    if head is not None and not plain:
        raise RecipeError(
            f"model.new_tokens: the output head of {type(model).__name__} is no plain matrix; "
            "use words that its vocabulary has"
        )
