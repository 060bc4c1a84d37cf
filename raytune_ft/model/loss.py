"""Token loss: one batch of packs in, the loss of its labelled tokens out, summed or one by one.

Packed is not mixed: a token sees earlier tokens of its own segment only, and a segment's first
token is never predicted. The head runs at labelled positions only, in chunks, so the logits of
a whole batch never exist.

Shapes: B = packs, L = padded length, T = labelled tokens, H = hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytune_ft.config.estimates.footprint import LOGIT_ROWS
from raytune_ft.errors import ModelError
from raytune_ft.kernels.cross_entropy import capped, losses_and_gradient, write_hidden_gradient
from raytune_ft.kernels.dropout import draw_seed
from raytune_ft.model.fastpath.lane import LANE, Packed
from raytune_ft.model.host_head import HostHead

if TYPE_CHECKING:
    from raytune_ft.model.fast import Report

IGNORE_INDEX = -100
CHUNK_ROWS = LOGIT_ROWS
"""Rows of logits at a time: 512 x 100k words in float32 are 0.2 GB."""
FUSED_ROWS = 2 * LOGIT_ROWS
"""The same where losses and gradient are made in the logits' own half-precision memory."""

# Configuration values by which families change their logits after the head.
CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")

CAPPED_HEADS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
"""Networks whose logits are the head's output, capped by the first of these values alone."""

KINDS = ("full_attention", "sliding_attention")
"""What transformers calls layers that attend to all of a segment, or to its last tokens."""

Mask = torch.Tensor | dict[str, torch.Tensor] | None


class TokenLoss(nn.Module):
    """Wrap a causal language model, with or without a PEFT adapter, into its training loss."""

    def __init__(self, model: nn.Module, fast: Report | None = None) -> None:
        """Wrap `model`; `fast` is what `fast.install` said of it, None if it was not asked."""
        super().__init__()
        self.model = model
        self.fast = fast
        config = causal_model(model).config.get_text_config()
        self._plain_head = has_plain_head(config)
        self._cap = head_cap(causal_model(model))
        self._attention = Attention(config)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the loss over labelled tokens.

        Args:
            input_ids: (B, L).
            labels: (B, L), unshifted; -100 where the loss does not count.
            position_ids: (B, L), from 0 in each segment.
            segment_ids: (B, L); -1 is padding.
            cu_seqlens: (S + 1,), bounds of all segments, padding included, in the B * L tokens
                end to end. They and `max_seqlen` spare a look at `segment_ids` on the device.
            max_seqlen: scalar on the host, the longest segment's tokens.
            places: (T,), tokens whose next one is predicted, in the B * L tokens end to end. They
                spare a look at `labels`, for which the host would wait for the device.

        Returns:
            (loss sum, float32 scalar; number of predicted labels, int64 scalar). Without any
            label the sum is 0 and gives zero gradients.
        """
        losses, keep = self.token_losses(
            input_ids, labels, position_ids, segment_ids, cu_seqlens, max_seqlen, places
        )
        return losses.sum(), keep.sum()

    def token_losses(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses (T,) of predicted labels, and where they are, (B, L - 1).

        Losses stand in the order of their tokens; arguments as for `forward`.
        """
        keep = predicted(labels, segment_ids)
        at = nn.functional.pad(keep, (0, 1))
        if places is None:
            # numbers of places instead of a mask: each use of a mask would wait for the device
            places = at.flatten().nonzero().squeeze(1)
        targets = labels.flatten()[places + 1].long()
        inputs = {
            "input_ids": input_ids.long(),
            "position_ids": position_ids.long(),
            "use_cache": False,
            **self._bounds(segment_ids, cu_seqlens, max_seqlen),
        }
        model = causal_model(self.model)
        with LANE.entered():
            if self.has_own_head:
                return self._own_head_losses(inputs, places, targets), keep
            return cross_entropies(model(**inputs, logits_to_keep=at).logits, targets), keep

    def losses_at(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        places: torch.Tensor,
        targets: torch.Tensor,
        packed: Packed,
    ) -> torch.Tensor:
        """Return the losses (T,) of `targets` behind `places`, both (T,) int64.

        What is asked for is all that is known: no shape here depends on a value. For models that
        have their own head, and whose attention goes by bounds alone (`fast.packed`).
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        with LANE.entered():
            return self._own_head_losses({**inputs, **self._packed(packed)}, places, targets)

    @property
    def has_own_head(self) -> bool:
        """Whether the head is applied here, to the tokens that are asked for."""
        return self._plain_head or (self._fused and self._cap is not None)

    def _own_head_losses(
        self, inputs: Mapping[str, Any], places: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        model = causal_model(self.model)
        head = model.get_output_embeddings()
        if isinstance(head, HostHead):  # it sets out while the layers compute
            head.ahead(places.device)
        hidden = model.base_model(**inputs).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, places)
        return head_losses(head, hidden, targets, fused=self._fused, cap=self._cap)

    @property
    def _fused(self) -> bool:
        return self.fast is not None and self.fast.is_on

    def _bounds(
        self,
        segment_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Return what tells the layers where segments are: a mask, their bounds, or both."""
        inputs: dict[str, Any] = {}
        if self.fast is None or not self.fast.packed:
            inputs["attention_mask"] = self._attention.mask(segment_ids, cu_seqlens, max_seqlen)
        if self.fast is None or not self.fast.takes_bounds:
            return inputs
        if cu_seqlens is None:
            cu_seqlens = bounds_of(segment_ids)
        longest = segment_ids.shape[1] if max_seqlen is None else int(max_seqlen)
        drops = self.fast.drops and self.training
        seed = draw_seed(segment_ids.device) if drops else None
        return {**self._packed(Packed(cu_seqlens.int(), longest, seed)), **inputs}

    def _packed(self, packed: Packed) -> dict[str, Any]:
        # four dimensions: transformers takes it for a finished mask and looks for no segments
        nothing = torch.empty((1, 1, 1, 1), dtype=torch.bool, device=packed.cu_seqlens.device)
        unused = dict.fromkeys(KINDS, nothing) if self._attention.by_kind else nothing
        return {"attention_mask": unused, "packed": packed}

    def take_sums(self) -> dict[str, torch.Tensor]:
        """Return what passes since the last call have summed up beside the loss; start anew."""
        return {}

    @staticmethod
    def measures(sums: Mapping[str, float]) -> dict[str, float]:
        """Turn such sums, added up over passes and ranks, into what stands in metrics.jsonl."""
        return {}


