"""From a recipe and a model folder to an engine: weights, adapter, loss, ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from raytune_ft.config.estimates.setting import INPUTS, STREAMED, recomputed_layers
from raytune_ft.config.schema import Recipe
from raytune_ft.config.zero import stage_of
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.model import adapter, beginnings, fast, hosting, loading, new_tokens, noise
from raytune_ft.model.fastpath import eighths
from raytune_ft.model.preference import build_loss
from raytune_ft.training import presets
from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine import Engine, TorchEngine, ZeroEngine, rank
from raytune_ft.training.laid_out import decoder_layers, recompute
from raytune_ft.training.saving import durable, load_from
from raytune_ft.training.saving.load_from import BEGINNING, Begin

Samples = Callable[[], Iterable[TensorBatch]]


def build_engine(
    recipe: Recipe,
    model_folder: Path,
    device: torch.device,
    samples: Samples | None = None,
    run: Path | None = None,
    begin: Begin | None = None,
    *,
    resident: bool = False,
    hosted: tuple[str, ...] = (),
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[Engine, torch.nn.Module]:
    """Load the model, attach the adapter and wrap both into the recipe's engine.

    Args:
        recipe: every section but `run` and `tune` may count.
        model_folder: checked by `prepare_folder`.
        device: of this rank.
        samples: gives the first micro-batches, the same on every rank; `eva` looks at them.
        run: folder in which an adapter's beginning is kept, and looked for.
        begin: trained weights, as `load_from.prepare` found them.
        resident: whether the fast path keeps NF4 weights unpacked beside the packed ones.

    Raises:
        ModelError: `model.compute: fp8` where the device or every layer refuses it.
    """
    eighths.check(recipe.model.compute, device)
    head_trained = recipe.model.method == "full" or adapter.trains_head(recipe.lora)
    folder = Path(begin.path) if begin and begin.kind == "model" else model_folder
    model: Any = loading.load_model(
        folder, recipe.model, device, head_trained=head_trained, hosted=hosted
    )
    pieces = _new_tokens(recipe, model_folder)
    if begin and begin.kind == "model":  # it may have been trained with these tokens
        known = len(model.get_input_embeddings().weight)
        pieces = {id_: former for id_, former in pieces.items() if id_ >= known}
    new_tokens.make_room(model, pieces)
    for line in hosting.place(model, hosted, device):
        tell(line)
    if recipe.model.method == "lora":
        source = adapter.Source(model_folder, samples)
        model = _adapted(model, recipe, source, run, pieces, begin)
    else:
        model.requires_grad_(True)
        if begin and begin.kind == "checkpoint":
            load_from.put(model, Path(begin.path))
    layers = len(decoder_layers(model))
    again = recomputed_layers(recipe, layers, on_gpu=device.type == "cuda")
    recompute(model, again, away=INPUTS in hosted)
    dtype = loading.compute_dtype(recipe.model, device)
    config = presets.resolve(recipe, dtype, on_gpu=device.type == "cuda")
    sharded = config is not None and stage_of(config) == 3
    report = fast.install(
        model, device, recipe.model.fast_path, sharded=sharded, resident=resident,
        compute=recipe.model.compute,
    )  # fmt: skip
    module, ratio = build_loss(model, recipe.train, report), recipe.lora.loraplus_lr_ratio
    if recipe.train.neftune_noise_alpha is not None:
        noise.install(module, model, recipe.train.neftune_noise_alpha)
    if config is None:
        engine = TorchEngine(module, device, recipe.train, dtype, b_lr_ratio=ratio)
        if hosted and recipe.train.optimizer in STREAMED:
            from raytune_ft.training import host_state  # bitsandbytes takes seconds to import

            host_state.keep_on_host(engine.optimizer)
        return engine, model
    return ZeroEngine(module, device, recipe.train, config, b_lr_ratio=ratio), model


def _new_tokens(recipe: Recipe, model_folder: Path) -> new_tokens.Pieces:
    if not recipe.model.new_tokens:
        return {}
    section = recipe.model
    if section.method == "full":
        new_tokens.check_place(model_folder)
    read = TextTokenizer.from_folder(model_folder, section.eos_token, section.new_tokens)
    return read.new_tokens


def _adapted(
    model: Any,
    recipe: Recipe,
    source: adapter.Source,
    run: Path | None,
    ids: Collection[int],
    begin: Begin | None,
) -> Any:
    lora, seed = recipe.lora, recipe.train.seed
    kept = run / BEGINNING if run and beginnings.is_kept(lora.init_lora_weights) else None
    if begin is not None:
        kept = Path(begin.path)
    wrapped = adapter.attach(model, lora, seed, source=source, kept=kept, new_ids=ids)
    if kept is not None and rank() == 0 and not kept.exists():
        with durable.whole_folder(kept) as place:
            adapter.keep_beginning(wrapped, place)
    return wrapped
