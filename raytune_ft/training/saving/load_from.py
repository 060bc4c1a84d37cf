"""Load from: trained weights that a new run begins with (`model.load_from`), checked and kept.

A run, one of its checkpoints or an adapter folder in; a folder out that every worker of the new run
begins with. Names, shapes and the fields that decide what an adapter computes are compared on a
network without storage, before any row is read. The new run keeps its own copy of an adapter, so
that it can be taken up again whatever becomes of the source.

The trained weights alone are taken: steps, optimizer and the place in the data begin anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from raytune_ft.config import loader
from raytune_ft.config.schema import LoraSection, Recipe
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import CheckpointError
from raytune_ft.model import adapter, beginnings, loading, new_tokens
from raytune_ft.model.families import detect
from raytune_ft.model.families.layout import IDENTITY, widths_of
from raytune_ft.model.silence import quiet
from raytune_ft.training.run_folder import MANIFEST, RunFolder
from raytune_ft.training.saving import checkpoint, durable

FIELD = "model.load_from"
BEGINNING = "beginning"
"""In a run's folder: the adapter that it began with, from elsewhere or found at length."""
NETWORK = "model."
"""What a checkpoint's names begin with: the network inside the loss."""


Kind = Literal["adapter", "checkpoint", "model"]


@dataclass(frozen=True)
class Begin:
    """What a worker begins with; plain values, so that it travels to any node."""

    path: str
    kind: Kind
    sha256: str | None = None
    """Of the weights, where they are not the run's own copy."""


@dataclass(frozen=True)
class Source:
    """What `model.load_from` names."""

    path: Path
    kind: Kind
    given: str
    """As the user wrote it; messages begin with it."""


def prepare(recipe: Recipe, model_folder: Path, run: RunFolder) -> Begin | None:
    """Check what the recipe begins with, before rows are read; write an adapter into the run.

    Args:
        recipe: of the new run, or of one that is taken up again, which has its adapter already.
        model_folder: of the base, checked.
        run: the run.

    Returns:
        What workers begin with; None if the recipe names nothing, or the run is behind that.

    Raises:
        CheckpointError: it is nothing to begin with, or does not fit; names the first field or
            tensor that differs, with both values.
    """
    if recipe.model.load_from is None:
        return None
    kept = run.path / BEGINNING
    if recipe.model.method == "lora" and (kept / adapter.CONFIG_FILE).is_file():
        return Begin(str(kept), "adapter")
    if recipe.train.objective != "dpo" and checkpoint.latest(run.checkpoints) is not None:
        return None
    source = find(recipe.model.load_from, recipe.model.method)
    if recipe.model.method == "full":
        if source.kind == "checkpoint":
            weights = _named(source, checkpoint.load(source.path).weights)
            _check_tensors(source, weights, dict(_network(recipe, model_folder).named_parameters()))
        return _unchanged(source, run)
    wrapped = _network(recipe, model_folder)
    weights = _of_adapter(source, recipe, wrapped)
    with durable.whole_folder(kept) as place:
        adapter.keep_beginning(wrapped, place, weights)
    return Begin(str(kept), "adapter")


def _unchanged(source: Source, run: RunFolder) -> Begin:
    """Tell what a run of all weights begins with; refuse what is another one since it began."""
    digest = hashlib.sha256()
    for file in sorted(p for p in source.path.iterdir() if p.suffix == ".safetensors"):
        digest.update(checkpoint.sha256_of(file).encode())
    begin = Begin(str(source.path), source.kind, digest.hexdigest())
    known = run.info().get("load_from_sha256") if run.run_json.is_file() else None
    if known not in (None, begin.sha256):
        raise CheckpointError(
            f"{FIELD}: {source.given} has changed since this run began; put it back, or train "
            "under another run.name"
        )
    return begin


def find(given: str, method: str) -> Source:
    """Tell what a path names, a run's result before its checkpoints.

    Raises:
        CheckpointError: nothing that a run of this method can begin with.
    """
    path = Path(given).expanduser().resolve()
    if (path / "run.json").is_file():
        return _of_run(RunFolder(path), given, method)
    if (path / MANIFEST).is_file():
        _check_method(RunFolder(path.parent.parent), given, method)
        return Source(path, "checkpoint", given)
    if (path / adapter.CONFIG_FILE).is_file() and method == "lora":
        return Source(path, "adapter", given)
    if (path / "config.json").is_file() and method == "full":
        return Source(path, "model", given)
    wanted = "an adapter" if method == "lora" else "a model"
    raise CheckpointError(
        f"{FIELD}: '{given}' is no run, no checkpoint and no folder of {wanted}, which "
        f"model.method '{method}' begins with"
    )


