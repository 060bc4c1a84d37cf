"""Layouts: which tensors of an original checkpoint are which of the native network. Plain data.

A layout is a table of rules from module names in the files to module names in the network; `{n}`
stands for the number of the layer. A fused layer has several parts, stacked on dim 0. One table
serves loading and saving (`conversions`), merging, export and adapters under original names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

LAYER = "{n}"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Widths = Mapping[str, int]
"""Rows of a part by its kind: `queries`, `keys`."""


@dataclass(frozen=True)
class Rule:
    """One module of the files."""

    source: str
    """Its name there."""
    parts: tuple[tuple[str, str], ...]
    """(native module, kind of its rows), in the order of the rows. A lone part is the whole."""


def renamed(source: str, native: str) -> Rule:
    """Return the rule of a module that only has another name."""
    return Rule(source, ((native, ""),))


def fused_qkv(source: str, attention: str) -> Rule:
    """Return the rule of a module that stacks queries, keys and values."""
    kinds = (("q_proj", "queries"), ("k_proj", "keys"), ("v_proj", "keys"))
    return Rule(source, tuple((f"{attention}.{leaf}", kind) for leaf, kind in kinds))


@dataclass(frozen=True)
class Piece:
    """A part of an original tensor under its native name."""

    name: str
    rows: slice
    """Its rows in the original tensor; slice(None) is all of it."""


@dataclass(frozen=True)
class Layout:
    """The rules of a family; modules without a rule have the same name on both sides."""

    rules: tuple[Rule, ...] = ()

    @cached_property
    def by_source(self) -> Mapping[str, Rule]:
        """Rules by the original module's name."""
        return {rule.source: rule for rule in self.rules}

    @cached_property
    def by_native(self) -> Mapping[str, Rule]:
        """Rules by the names of their native parts."""
        return {name: rule for rule in self.rules for name, _ in rule.parts}

    def pieces(self, name: str, widths: Widths) -> tuple[Piece, ...]:
        """Return the native tensors that an original one holds, in the order of its rows.

        Args:
            name: of the original tensor: a module's name and `.weight` or `.bias`.
            widths: rows of each kind of part.
        """
        module, _, kind = name.rpartition(".")
        natives = self.natives(module, widths)
        return tuple(Piece(f"{native}.{kind}", rows) for native, rows in natives)

    def natives(self, module: str, widths: Widths) -> tuple[tuple[str, slice], ...]:
        """Return the native modules of an original one, with their rows in it."""
        pattern, number = _split_number(module)
        rule = self.by_source.get(pattern)
        if rule is None:
            return ((module, slice(None)),)
        if len(rule.parts) == 1:
            return ((rule.parts[0][0].replace(LAYER, number), slice(None)),)
        found, start = [], 0
        for native, kind in rule.parts:
            found.append((native.replace(LAYER, number), slice(start, start + widths[kind])))
            start += widths[kind]
        return tuple(found)

    def original(self, name: str) -> str:
        """Return the name of the original tensor that holds a native one."""
        module, _, kind = name.rpartition(".")
        pattern, number = _split_number(module)
        rule = self.by_native.get(pattern)
        return name if rule is None else f"{rule.source.replace(LAYER, number)}.{kind}"

    def leaves_of(self, leaf: str) -> list[str]:
        """Return the native leaf names of an original one, such as `W_pack`; none: unknown."""
        parts = (
            name.rpartition(".")[2]
            for rule in self.rules
            if rule.source.rpartition(".")[2] == leaf
            for name, _ in rule.parts
        )
        return list(dict.fromkeys(parts))

    def source_of(self, name: str) -> tuple[str, str] | None:
        """Return (original module, rest) of a name that begins with one; None if none does.

        Names of adapter tensors: the rest is `lora_A.weight`, or `weight` for a whole module.
        """
        words = name.split(".")
        for length in range(len(words) - 1, 0, -1):
            module = ".".join(words[:length])
            if _split_number(module)[0] in self.by_source:
                return module, ".".join(words[length:])
        return None


IDENTITY = Layout()
"""Files in the network's own names."""


def widths_of(config: Any) -> Widths:
    """Return the rows of a network's query and key layers; none for networks without heads."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return {"queries": heads * head_dim, "keys": keys * head_dim}


def conversions(layout: Layout) -> list[Any]:
    """Return a layout as transformers' reversible conversions, for `from_pretrained`.

    A fused module is renamed into the native parent first and split there, because transformers
    matches a split by the plain ends of names.
    """
    from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

    renamings, converters = [], []
    for rule in layout.rules:
        first = rule.parts[0][0]
        parent, _, _ = first.rpartition(".")
        fused = len(rule.parts) > 1
        target = f"{parent}.{rule.source.rpartition('.')[2]}" if fused else first
        if target != rule.source:
            renamings.append(WeightRenaming(*_patterns(rule.source, target)))
        if fused:
            ends = [_end(name) for name, _ in rule.parts]
            converters.append(WeightConverter([_end(target)], ends, [Split(dim=0)]))
    return [*renamings, *converters]


def stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the original tensor of native parts; a lone part as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _patterns(source: str, target: str) -> tuple[str, str]:
    literal = "^" + r"(\d+)".join(re.escape(part) for part in source.split(LAYER))
    return literal, target.replace(LAYER, r"\1")


def _end(module: str) -> str:
    """Return what follows the layer's number."""
    return module.rpartition(f"{LAYER}.")[2]


def _split_number(module: str) -> tuple[str, str]:
    match = _NUMBER.search(f"{module}.")
    if match is None:
        return module, ""
    return f"{module[: match.start()]}{LAYER}{module[match.end() :]}", match[0]
