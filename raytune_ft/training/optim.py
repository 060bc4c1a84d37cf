"""Optimizers by recipe name: named parameters in, one `torch.optim.Optimizer` out.

Its state leaves and enters by parameter name. Weight decay reaches every trained parameter, as
torch's default and the reference's do: an adapter has neither norms nor, as a rule, biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from raytune_ft.config.schema import TrainSection

Named = Mapping[str, torch.Tensor]
LR_SCALE = "lr_scale"
"""Key of a parameter group: its learning rate over the run's."""
B_MATRICES = ("lora_B", "lora_embedding_B")
NO_MATRICES = ("embed", "wte", "word_embeddings", "lm_head", "trainable_tokens")
"""Parts of names whose 2-D weights are tables of tokens: Muon is for layers between them."""
MUON_MOMENTUM = 0.95
"""Of Muon's own page; `train.betas` are AdamW's, which takes what is no matrix."""


def build_optimizer(
    trained: Named, train: TrainSection, b_lr_ratio: float | None = None
) -> torch.optim.Optimizer:
    """Build the recipe's optimizer; `set_lr` sets its learning rate at each step.

    Args:
        trained: parameters by name.
        train: `optimizer`, `lr`, `betas` and `weight_decay` count.
        b_lr_ratio: learning rate of LoRA's B matrices over that of all else (LoRA+,
            arXiv 2402.12354); None: the same.
    """
    groups = _groups(trained, b_lr_ratio)
    options: dict[str, Any]
    options = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    on_gpu = any(p.is_cuda for p in trained.values())
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=on_gpu or None)
    if train.optimizer == "muon":
        return MuonAdamW(trained, groups, **options)
    import bitsandbytes as bnb

    paged, plain = {
        "paged_adamw_32bit": (bnb.optim.PagedAdamW32bit, bnb.optim.AdamW32bit),
        "paged_adamw_8bit": (bnb.optim.PagedAdamW8bit, bnb.optim.AdamW8bit),
        "adamw_8bit": (bnb.optim.AdamW8bit, bnb.optim.AdamW8bit),
        "lion": (bnb.optim.PagedLion32bit, bnb.optim.Lion32bit),
    }[train.optimizer]
    # a CPU has nowhere to page to, and the library would say so at every start
    optimizer: torch.optim.Optimizer = (paged if on_gpu else plain)(groups, **options)
    return optimizer


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group, times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_SCALE, 1.0)


def state_of(optimizer: torch.optim.Optimizer, trained: Named) -> dict[str, torch.Tensor]:
    """Return copies on the host of all that an optimizer keeps, as `parameter/key`.

    Not on its device: a save would need its memory twice.
    """
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore(
    optimizer: torch.optim.Optimizer, trained: Named, state: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `state_of` returned; it may come from another device."""
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for path, value in state.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    begin = _beginner(optimizer)
    counts_there = bool(optimizer.defaults.get("fused"))  # torch's fused kernel reads its own step
    for name, parameter in trained.items():
        if name not in by_name:
            optimizer.state.pop(parameter, None)
            continue
        begin(parameter)
        own = optimizer.state[parameter]
        for key, value in by_name[name].items():
            here = own.get(key)
            if torch.is_tensor(here) and here.shape == value.shape and here.dtype == value.dtype:
                here.copy_(value)  # a paged tensor stays paged
            else:
                place = parameter.device if value.ndim or counts_there else value.device
                own[key] = as_kept(value.to(place, copy=True))


def as_kept(value: torch.Tensor) -> Any:
    """Give a counter the type that an optimizer expects: torch a float tensor, others an int."""
    if value.ndim or value.is_floating_point():
        return value.clone()
    return int(value)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of layers, AdamW for all else, as one optimizer with one state.

    Muon (kellerjordan.github.io/posts/muon) moves a matrix along the orthogonal factor of its
    averaged gradient. Its step is scaled as in arXiv 2502.16982, so that learning rates and weight
    decay are AdamW's.
    """

    def __init__(
        self,
        trained: Named,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        matrices = {id(p) for name, p in trained.items() if is_matrix(name, p)}
        parts = list(_split(groups, matrices))
        super().__init__(parts, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        inside = self.param_groups
        self.parts: list[torch.optim.Optimizer] = []
        if muon := [group for group in inside if group["matrices"]]:
            self.parts.append(
                torch.optim.Muon(
                    muon, lr, weight_decay, MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw"
                )
            )
        if adamw := [group for group in inside if not group["matrices"]]:
            self.parts.append(torch.optim.AdamW(adamw, lr, betas, weight_decay=weight_decay))
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with both; gradients are there already."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether Muon takes a parameter: a layer's matrix, no table of tokens."""
    return parameter.ndim == 2 and not any(part in name for part in NO_MATRICES)


def _split(groups: Iterable[dict[str, Any]], matrices: set[int]) -> Iterator[dict[str, Any]]:
    for group in groups:
        for wanted in (True, False):
            chosen = [p for p in group["params"] if (id(p) in matrices) is wanted]
            if chosen:
                yield {**group, "params": chosen, "matrices": wanted}


def _groups(trained: Named, b_lr_ratio: float | None) -> list[dict[str, Any]]:
    if b_lr_ratio is None:
        return [{"params": list(trained.values())}]
    parts: dict[float, list[torch.Tensor]] = {1.0: [], b_lr_ratio: []}
    for name, parameter in trained.items():
        is_b = any(f".{matrix}." in name for matrix in B_MATRICES)
        parts[b_lr_ratio if is_b else 1.0].append(parameter)
    return [{"params": group, LR_SCALE: scale} for scale, group in parts.items() if group]


def _beginner(optimizer: Any) -> Callable[[torch.Tensor], None]:
    """Return what gives a parameter the state that it begins with, for optimizers that page it."""
    if not hasattr(optimizer, "init_state"):
        return lambda parameter: optimizer.state.pop(parameter, None) and None
    places = {
        id(parameter): (group, parameter, i, j)
        for i, group in enumerate(optimizer.param_groups)
        for j, parameter in enumerate(group["params"])
    }

    def begin(parameter: torch.Tensor) -> None:
        optimizer.state[parameter] = {}
        optimizer.init_state(*places[id(parameter)])

    return begin