def put(model: Any, folder: Path) -> None:
    """Give a model that is trained in full the weights of a checkpoint; strict.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    source = Source(folder, "checkpoint", str(folder))
    weights = _named(source, checkpoint.load(folder).weights)
    trained = dict(model.named_parameters())
    _check_tensors(source, weights, trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def _of_run(run: RunFolder, given: str, method: str) -> Source:
    _check_method(run, given, method)
    if method == "lora" and (run.adapter / adapter.CONFIG_FILE).is_file():
        return Source(run.adapter, "adapter", given)
    if method == "full" and (run.model / "config.json").is_file():
        return Source(run.model, "model", given)
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        raise CheckpointError(f"{FIELD}: {given} has no result and no whole checkpoint yet")
    return Source(newest, "checkpoint", given)


def _check_method(run: RunFolder, given: str, method: str) -> None:
    trained = run.info().get("method", method) if run.run_json.is_file() else method
    if trained != method:
        raise CheckpointError(
            f"{FIELD}: {given} was trained with model.method '{trained}', this recipe has "
            f"'{method}'; set model.method: {trained}"
        )


def _network(recipe: Recipe, model_folder: Path) -> Any:
    """Build what the recipe trains, without storage."""
    config_json = loading.read_config(model_folder)
    family = detect(config_json, str(model_folder / "config.json"))
    config = family.translate(config_json)
    section = recipe.model
    pieces: new_tokens.Pieces = {}
    if section.new_tokens:
        read = TextTokenizer.from_folder(model_folder, section.eos_token, section.new_tokens)
        pieces = read.new_tokens
    with torch.device("meta"), quiet():
        network: Any = family.network(config)(config)
        if pieces:
            new_tokens.widen(network, max(pieces) + 1)
        network.tie_weights()
        if section.method == "full":
            return network
        network.requires_grad_(False)
        plain = recipe.lora.model_copy(update={"init_lora_weights": True})
        return adapter.attach(network, plain, recipe.train.seed, new_ids=pieces)


def _of_adapter(source: Source, recipe: Recipe, wrapped: Any) -> dict[str, torch.Tensor]:
    """Return the source's weights under PEFT's names, compared with an adapter without storage."""
    from peft import get_peft_model_state_dict

    if source.kind == "adapter":
        network = wrapped.get_base_model()
        layout = getattr(type(network), "layout", IDENTITY)
        config, weights = adapter.read_adapter(source.path, layout, widths_of(network.config))
        wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        theirs = _of_config(source, config)
    else:
        wanted = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
        weights = _named(source, checkpoint.load(source.path).weights)
        theirs = _of_run_recipe(source)
    _check_lora(source, theirs, recipe.lora)
    _check_targets(source, weights, wanted)
    _check_tensors(source, weights, wanted)
    if source.kind == "checkpoint":
        wrapped.load_state_dict(weights, strict=False, assign=True)
        weights = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return weights


def _named(source: Source, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors by the names that the network itself has for them."""
    foreign = sorted(name for name in weights if not name.startswith(NETWORK))
    if foreign:
        raise CheckpointError(f"{FIELD}: {source.given} has a tensor '{foreign[0]}' of no network")
    return {name.removeprefix(NETWORK): tensor for name, tensor in weights.items()}


def _of_config(source: Source, config: Any) -> dict[str, Any]:
    """Return what a LoraConfig says of the fields that have to be alike."""
    if config.rank_pattern or config.alpha_pattern:
        raise CheckpointError(
            f"{FIELD}: {source.given} has other values of lora.r or lora.alpha by layer; only an "
            "adapter with one of each can be begun with"
        )
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "bias": config.bias,
        "use_rslora": bool(config.use_rslora),
        "use_dora": bool(config.use_dora),
        "modules_to_save": sorted(config.modules_to_save or []),
    }


def _of_run_recipe(source: Source) -> dict[str, Any]:
    """Return the same of the run that a checkpoint stands in."""
    run = RunFolder(source.path.parent.parent)
    if not run.recipe.is_file():
        raise CheckpointError(
            f"{FIELD}: {source.given} is not inside its run, so its lora.alpha is not known; "
            "give a checkpoint of a run, or an adapter folder"
        )
    lora = loader.load_recipe(str(run.recipe)).lora
    if beginnings.moves_base(lora.init_lora_weights):
        raise CheckpointError(
            f"{FIELD}: {source.given} goes with a base that lora.init_lora_weights "
            f"'{lora.init_lora_weights}' has changed; let its run end and give its adapter folder"
        )
    return _alike(lora)


def _alike(lora: LoraSection) -> dict[str, Any]:
    """Return the fields that decide what an adapter's weights mean, but for its targets."""
    return {
        "r": lora.r,
        "alpha": lora.alpha,
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "modules_to_save": sorted(lora.modules_to_save),
    }


def _check_lora(source: Source, theirs: Mapping[str, Any], lora: LoraSection) -> None:
    """Name the first field that has another value, and both values."""
    for field, ours in _alike(lora).items():
        if theirs[field] != ours:
            raise CheckpointError(
                f"{FIELD}: lora.{field} of {source.given} is {theirs[field]}, this recipe's is "
                f"{ours}; set lora.{field}: {theirs[field]}"
            )


def _check_targets(source: Source, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    theirs, ours = (
        sorted({_layer(n) for n in names if ".lora_A." in n}) for names in (given, wanted)
    )
    if theirs != ours:
        raise CheckpointError(
            f"{FIELD}: lora.targets of {source.given} are {', '.join(theirs)}, this recipe's are "
            f"{', '.join(ours)}; set lora.targets: [{', '.join(theirs)}]"
        )


def _layer(name: str) -> str:
    return name.partition(".lora_A.")[0].rpartition(".")[2]


def _check_tensors(
    source: Source, given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    """Compare names and shapes; the first difference is named with both sides."""
    for name in sorted(given.keys() | wanted.keys()):
        theirs = tuple(given[name].shape) if name in given else "not there"
        ours = tuple(wanted[name].shape) if name in wanted else "not there"
        if theirs != ours:
            raise CheckpointError(
                f"{FIELD}: tensor '{name}' of {source.given} is {theirs}, this recipe's is {ours}; "
                "begin with weights of the same model and lora.targets"
            )
