"""Hosting: a loaded model and what of it is to lie on the host in, the same model so out.

Embedding and head are moved between the device and the host's pinned memory, whenever a layout
says so. Numbers stay: rows and parts are copies of the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raytune_ft.config.estimates.setting import EMBEDDING, HEAD
from raytune_ft.kernels.host_rows import reads_host
from raytune_ft.model import host_embedding, host_head
from raytune_ft.model.host_embedding import DIRECTLY, HostEmbedding
from raytune_ft.model.host_head import HostHead
from raytune_ft.model.host_table import HostTable, on_host, put, take_back
from raytune_ft.model.loss import causal_model, has_plain_head


def place(model: nn.Module, hosted: tuple[str, ...], device: torch.device) -> list[str]:
    """Let embedding and head lie where `hosted` says, by the names of `setting.LADDER`.

    Args:
        model: with its adapter, fast forms installed or not.
        hosted: what is to lie on the host; other names are not looked at.
        device: on which the model computes; on a CPU nothing moves, all else is the same.

    Returns:
        A line for what stays on the device though it was to leave, and for a slower way.
    """
    network = causal_model(model)
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    wanted = {
        EMBEDDING: EMBEDDING in hosted and (not tied or HEAD in hosted),
        HEAD: HEAD in hosted and head is not None,
    }
    reasons = {
        EMBEDDING: _embedding_refusal(embedding) if wanted[EMBEDDING] else None,
        HEAD: _head_refusal(network, head) if wanted[HEAD] else None,
    }
    if tied and any(reasons.values()):  # one weight, one place
        reasons = dict.fromkeys(reasons, next(filter(None, reasons.values())))
    lines = [f"{name} stays on the device: {why}" for name, why in reasons.items() if why]
    now = {name: wanted[name] and not reasons[name] for name in wanted}
    _move(embedding, HostEmbedding if now[EMBEDDING] else None, device, None)
    shared = embedding if tied and now[EMBEDDING] else None
    if head is not None:
        _move(head, HostHead if now[HEAD] else None, device, shared)
    if tied and not now[EMBEDDING] and head.weight is not embedding.weight:
        head.weight = embedding.weight
    if now[EMBEDDING] and device.type == "cuda":
        why = reads_host(embedding.weight, device)
        setattr(embedding, DIRECTLY, why is None)
        lines += [f"embedding on the host: rows by way of the host, {why}"] if why else []
    return lines


def is_hosted(model: nn.Module) -> bool:
    """Tell whether a table of a model lies on the host."""
    network = causal_model(model)
    tables = (network.get_input_embeddings(), network.get_output_embeddings())
    return any(isinstance(table, HostTable) for table in tables)


def _move(module: Any, form: type | None, device: torch.device, shared: Any) -> None:
    """Bring a module's weight to the host, in a form, or back to the device, in its own class."""
    weight: Any = module.weight
    if form is None and isinstance(module, HostTable):
        take_back(module, nn.Parameter(weight.to(device, copy=True), requires_grad=False))
    if form is None or isinstance(module, form):
        return
    setattr(module, DIRECTLY, device.type == "cuda")
    pin = device.type == "cuda"
    table = on_host(weight, pin=pin) if shared is None else shared.weight
    put(module, table, form)


def _embedding_refusal(embedding: Any) -> str | None:
    return None if isinstance(embedding, HostTable) else host_embedding.refusal(embedding)


def _head_refusal(network: Any, head: Any) -> str | None:
    if isinstance(head, HostTable):
        return None
    if not has_plain_head(network.config.get_text_config()):
        return "logits are capped or scaled behind it"
    return host_head.refusal(head)
