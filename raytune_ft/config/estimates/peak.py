"""Peak memory: a recipe and a model's counts in, bytes of one worker by part out. No torch.

Three moments compete for the peak of a step, each with all weights, optimizer state and the
gradients of earlier micro-batches: the end of the forward pass, where a chunk of logits exists;
the backward pass of the last layers, where one is unpacked or made again; its end, where gradients
are exchanged. What a layer keeps was read off torch's allocator, tensor by tensor, and is checked
against measured runs by `python -m benchmarks.memory_plan` (docs/planning.md).

Units: bytes; widths are per token. T = tokens of a micro-batch, L = of a pack.
"""

from __future__ import annotations

from raytune_ft.config.estimates.footprint import LOGIT_ROWS, Counts, bucket_elements
from raytune_ft.config.estimates.setting import (
    HEAD,
    INPUTS,
    PART_ROWS,
    PART_WORDS,
    PARTS_AHEAD,
    STATE_AHEAD,
    STATE_PART,
    TILE,
    Setting,
)
from raytune_ft.config.schema import Recipe

NF4_CODES = 0.5
NF4_SCALES_DOUBLE = 1 / 64 + 4 / (64 * 256)
"""One byte per 64 weights, and a float32 per 256 of these."""
NF4_SCALES = 4 / 64

LOGIT_BYTES = 12
"""Per logit of a chunk: log-softmax, its gradient and the one before it, in float32."""
FUSED_ROWS = 2 * LOGIT_ROWS
"""Tokens whose logits exist at once in the fast path, where gradients take their place."""
CUBLAS = 66 * 2**20
"""Workspaces of the forward's and the backward's thread."""
GPU_CONTEXT = 840 * 2**20
"""What a CUDA process holds outside torch's allocator, its kernels loaded."""
NCCL_CONTEXT = 540 * 2**20
"""NCCL's buffers on top, with DeepSpeed even for one worker."""
PROCESS = 600 * 2**20
"""A process on a CPU that has imported all libraries."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements that ZeRO-3 gathers at most (`stage3_max_live_parameters`)."""

MOMENTS = {"adamw": 8.0, "paged_adamw_32bit": 8.0, "paged_adamw_8bit": 2.04, "adamw_8bit": 2.04,
           "lion": 4.0, "muon": 4.0}  # fmt: skip
"""Bytes that an optimizer keeps per trained weight."""
PAGED = ("paged_adamw_32bit", "paged_adamw_8bit", "lion")
"""Optimizers whose averages move to the host when the GPU is full."""


def memory_bytes(
    recipe: Recipe,
    counts: Counts,
    *,
    on_gpu: bool,
    resident: bool = False,
    hosted: tuple[str, ...] = (),
) -> dict[str, int]:
    """Return the peak memory of one worker by part, in bytes; parts of 0 are left out.

    On a GPU all is the device's memory but for `GPU context` as torch's allocator counts it; what
    the host holds besides is `host_bytes`.

    Args:
        recipe: the run.
        counts: of its model.
        on_gpu: whether the worker has a GPU.
        resident: as in `Setting`.
        hosted: as in `Setting`.
    """
    setting = Setting(recipe, counts, on_gpu, resident, hosted)
    always = {**_weights(setting), **_training_state(setting)}
    passing = max(
        (_forward_end(setting), _in_backward(setting), _backward_end(setting)),
        key=lambda moment: sum(moment.values()),
    )
    context = GPU_CONTEXT + (NCCL_CONTEXT if setting.zero.stage else 0)
    parts = {**always, **passing}
    parts |= {"GPU context": context} if on_gpu else {"process": PROCESS}
    return {name: int(size) for name, size in parts.items() if size}


def host_bytes(recipe: Recipe, counts: Counts, hosted: tuple[str, ...] = ()) -> dict[str, int]:
    """Return by part what one worker with a GPU keeps in the host's memory, or may move there."""
    setting = Setting(recipe, counts, on_gpu=True, hosted=hosted)
    zero, n = setting.zero, counts.trained / setting.ranks
    moments = MOMENTS[recipe.train.optimizer] * n
    parts = {}
    if zero.optimizer_on_host:
        # float32 weights and their gradients, and a copy in the model's type to send back
        parts["optimizer on the host"] = moments + (8 + setting.width) * n
    elif recipe.train.optimizer in PAGED:
        parts["optimizer, paged"] = moments
    if zero.weights_on_host:
        parts["weights on the host"] = counts.total * setting.width / setting.ranks
    parts["embedding and head"] = setting.hosted_tables * setting.width
    if INPUTS in hosted:
        parts["layer inputs"] = setting.inputs * max(0, setting.recomputed - 1)
    return {name: int(size) for name, size in parts.items() if size}