class Attention:
    """Build the attention masks that a model's layers expect."""

    def __init__(self, config: Any) -> None:
        kinds = set(getattr(config, "layer_types", None) or ())
        if odd := kinds - set(KINDS):
            raise ModelError(
                f"{config.model_type}: layers of type '{min(odd)}' cannot keep packed samples "
                "apart; use a model with attention layers only"
            )
        self.by_kind = "sliding_attention" in kinds
        uniform = bool(kinds) and not self.by_kind
        self.window = None if uniform else getattr(config, "sliding_window", None)
        self.additive = config._attn_implementation == "eager"

    def mask(
        self,
        segment_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | None = None,
    ) -> Mask:
        """Return masks (B, 1, L, L), True where attention is allowed.

        None, for the faster causal kernel, if each row is one segment without padding; a dict
        by layer type for models whose layers differ.
        """
        n_rows, length = segment_ids.shape
        if cu_seqlens is None:
            whole_rows = bool((segment_ids == 0).all())
        else:
            whole_rows = len(cu_seqlens) == n_rows + 1
        if whole_rows:
            return None
        steps = torch.arange(length, device=segment_ids.device)
        distance = steps.unsqueeze(1) - steps  # query minus key
        # padding is a segment as well: a row that sees nothing would be NaN
        full = (segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)) & (distance >= 0)
        longest = length if max_seqlen is None else int(max_seqlen)
        window = longest if self.window is None else self.window
        near = full & (distance < window) if window < longest else full
        if self.by_kind:
            return {
                "full_attention": self._finish(full),
                "sliding_attention": self._finish(near),
            }
        return self._finish(near)

    def _finish(self, allowed: torch.Tensor) -> torch.Tensor:
        mask = allowed.unsqueeze(1)
        if not self.additive:
            return mask
        lowest = torch.finfo(torch.float32).min
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, lowest)


def causal_model(model: nn.Module) -> Any:
    """Return the language model inside a PEFT wrapper, or the model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def has_plain_head(config: Any) -> bool:
    """Tell whether logits are the head's output as it is, neither capped nor scaled."""
    capped = any(getattr(config, name, None) is not None for name in CAPS)
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALES)
    return not (capped or scaled)


