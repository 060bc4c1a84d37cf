"""XTuner's spellings of `train`, and what to use instead of words that mean nothing here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_ft.errors import RecipeError

if TYPE_CHECKING:
    from raytune_ft.config.schema import Recipe

PRESET_PREFIX = "deepspeed_"
LAUNCHERS = ("pytorch", "slurm", "mpi")
CONFIG_KEYS = {
    "pretrained_model_name_or_path": "model.path",
    "data_path": "data.sources.0.path",
    "max_length": "data.max_length",
    "pack_to_max_length": "data.pack",
    "SYSTEM": "data.system",
    "batch_size": "train.micro_batch_size",
    "accumulative_counts": "train.accumulation",
    "max_epochs": "train.epochs",
    "lr": "train.lr",
    "weight_decay": "train.weight_decay",
    "max_norm": "train.max_norm",
    "evaluation_freq": "chat_eval.every",
    "save_total_limit": "checkpoint.keep",
    "model.llm.pretrained_model_name_or_path": "model.path",
    "model.lora.r": "lora.r",
    "model.lora.lora_alpha": "lora.alpha",
    "model.lora.lora_dropout": "lora.dropout",
    "train_dataset.max_length": "data.max_length",
    "train_dataset.pack_to_max_length": "data.pack",
    "train_dataset.dataset.path": "data.sources.0.path",
    "train_dataloader.batch_size": "train.micro_batch_size",
    "optim_wrapper.accumulative_counts": "train.accumulation",
    "optim_wrapper.optimizer.lr": "train.lr",
    "optim_wrapper.optimizer.weight_decay": "train.weight_decay",
    "optim_wrapper.clip_grad.max_norm": "train.max_norm",
    "param_scheduler.eta_min": "train.min_lr",
    "train_cfg.max_epochs": "train.epochs",
    "default_hooks.logger.interval": "train.log_every",
    "default_hooks.checkpoint.max_keep_ckpts": "checkpoint.keep",
    "randomness.seed": "train.seed",
}
"""Keys of an XTuner configuration, as `--cfg-options` sets them, and our fields."""

NO_OPTION = {
    "--no-streamer": "answers are always streamed; --ask prints one and leaves",
    "--lagent": "tool use is not a part of chat; see docs/from-xtuner.md",
    "--with-plugins": "plugins that run what a model writes are not a part of chat",
    "--command-stop-word": "stop words come with the template",
    "--answer-stop-word": "stop words come with the template",
    "--offload-folder": "not needed: layers are merged one after the other; --bits 4 for chat",
    "--repetition-penalty": "use --temperature, --top-p and --top-k",
    "--torch-dtype": "set model.dtype in the recipe; --bits for chat",
    "--checkpoint": "validation rows are measured during training: data.validation",
}
"""Options of XTuner that no verb has, and what to do instead."""
NO_VERB = {
    "test": "rows are measured during training: data.validation; benchmarks: raytune-ft eval RUN",
    "mmbench": "images are not read",
    "dist_train": "raytune-ft train, with run.workers=N",
}


def train_words(
    *,
    deepspeed: str | None,
    work_dir: str | None,
    seed: int | None,
    launcher: str,
    local_rank: int,
) -> list[str]:
    """Return `key=value` words that mean what XTuner's options of `train` mean."""
    if launcher in LAUNCHERS:
        raise RecipeError(
            f"--launcher {launcher}: Ray starts the workers; leave it out and set run.workers=N"
        )
    if launcher != "none":
        raise RecipeError(f"--launcher: expected none, got '{launcher}'")
    if local_rank:
        raise RecipeError("--local_rank: Ray numbers the workers; leave it out")
    words = []
    if deepspeed is not None:
        words.append(f"train.deepspeed={deepspeed.removeprefix(PRESET_PREFIX)}")
    if work_dir is not None and "://" in work_dir:
        from raytune_ft.storing.places import split_run

        storage, name = split_run(work_dir)
        words += [f"run.storage={storage}", f"run.name={name}"]
    elif work_dir is not None:
        place = Path(work_dir).expanduser()
        if not place.name:
            raise RecipeError(f"--work-dir: '{work_dir}' names no folder; give one such as runs/a")
        words += [f"run.storage={place.parent}", f"run.name={place.name}"]
    if seed is not None:
        words.append(f"train.seed={seed}")
    return words


def config_words(words: list[str]) -> list[str]:
    """Turn the words of `--cfg-options` into ours: `optim_wrapper.optimizer.lr=1e-4`."""
    return [_config_word(word) for word in words]


def _config_word(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals:
        raise RecipeError(f"--cfg-options: '{word}': expected key=value")
    return f"{CONFIG_KEYS.get(key, key)}={value}"


def run_of(resume: str) -> str:
    """Return the run folder of what `--resume` names: the run, or a checkpoint inside it."""
    path = Path(resume).expanduser()
    inside = re.fullmatch(r"step_\d+", path.name) and path.parent.name == "checkpoints"
    return str(path.parent.parent) if inside else resume


def check_same(name: str, asked: Recipe, trained: Recipe, run: str) -> None:
    """Refuse to go on with a run under another recipe; names the first field that differs."""
    for section in ("model", "lora", "data", "train"):
        ours, theirs = getattr(asked, section), getattr(trained, section)
        for field in type(ours).model_fields:
            if getattr(ours, field) != getattr(theirs, field):
                raise RecipeError(
                    f"--resume {run}: {section}.{field} is another one in {name}; a run goes on "
                    "with its own recipe: leave NAME and key=value out"
                )


def instead_of(arguments: list[str], message: str) -> str | None:
    """Return what to use instead of a word of XTuner that a usage error is about."""
    if arguments and arguments[0] in NO_VERB and "command" in message.lower():
        return f"{arguments[0]}: {NO_VERB[arguments[0]]}"
    option = re.search(r"option:? '?(--[\w-]+)", message)
    if option is not None and option[1] in NO_OPTION:
        return f"{option[1]}: {NO_OPTION[option[1]]}"
    return None