def kept_per_token(setting: Setting) -> float:
    """Return the bytes per token that one decoder layer keeps for its backward pass."""
    counts, width = setting.counts, setting.width
    if setting.is_fast:
        # what norms read; queries, keys, values and result; gate and up
        own = counts.norms + counts.attention + counts.queries
        own += 0 if setting.tiles else 2 * counts.mlp
        return width * own + _kept_of_inputs(setting)
    norms = (4 + (width if setting.is_full else 0)) * counts.norms  # a float32 copy of the input
    attention = 4 * width * counts.queries  # queries, keys, values, as many heads each, and result
    mlp = 3 * width * counts.mlp  # gate, its activation, up
    return norms + attention + mlp + _kept_of_inputs(setting)


def _kept_of_inputs(setting: Setting) -> float:
    """Return what linear layers and their adapters keep of what they read."""
    recipe, counts, width = setting.recipe, setting.counts, setting.width
    if setting.has_fast_linears:  # of all layers, adapted or not; masks are made again
        product = 0 if setting.tiles else counts.mlp
        return width * (2 * counts.hidden + product + recipe.lora.r * counts.adapted)
    quantised = width * counts.own_inputs if recipe.model.quantization == "int8" else 0
    if setting.is_full:
        return width * counts.own_inputs
    own = setting.adapter_width
    middle = own * recipe.lora.r * counts.adapted
    if recipe.lora.dropout > 0:
        mask = 1 if setting.on_gpu else own
        return quantised + middle + (own + mask) * counts.adapter_inputs
    if own == width:
        return middle + width * counts.own_inputs
    return quantised + middle + own * counts.adapter_inputs


def _mask_per_token(setting: Setting) -> float:
    """Return the attention mask's bytes per query: of booleans, or a number for each head."""
    if _needs_no_mask(setting):
        return 0
    return setting.recipe.data.max_length * (setting.counts.mask_heads * setting.width or 1)


def _mask_of_layer(setting: Setting) -> float:
    """Return what attention makes of a mask of booleans, in every layer anew."""
    if setting.counts.mask_heads or _needs_no_mask(setting):
        return 0
    return setting.width * setting.recipe.data.max_length


def _needs_no_mask(setting: Setting) -> bool:
    """Tell whether attention goes by the bounds of segments."""
    return setting.is_fast and not setting.counts.mask_heads


def _weights(setting: Setting) -> dict[str, float]:
    model, counts, width = setting.recipe.model, setting.counts, setting.width
    shards = setting.ranks if setting.zero.stage == 3 else 1
    stored, scales = float(width), 0.0
    if model.quantization == "int8":
        stored = 1.0
    elif model.quantization == "nf4":
        stored, scales = NF4_CODES, NF4_SCALES_DOUBLE if model.double_quant else NF4_SCALES
    base = (counts.linear * stored + counts.other * width) / shards
    outside = (counts.embedding + counts.head - setting.hosted_tables) * width / shards
    if setting.zero.weights_on_host and setting.on_gpu:
        base = outside = 0
    gathered = 0.0
    if setting.zero.stage == 3 and (shards > 1 or base == 0):
        gathered = min(LIVE_PARAMETERS, counts.total) * width
    return {
        "base weights": base,
        # in float8 they lie there in two orders
        "weights unpacked": counts.linear * (2 if setting.in_float8 else width)
        if setting.resident
        else 0,
        "quantisation state": counts.linear * scales,
        "embedding and head": outside,
        "gathered weights": gathered,
    }


def _training_state(setting: Setting) -> dict[str, float]:
    """Adapter, gradients and optimizer; gradients of 16-bit weights are summed in float32."""
    recipe, zero, n = setting.recipe, setting.zero, setting.counts.trained
    spread = setting.ranks if zero.stage >= 2 else 1
    # stage 1's go into float32 sums one at a time; all weights' were measured where they did not
    gradient = 6 if zero.stage == 1 and setting.width == 2 and setting.is_full else 4
    has_master = zero.stage > 0 or (setting.is_full and setting.width == 2)
    on_host = zero.optimizer_on_host and setting.on_gpu
    paged = setting.on_gpu and recipe.train.optimizer in PAGED
    moments = 0.0 if paged else MOMENTS[recipe.train.optimizer]
    shards = setting.ranks if zero.stage == 3 else 1
    own = 0.0 if setting.is_full else n * setting.adapter_width
    optimizer = 0 if on_host else n * (moments + (4 if has_master else 0)) / setting.ranks
    if setting.streams_state:  # beside what passes take: graphs keep their memory
        parts = 2 * STATE_AHEAD + 1
        optimizer += MOMENTS[recipe.train.optimizer] * min(n, parts * STATE_PART)
    return {
        "adapter": own / shards,
        "start of DPO": own if recipe.train.objective == "dpo" else 0,
        "gradients": gradient * n / spread,
        "optimizer": optimizer,
    }


