"""A model folder seen through its family: tensors under both names, one at a time.

Stands between the files and whoever rewrites them (merge, export): it reads an original tensor,
hands out its native parts, and puts changed parts back together. Memory holds one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from raytune_ft.errors import ModelError
from raytune_ft.model.families import Family, detect, translate
from raytune_ft.model.families.layout import Piece, Widths, stack, widths_of
from raytune_ft.model.loading import read_config, weight_files
from raytune_ft.model.silence import quiet
from raytune_ft.model.tensors import stream_tensors, tensor_names

Form = Literal["original", "native"]
"""Names and shapes as in the model's own files, or as transformers has them."""
Change = Callable[[str, torch.Tensor], torch.Tensor]
"""(native name, tensor) -> what is written in its place."""


@dataclass(frozen=True)
class Original:
    """A model folder that is rewritten."""

    folder: Path
    family: Family
    config: Any
    """The network's configuration."""

    @classmethod
    def of(cls, folder: Path) -> Original:
        """Read a model folder's config.json; ModelError if no family reads it."""
        content, where = read_config(folder), str(folder / "config.json")
        return cls(folder, detect(content, where), translate(content, where))

    @cached_property
    def network(self) -> Any:
        """The network without storage."""
        with torch.device("meta"), quiet():
            return self.family.network(self.config)(self.config)

    @cached_property
    def widths(self) -> Widths:
        """Rows of the query and key layers."""
        return widths_of(self.config)

    @cached_property
    def embedding(self) -> str:
        """Native name of the embedding."""
        return self._name_of(self.network.get_input_embeddings())

    @cached_property
    def head(self) -> str:
        """Native name of the output head."""
        return self._name_of(self.network.get_output_embeddings())

    @cached_property
    def tied(self) -> bool:
        """Is the head the embedding; families differ in what silence means."""
        return bool(self.config.get_text_config().tie_word_embeddings)

    def linear_names(self) -> set[str]:
        """Return the tensors that loading in NF4 quantises: all linear layers but the head."""
        from transformers.quantizers.base import get_keys_to_not_convert

        kept = set(get_keys_to_not_convert(self.network))
        return {
            f"{name}.weight"
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Linear) and name not in kept
        }

    def shapes(self) -> dict[str, torch.Size]:
        """Return native name -> shape of all tensors in the files, without reading them."""
        found: dict[str, torch.Size] = {}
        for name, shape in tensor_names(weight_files(self.folder)).items():
            if self.family.is_spare(name):
                continue
            for piece in self._pieces(name, shape):
                rows = len(range(shape[0])[piece.rows]) if shape else 0
                found[piece.name] = torch.Size((rows, *shape[1:])) if shape else shape
        return found

    def hollow(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the files' tensors without their content, in the order of `rewritten`."""
        for name, shape in tensor_names(weight_files(self.folder)).items():
            yield name, torch.empty(shape, device="meta")

    def rewritten(
        self,
        change: Change,
        form: Form,
        *,
        untie: bool,
        tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    ) -> Iterator[Any]:
        """Yield (name, tensor) of the changed model, in the order of `stream_tensors`.

        Args:
            change: gives every native part its new content.
            form: `original` names and fusions, or `native` ones.
            untie: write a head of its own beside the embedding that it was tied to.
            tensors: in place of the files' own.
        """
        for name, tensor in tensors or stream_tensors(weight_files(self.folder)):
            if self.family.is_spare(name):
                if form == "original":
                    yield name, tensor
                continue
            pieces = self._pieces(name, tensor.shape)
            native = pieces[0].name
            if self.tied and native == self.head:
                # a copy of the embedding, which may be stale and would be read by nobody
                if form == "original" and not untie:
                    yield name, change(self.embedding, tensor)
                continue
            parts = {piece.name: change(piece.name, tensor[piece.rows]) for piece in pieces}
            yield from self._written(name, parts, form)
            if untie and native == self.embedding:
                yield from self._written(
                    self.family.layout.original(self.head),
                    {self.head: change(self.head, tensor)},
                    form,
                )
            del tensor, parts  # or the next ones are made while these are held

    def _written(
        self, name: str, parts: Mapping[str, torch.Tensor], form: Form
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if form == "original":
            yield name, stack(list(parts.values()))
            return
        for native, tensor in parts.items():
            # a view would keep, and write, the whole fused tensor
            yield native, tensor.clone() if len(parts) > 1 else tensor

    def _pieces(self, name: str, shape: torch.Size) -> tuple[Piece, ...]:
        pieces = self.family.layout.pieces(name, self.widths)
        end = pieces[-1].rows.stop
        if end is not None and end != shape[0]:
            raise ModelError(
                f"{self.folder}: tensor '{name}' has {shape[0]} rows, and config.json asks for "
                f"{end}; config.json and weights belong to different models"
            )
        return pieces

    def _name_of(self, module: nn.Module) -> str:
        names = (name for name, found in self.network.named_modules() if found is module)
        return f"{next(names)}.weight"