def head_cap(network: Any) -> float | None:
    """Return the bound of logits of a network that does nothing else to them; None without."""
    cap: float | None = getattr(network.config.get_text_config(), CAPS[0], None)
    known = type(network).__name__ in CAPPED_HEADS
    return cap if known and type(network).__module__.startswith("transformers.models.") else None


def predicted(labels: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Mark positions (B, L - 1) whose next token is labelled and of the same segment."""
    inside = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] >= 0)
    return inside & (labels[:, 1:] != IGNORE_INDEX)


def bounds_of(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return where segments begin and end, (S + 1,), in the B * L tokens end to end."""
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return nn.functional.pad(starts, (0, 1), value=segment_ids.numel())


def head_losses(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    fused: bool = False,
    cap: float | None = None,
) -> torch.Tensor:
    """Return the cross entropies (T,) of `head(hidden)`, hidden (T, H), against `targets` (T,).

    `fused` makes the gradient of a plain frozen head without autograd, in the logits' memory;
    `cap` bounds the logits.
    """
    if isinstance(head, HostHead):
        return head.losses(hidden, targets)
    differentiable = torch.is_grad_enabled() and hidden.requires_grad
    if differentiable and not any(p.requires_grad for p in head.parameters()):
        if fused and _is_matrix(head):
            return _FusedHeadLosses.apply(hidden, targets, head, cap)  # type: ignore[no-any-return, no-untyped-call]
        return _FrozenHeadLosses.apply(hidden, targets, head, cap)  # type: ignore[no-any-return, no-untyped-call]

    def chunk_losses(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cross_entropies(head(part), wanted, cap)

    chunks = []
    for rows in _chunks(len(targets)):
        part = (hidden[rows], targets[rows])
        # recomputed in the backward pass, so that one chunk's logits exist at a time
        chunks.append(
            checkpoint(chunk_losses, *part, use_reentrant=False)
            if torch.is_grad_enabled()
            else chunk_losses(*part)
        )
    return torch.cat(chunks)


def cross_entropies(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None = None
) -> torch.Tensor:
    """Return the cross entropies of logits (T, V) in float32, in float64 for a float64 model."""
    wide = capped(logits.to(_loss_dtype(logits)), cap)
    return nn.functional.cross_entropy(wide, targets, reduction="none")


class _FrozenHeadLosses(torch.autograd.Function):
    """Losses of a head that is not trained: their gradients are made on the way, chunk by chunk.

    Saves the second head product that recomputation costs, and keeps (T, H) instead of (T, V). A
    loss depends on its own row of hidden states alone, so a factor per row makes any gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, cap: float | None
    ) -> torch.Tensor:
        losses = torch.empty(len(targets), dtype=_loss_dtype(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for rows in _chunks(len(targets)):
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_()
                found = cross_entropies(head(part), targets[rows], cap)
                gradient[rows] = torch.autograd.grad(found.sum(), part)[0]
            losses[rows] = found.detach()
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0].unsqueeze(1)).to(gradient.dtype), None, None, None


class _FusedHeadLosses(_FrozenHeadLosses):
    """The same for a plain matrix: gradients take the place of the logits that they come from."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, cap: float | None
    ) -> torch.Tensor:
        weight, bias = cast(Any, head).weight, cast(Any, head).bias
        losses = torch.empty(len(targets), dtype=_loss_dtype(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden)
        # one memory for all chunks: else the next one's logits stand beside the last one's
        memory = hidden.new_empty(min(FUSED_ROWS, len(targets)), len(weight))
        for start in range(0, len(targets), FUSED_ROWS):
            rows = slice(start, start + FUSED_ROWS)
            part = hidden[rows]
            logits = memory[: len(part)]
            if bias is None:
                torch.mm(part, weight.T, out=logits)
            else:
                torch.addmm(bias, part, weight.T, out=logits)
            losses[rows] = losses_and_gradient(logits, targets[rows], cap)
            write_hidden_gradient(logits, weight, gradient[rows])
        ctx.save_for_backward(gradient)
        return losses


def _is_matrix(head: nn.Module) -> bool:
    """Tell whether a head is its weight's product and a bias: Baichuan2's is, once it is folded."""
    plain = type(head) is nn.Linear or getattr(head, "folded", False)
    return plain and not head._forward_hooks and not head._forward_pre_hooks


def _chunks(n_rows: int) -> Iterator[slice]:
    # one chunk of no rows keeps a batch without labels connected to every trained parameter
    return (slice(i, i + CHUNK_ROWS) for i in range(0, max(1, n_rows), CHUNK_ROWS))


def _loss_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