def _forward_end(setting: Setting) -> dict[str, float]:
    """Return a chunk's logits beside all that the layers keep, and the last norm."""
    counts, width, tokens = setting.counts, setting.width, setting.tokens
    last = 4 * counts.hidden + 3 * width * counts.hidden  # result, labelled rows, their gradient
    logits: float = min(tokens, LOGIT_ROWS) * counts.vocabulary * LOGIT_BYTES
    if setting.is_fast and not setting.is_full:
        logits = min(tokens, FUSED_ROWS) * counts.vocabulary * width
    if HEAD in setting.hosted:
        logits = _head_in_parts(setting)
    if setting.is_full:  # the gradient of the head, of a chunk and of those before
        logits += 2 * counts.vocabulary * counts.hidden * width
    kept = kept_of_layers(setting)
    if INPUTS in setting.hosted and setting.recomputed:  # transformers holds the first
        kept += setting.inputs
    return {
        "activations": kept + tokens * last,
        "logits": logits,
        "workspace": tokens * _mask_per_token(setting) + _libraries(setting) + _shared(setting),
    }


def _head_in_parts(setting: Setting) -> float:
    """Return parts of a head that are here, the logits of one, and sums in float32."""
    counts, width, tokens = setting.counts, setting.width, setting.tokens
    words, rows = min(PART_WORDS, counts.vocabulary), min(PART_ROWS, tokens)
    parts = min(PARTS_AHEAD * words, counts.vocabulary) * counts.hidden * width
    sums = (tokens + rows) * counts.hidden * (4 + width)
    return parts + rows * words * (4 + 2 * width) + sums


def _in_backward(setting: Setting) -> dict[str, float]:
    """Return what one of the last layers takes when its down projection runs, and those before."""
    counts, width, tokens = setting.counts, setting.width, setting.tokens
    one = tokens * (kept_per_token(setting) + _mask_of_layer(setting))
    dropped = tokens * counts.mlp * (setting.adapter_width + 1) * (setting.recipe.lora.dropout > 0)
    passing = tokens * width * (counts.mlp + 5 * counts.hidden)
    unpacked = _unpacked(setting)
    if setting.tiles:  # all that a tile's MLP keeps, and its gradients
        passing = tokens * width * 5 * counts.hidden + TILE * width * 5 * counts.mlp
    elif setting.is_fast:  # the gradients of gate and up beside what their product read
        passing += tokens * width * counts.mlp
    if setting.has_fast_linears:
        dropped, unpacked = 0, _shared(setting)
    kept = kept_of_layers(setting)
    if setting.recomputed == counts.layers:  # else what layers keep is gone before one runs again
        kept += one
    if INPUTS in setting.hosted and setting.recomputed:  # the one in front, on its way back
        kept += setting.inputs
    return {
        # unpacked before the dropped-out input exists; or that, and nothing unpacked any more
        "activations": kept + passing - (dropped if unpacked > dropped else 0),
        "workspace": tokens * _mask_per_token(setting) + _libraries(setting) + _buckets(setting)
        + (unpacked if unpacked > dropped else 0),
    }  # fmt: skip


def _backward_end(setting: Setting) -> dict[str, float]:
    """Return what the last gradients take on their way; the embedding's comes last."""
    counts = setting.counts
    embedding = 2 * counts.vocabulary * counts.hidden * setting.width if setting.is_full else 0
    lasting = _libraries(setting) + _shared(setting)
    return {"workspace": embedding + lasting + _buckets(setting)}


def kept_of_layers(setting: Setting) -> float:
    """Return what all decoder layers keep of a micro-batch from its forward pass.

    A layer that recomputes keeps its input, and what bitsandbytes will not drop.
    """
    counts, width, again = setting.counts, setting.width, setting.recomputed
    held = 0
    if setting.recipe.model.quantization == "int8":  # its layers hold on to their inputs
        distinct = 2 * counts.hidden + counts.queries + counts.mlp
        held = width * distinct
    own = kept_per_token(setting) + _mask_of_layer(setting)
    stay = min(again, 1 if INPUTS in setting.hosted else again)
    inputs = stay * width * counts.hidden + again * held
    return setting.tokens * (inputs + (counts.layers - again) * own)


def _unpacked(setting: Setting) -> float:
    """Return the bytes of a quantised weight while it is multiplied, with its scales."""
    largest = setting.counts.largest_linear
    if not setting.unpacks:
        return 0
    scales = 2 * 4 / 64 if setting.recipe.model.quantization == "nf4" else 0
    return largest * (setting.width + scales)


def _shared(setting: Setting) -> float:
    """Return the buffer into which the fast path unpacks weights, and what float8 takes besides."""
    largest, quantised = setting.counts.largest_linear, setting.recipe.model.quantization != "none"
    if setting.in_float8:  # an input, a weight, and held-out losses' buffer, which stays
        weight = 0 if setting.resident else largest
        return setting.tokens * setting.counts.mlp + weight + quantised * largest * setting.width
    return largest * setting.width if setting.has_fast_linears and setting.unpacks else 0


def _buckets(setting: Setting) -> float:
    """Return ZeRO's two buffers of gradients on their way, and the one in float32."""
    zero = setting.zero
    if not zero.stage or (zero.stage == 1 and setting.width == 2):
        return 0
    elements = zero.bucket or bucket_elements(setting.counts.trained)
    buffers = 2 if setting.on_gpu else 1
    filled = min(elements, setting.counts.trained)
    return elements * buffers * setting.width + filled * 4


def _libraries(setting: Setting) -> int:
    return CUBLAS if setting.on_gpu else 0
