"""Cross entropy with its gradient at once: logits in, losses out, the logits overwritten.

d loss_i / d logits_i = softmax(logits_i) - onehot(target_i) needs the logits and nothing else, so
it takes their place: no second (T, V) tensor exists. Its product with the head's weight is the
gradient of the hidden states.

Shapes: T = labelled tokens, V = words, H = hidden width.
"""

from __future__ import annotations

import torch

from raytune_ft.kernels.launch import accumulator, has_triton

Tensor = torch.Tensor


def losses_and_gradient(logits: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Return the losses, and write each loss's gradient over its row of logits.

    Args:
        logits: (T, V), contiguous rows, bfloat16, float16, float32 or float64; overwritten. Must
            not be part of an autograd graph.
        targets: (T,), int64, each in 0..V-1.
        cap: softmax reads `capped(logits, cap)`; the gradient is still that of the logits.

    Returns:
        (T,) in float32, in float64 for float64 logits.
    """
    if has_triton(logits) and logits.dtype is not torch.float64:
        from raytune_ft.kernels import cross_entropy_triton

        return cross_entropy_triton.losses_and_gradient(logits, targets, cap)
    return reference_losses_and_gradient(logits, targets, cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return logits squeezed into -cap..cap by cap * tanh(logits / cap), as Gemma 2 has them."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def reference_losses_and_gradient(
    logits: Tensor, targets: Tensor, cap: float | None = None
) -> Tensor:
    """Do what `losses_and_gradient` does by torch's own operators."""
    wide = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap)
    normaliser = wide.logsumexp(-1, keepdim=True)
    index = targets.unsqueeze(1)
    losses = (normaliser - wide.gather(1, index)).squeeze(1)
    gradient = (wide - normaliser).exp()
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    if cap is not None:
        gradient *= 1 - (wide / cap).square()
    logits.copy_(gradient)
    return losses


def write_hidden_gradient(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write `gradient @ weight` to `out`, rounded once.

    Args:
        gradient: (T, V), as `losses_and_gradient` left it.
        weight: (V, H), of the same type.
        out: (T, H), of the same type.

    Where few rows meet many words, cuBLAS parts the sum over words and rounds each part's sum to
    bfloat16. The part with the target's -1 is as large as the whole, so that the result is rounded
    twice: 1.22 times the error (docs/performance.md). So half precision goes by a float32 product,
    T x H numbers for the moment.
    """
    if gradient.is_cuda and accumulator(gradient.dtype) != gradient.dtype:
        out.copy_(torch.mm(gradient, weight, out_dtype=accumulator(gradient.dtype)))
    else:
        torch.mm(gradient, weight, out=out)
