"""XTuner's `convert` verbs: a run or checkpoint to an adapter, an adapter to a merged model.

`raytune-ft export` and `merge` are ours; these take XTuner's positional words and plain folders.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytune_ft import export
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.exporting import beside
from raytune_ft.model import adapter, beginnings, loading, merge
from raytune_ft.model.tensors import load_tensors
from raytune_ft.storing import fetching
from raytune_ft.training.run_folder import STEP_PREFIX, RunFolder
from raytune_ft.training.saving import checkpoint, load_from

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
CHAT_FILES = ("README.md", "generation_config.json")


def to_adapter(config: str, trained: str, out: str) -> Path:
    """Write the adapter of a run, or of one of its checkpoints, as plain peft loads it.

    Args:
        config: the recipe that was trained; another one's is a mistake that is told.
        trained: a run folder, or `checkpoints/step_NNNNNN` inside one.
        out: target, missing or empty.

    Raises:
        RecipeError: `config` trains another model or adapter, or `out` is not empty.
        CheckpointError: there is no run, or no such checkpoint, or it is damaged or pickled.
    """
    path = Path(trained).expanduser().resolve()
    _check_not_pickled(path, trained)
    is_step = path.name.startswith(STEP_PREFIX) and path.parent.name == "checkpoints"
    run = fetching.run_folder(str(path.parent.parent) if is_step else trained, with_model=True)
    _check_same(config, run)
    if not is_step:
        return export.export(str(run.path), out)
    return export.export(str(run.path), out, weights=_tensors_of(path, run))


def _check_not_pickled(path: Path, shown: str) -> None:
    """Refuse what XTuner and DeepSpeed leave: reading a pickle runs what its author put there."""
    pickled = [path] if path.is_file() else []
    if path.is_dir() and not (path / "manifest.json").is_file():
        pickled = [file for file in sorted(path.iterdir()) if file.suffix in PICKLED]
    if pickled and pickled[0].suffix in PICKLED:
        raise CheckpointError(
            f"{shown}: a pickled checkpoint, which is never read; convert it to PEFT's "
            "safetensors with the tool that wrote it, then: raytune-ft convert merge"
        )


def _check_same(config: str, run: RunFolder) -> None:
    """Compare what the recipe would train with what the run has trained."""
    asked, trained = load_recipe(config), load_recipe(str(run.recipe))
    for name in ("path", "method", "quantization"):
        ours, theirs = getattr(asked.model, name), getattr(trained.model, name)
        if ours != theirs:
            raise RecipeError(
                f"{config}: model.{name} is {ours}, the run was trained with {theirs}; "
                f"name {run.recipe}"
            )
    if asked.lora != trained.lora:
        raise RecipeError(f"{config}: another lora section than the run's; name {run.recipe}")


def _tensors_of(step: Path, run: RunFolder) -> dict[str, Any]:
    """Return a checkpoint's tensors under the names of the run's adapter."""
    final = export.result_folder(run) / adapter.WEIGHTS_FILE
    if not final.is_file():
        raise RecipeError(f"{step}: of a full-parameter run; its model is {run.model}")
    names = load_tensors(final)
    loaded = checkpoint.load(step).weights
    renamed = {_saved_name(key): value for key, value in loaded.items()}
    if beginnings.moves_base(load_recipe(str(run.recipe)).lora.init_lora_weights):
        first = adapter.read_adapter_weights(run.path / load_from.BEGINNING)
        renamed = beginnings.on_base(renamed, beginnings.pairs_in(first))
    if renamed.keys() != names.keys():
        raise CheckpointError(
            f"{step}: its tensors have the network's own names; name the run {run.path}, whose "
            "adapter is written"
        )
    return {key: value.to(names[key].dtype) for key, value in renamed.items()}


def _saved_name(name: str) -> str:
    """Return the name that PEFT's files have for a trained tensor of the network."""
    plain = name.removeprefix("model.").replace(".default", "").replace(".modules_to_save", "")
    return plain.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def to_model(
    model: str,
    adapter_folder: str,
    out: str,
    size: str,
    base: str | None,
    tell: Callable[[str], None] = lambda _line: None,
) -> Path:
    """Merge an adapter folder into the model that it was trained on.

    Args:
        model: folder or hub name of the base model.
        adapter_folder: PEFT folder, or a run that holds one.
        out: target, missing or empty.
        size: of the largest weight file, such as 2GB.
        base: `original` or `dequantized` weights; default: as the adapter saw them, where a
            `raytune_ft.json` beside it says so, else original.
        tell: gets lines for people.
    """
    folder = Path(adapter_folder).expanduser()
    folder = folder / "adapter" if (folder / "run.json").is_file() else folder
    if not (folder / adapter.CONFIG_FILE).is_file():
        raise CheckpointError(f"{adapter_folder}: no {adapter.CONFIG_FILE}; name an adapter folder")
    marker = export.read_marker(folder) or {}
    quantization = marker.get("quantization", "none")
    if base is None and quantization == "nf4":
        tell(export.DEQUANTIZED)
    chosen = base or ("dequantized" if quantization == "nf4" else "original")
    section = ModelSection(
        path=model, quantization=quantization, double_quant=bool(marker.get("double_quant", True))
    )
    target = Path(out).expanduser()

    def finish(place: Path, report: merge.MergeReport) -> None:
        # the adapter's folder has what a tokenizer and a prompt were in training
        for name in CHAT_FILES:
            if marker and (folder / name).is_file() and not (place / name).is_file():
                shutil.copyfile(folder / name, place / name)
        if marker:
            beside.write_template(folder, place)
            beside.write_marker(place, {**marker, "merged_into": chosen})
        for line in report.drift.table():
            tell(line)

    merge.merge_to(
        loading.prepare_folder(model), folder, target, size, chosen, section, finish=finish
    )
    return target
