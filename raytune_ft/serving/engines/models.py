"""The models of one base: names in, ways to speak and to compute out.

The first is what was opened: a run's adapter on its base, or a plain model. Where it is an
adapter, `base` is the model without. A folder of adapters gives more, by the names of its
entries: run folders that hold an adapter, or adapter folders. They are read at first use, at most
a few at once; the one that was used longest ago goes.

Adapter files come from elsewhere: names are of a few letters and lead nowhere outside the folder
(links included), only LoRA is read, only safetensors, and no configuration that has peft import a
module by its name.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from raytune_ft.chat.model import ChatModel
from raytune_ft.chat.source import ChatSource, find_source
from raytune_ft.data.templating.templates import get_template
from raytune_ft.errors import CheckpointError, RaytuneError, ServeError

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BASE = "base"
LISTED = 10_000
"""Entries of the folder that are looked at."""
IMPORTING = ("megatron_config", "auto_mapping", "runtime_config", "layer_replication")
"""Fields of an adapter's configuration that name modules to import or rebuild the network."""


class Models:
    """What one base answers as; `use`, `load` and `evict` belong to the thread that computes."""

    def __init__(self, chat: ChatModel, root: str | None = None, most: int = 4) -> None:
        """Begin with what was opened.

        Args:
            chat: the first model.
            root: folder of further adapters.
            most: of them in memory at once.

        Raises:
            ServeError: `root` is no folder.
        """
        self.first = chat.name
        self.model: Any = chat.model
        self._root = None if root is None else Path(root).expanduser().resolve()
        if self._root is not None and not self._root.is_dir():
            raise ServeError(
                f"adapters {root}: no such folder; give one that holds adapter folders"
            )
        self._most = most
        self._chats: dict[str, ChatModel] = {chat.name: chat}
        self._loaded: OrderedDict[str, str] = OrderedDict()
        self._made = 0
        self._active: str | None = chat.name
        if _adapted(chat.model):
            if self.model.peft_config["default"].bias == "none" and chat.name != BASE:
                self._chats[BASE] = replace(chat, name=BASE)
        elif self._root is not None:
            self._active = None

    def names(self) -> tuple[str, ...]:
        """Return all that may be asked for, the first one first."""
        here = [name for name in (self.first, BASE) if name in self._chats]
        return (*here, *(name for name in self._found() if name not in here))

    def chat(self, name: str | None) -> ChatModel:
        """Return how to speak to a model: its template, system text and stop ids.

        Raises:
            ServeError: there is no such model.
            CheckpointError: its folder cannot be used.
        """
        name = self.first if name is None else name
        known = self._chats.get(name)
        if known is None:
            source = self._source(name)
            first = self._chats[self.first]
            template = get_template(source.template, first.tokenizer)
            known = replace(first, name=name, template=template, system=source.system)
            self._chats[name] = known
        return known

    def adapter_folder(self, name: str) -> Path | None:
        """Return where the adapter of that name lies, checked; None for what needs none."""
        return None if name in (self.first, BASE) else self._source(name).adapter

    def is_loaded(self, name: str) -> bool:
        """Whether a model's weights are in memory."""
        return name in (self.first, BASE) or name in self._loaded

    def room(self, in_use: Collection[str]) -> bool:
        """Whether another adapter may be loaded, if need be in the place of one not in use."""
        return len(self._loaded) < self._most or any(n not in in_use for n in self._loaded)

    def load(self, name: str, in_use: Collection[str]) -> str | None:
        """Put an adapter onto the base; return the name of the one that had to go.

        Raises:
            CheckpointError, ModelError, ServeError: one line that names its folder.
        """
        source = self._source(name)
        key = f"served_{self._made}"
        self._made += 1
        self.model = _added(self.model, cast(Path, source.adapter), key)
        self._loaded[name] = key
        # one that is there must be active, also while the base computes without any
        self.model.set_adapter(key, inference_mode=True)
        self._active = "?"
        log.info("adapter %s is loaded", name)
        if len(self._loaded) <= self._most:
            return None
        # only now: one that cannot be read must not cost another its place
        gone = next(held for held in self._loaded if held not in (*in_use, name))
        self._evict(gone)
        return gone

    def use(self, name: str) -> None:
        """Have passes compute as a model that is loaded."""
        if name in self._loaded:
            self._loaded.move_to_end(name)
        if name == self._active or not _adapted(self.model):
            return
        tuner = self.model.base_model
        if name == BASE or (name == self.first and "default" not in self.model.peft_config):
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self.model.set_adapter(self._loaded.get(name, "default"), inference_mode=True)
        self._active = name

    def _evict(self, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of which one is active now, which `use` sets
            self.model.delete_adapter(self._loaded.pop(name))
        self._active = "?"
        log.info("adapter %s is dropped", name)

    def _found(self) -> list[str]:
        if self._root is None:
            return []
        entries = sorted(self._root.iterdir())[:LISTED]
        return [entry.name for entry in entries if self._folder(entry.name) is not None]

    def _folder(self, name: str) -> Path | None:
        """Return an adapter's real folder inside the root, None if there is none."""
        if self._root is None or not NAME.fullmatch(name):
            return None
        folder = (self._root / name).resolve()
        for place in (folder / "adapter", folder):
            config = (place / "adapter_config.json").resolve()
            if config.is_file() and config.is_relative_to(self._root):
                return place
        return None

    def _source(self, name: str) -> ChatSource:
        folder = self._folder(name)
        if folder is None:
            raise ServeError(f"the model '{name}' does not exist; there are {self.names()}")
        source = find_source(str(folder))
        if source.adapter is None:
            raise CheckpointError(f"{folder}: no adapter; serve it on its own")
        _check(source, cast(Path, self._root), self._chats[self.first])
        return source


def _adapted(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")  # transformers' models have a peft_config of their own


def _check(source: ChatSource, root: Path, chat: ChatModel) -> None:
    """Refuse what must not be read, and what does not belong on this base."""
    folder = cast(Path, source.adapter)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        file = (folder / name).resolve()
        if not file.is_file() or not file.is_relative_to(root):
            raise CheckpointError(f"{folder}: no {name} inside {root}; export the adapter again")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json: cannot be read ({error})") from None
    named = [key for key in IMPORTING if isinstance(config, dict) and config.get(key)]
    if named:
        raise CheckpointError(
            f"{folder}/adapter_config.json: '{named[0]}' is not read from adapters that are "
            "served by name; serve it on its own"
        )
    if source.section.new_tokens:
        raise CheckpointError(
            f"{folder}: the adapter brings tokens of its own; serve it on its own"
        )
    base = Path(source.base) / "config.json"
    ours = Path(chat.folder) / "config.json" if chat.folder else None
    if ours and base.is_file() and ours.is_file() and base.read_bytes() != ours.read_bytes():
        raise CheckpointError(
            f"{folder}: trained on {source.base}; this endpoint serves {chat.folder}"
        )


def _added(model: Any, folder: Path, key: str) -> Any:
    """Put an adapter beside others; return the model, which peft wraps at the first one."""
    from raytune_ft.model.beside import add_adapter

    try:
        return add_adapter(model, folder, key)
    except RaytuneError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder}: does not fit beside other adapters ({reason})") from None
