"""Which float8 do gradients want: e4m3 with three bits, or e5m2 with two and a larger range?

One step's packs through a real model whose frozen weights are in float8: at each weight the
gradient that arrives is multiplied both ways, and exactly. Each row has a scale of its own, so
e5m2's range counts only within a row. Prints for each shape of weight the medians over its layers:
how far `gradient x weight` is off by the root of mean squares, with the weight's rounding and by
that alone, how far a row's largest number is above its median, and what share becomes 0.
Run: python -m benchmarks.fp8_gradients --rows chats.jsonl [--model FOLDER] [--length 256]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from statistics import median
from typing import Any

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def main() -> None:
    """Run one step and print what was seen on its way back."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--template", default="tokenizer")
    parser.add_argument("--quantization", default="none", choices=["none", "nf4"])
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    for shape, found in seen(args).items():
        figures = {name: round(median(one[name] for one in found), 5) for name in found[0]}
        worst = round(max(one["e4m3"] for one in found), 5)
        print(json.dumps({"weight": shape, "times": len(found), **figures, "worst_e4m3": worst}))


def seen(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return what each weight's products came to, by the weights' shapes."""
    import torch

    from benchmarks import fp8_gap
    from raytune_ft.data.packing import Position
    from raytune_ft.kernels import fp8
    from raytune_ft.model import loading
    from raytune_ft.training.batching import steps
    from raytune_ft.training.build import build_engine

    settings = {
        "held_out": args.rows,
        "r": 16,
        "steps": 1,
        "packs": 1,
        "micro": 1,
        "lr": 1e-3,
        "dropout": 0.0,
    }
    folder = loading.prepare_folder(args.model, log=print)
    asked = argparse.Namespace(**{**vars(args), **settings})
    recipe = fp8_gap.recipe_of(asked, folder, "fp8", 1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    engine, _ = build_engine(recipe, folder, device)
    data = next(steps(fp8_gap.rows_of(recipe, 1)[0](Position()), recipe.train, rank=0, workers=1))
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    back = fp8.Fp8Weight.back

    def noted(weight: Any, gradient: torch.Tensor) -> torch.Tensor:
        found["x".join(map(str, weight.source.shape))].append(compared(weight, gradient.float()))
        return back(weight, gradient)

    fp8.Fp8Weight.back = noted  # type: ignore[method-assign]
    engine.module.train()
    engine.forward_backward(data.micro_batches[0], data.n_targets)
    return found


def compared(weight: Any, gradient: Any) -> dict[str, float]:
    """Return the errors of one product's ways, (T, out) by (out, in)."""
    import torch

    from raytune_ft.kernels.nf4 import Nf4Weight, dequantize_reference

    source = weight.source
    own = dequantize_reference(source) if isinstance(source, Nf4Weight) else source
    rounded = weight.values(transposed=False).float() * weight.scales.unsqueeze(1)
    exact, scaled = gradient @ own.float(), gradient * weight.scales
    figures = {}
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        scales = scaled.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST[name]
        eight = (scaled / scales).to(dtype).float() * scales
        figures[name] = _off((eight / weight.scales) @ rounded, exact)
        lost = (eight == 0).float().mean() - (scaled == 0).float().mean()
        figures[f"{name}_to_zero"] = float(lost)
    size = gradient.abs()
    figures["weight_alone"] = _off(gradient @ rounded, exact)
    figures["largest_over_median"] = float((size.amax(1) / size.median(1).values).nanmedian())
    return figures


def _off(found: Any, exact: Any) -> float:
    return float((found - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
