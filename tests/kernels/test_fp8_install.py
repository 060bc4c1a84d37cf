"""`model.compute: fp8` under whole models: what it changes, what it leaves, where it is refused.

On a CPU, where the rounding of float8 is emulated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytune_ft.config.estimates.layout import Layout
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, ModelError
from raytune_ft.kernels import fp8, linear
from raytune_ft.kernels.fp8 import Fp8Weight, Rows
from raytune_ft.kernels.fp8 import quantize_rows as fp8_rows
from raytune_ft.kernels.linear import Base, Plan, through_bases
from raytune_ft.model import adapter
from raytune_ft.model.fast import OFF, install
from raytune_ft.model.fastpath import eighths
from raytune_ft.model.fastpath.linears import PART
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training.laid_out import lay_out
from raytune_ft.training.run_folder import read_json
from tests.kernels.eighth_steps import Drawn, check_steps, draw
from tests.kernels.installed import CPU, Made, batches, gradients, network, train, with_adapter
from tests.kernels.rounded import by_rows, cosines, rounded

OF_LOSSES = 0.02
"""A product is off by 4% of its size, each by itself, and random models of width 32 have little to
average over; what rounding costs a real one is what benchmarks.fp8_gap measures."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def made(
    family: str, folder: Path, compute: str, *, resident: bool = False, **section: Any
) -> Made:
    """Return a model on the fast path, its loss and the report."""
    model = with_adapter(network(family, folder, **section))
    report = install(model, CPU, True, compute=compute, resident=resident)
    return model.train(), TokenLoss(model, report), report


def bases(model: nn.Module) -> list[Any]:
    return [module.__dict__[PART].base for module in model.modules() if PART in module.__dict__]


class Rounded(torch.autograd.Function):
    """`x w^T` and its gradient with each factor rounded, in float64; nothing of ours in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        scales = w.abs().amax(1, keepdim=True) / 448
        ctx.scales, ctx.rounded = scales.t(), rounded(w / scales)
        return (by_rows(x) @ (ctx.rounded * scales).t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        scaled = gradients[0] * ctx.scales
        return (by_rows(scaled) @ ctx.rounded).to(scaled.dtype), None


def round_products(model: nn.Module) -> None:
    """Let a model of transformers and PEFT round what its frozen layers multiply."""
    for layer in [module for module in model.modules() if hasattr(module, "lora_A")]:
        base = layer.base_layer

        def forward(x: Tensor, base: Any = base) -> Tensor:
            out = Rounded.apply(x, Base(base).matrix(torch.float32).clone())  # type: ignore[no-untyped-call]
            return out if base.bias is None else out + base.bias  # type: ignore[no-any-return]

        base.forward = forward


@pytest.mark.parametrize(
    ("family", "section"),
    [("Llama", {}), ("internlm", {"quantization": "nf4"}), ("chatglm", {"quantization": "nf4"})],
)
def test_ten_steps_are_those_of_the_plain_way_with_rounded_products(
    family: str, section: dict[str, Any], folder: Path
) -> None:
    """A number between two of e4m3 goes to the other one if float32 is off by a bit: seldom."""
    plain = with_adapter(network(family, folder, **section)).train()
    round_products(plain)
    sides = {
        "own weights": made(family, folder, "auto", **section),
        "rounded": (plain, TokenLoss(plain), OFF),
        "installed": made(family, folder, "fp8", **section),
    }
    losses, first = {}, {}
    for side, one in sides.items():
        batches()[0].loss(one[1]).backward()
        first[side] = gradients(one[0])
        losses[side] = train(one, 10)
    for name in first["installed"]:
        own, rounded = (
            cosines(first["installed"], first[side])[name] for side in ("own weights", "rounded")
        )
        layer = name.removeprefix("base_model.model.model.layers.")
        print(f"{family} {layer}: cosine {own:.4f} to own weights, {rounded:.6f} to rounded ones")
        assert rounded > 0.9999 and own < 1 - 1e-5
    print(f"{family}: {losses}")
    assert losses["installed"] == pytest.approx(losses["rounded"], rel=2e-3)
    assert losses["installed"] == pytest.approx(losses["own weights"], rel=OF_LOSSES)
    assert all(base.eighths is not None for base in bases(sides["installed"][0]))


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    place = tmp_path_factory.mktemp("tiny")
    return draw(place, CPU, length=48, words=96, rank=8, **TINY)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_bfloat16_steps_are_those_of_the_same_roundings(tiny: Drawn, quantization: str) -> None:
    """As tests/gpu has it at a 7B's shape."""
    check_steps(tiny, quantization, steps=3)


def _scales_on_the_wrong_side(weight: Fp8Weight, gradient: Tensor) -> Tensor:
    rows = fp8.quantize_rows(gradient)
    return fp8._product(rows, weight.values(transposed=True), weight.ones, gradient.dtype)


def _one_scale_for_all(weight: Fp8Weight, x: Rows, bias: Tensor | None, dtype: Any) -> Tensor:
    level = weight.scales.mean().expand_as(weight.scales).unsqueeze(0)
    return fp8._product(x, weight.values(transposed=False), level, dtype, bias)


def _sums_that_lose(weight: Fp8Weight, x: Rows, bias: Tensor | None, dtype: Any) -> Tensor:
    """As Hopper's fast ones, by 2.7%."""
    return (fp8._product(x, weight.values(transposed=False), weight.scales.unsqueeze(0),
                         torch.float32, bias) * 0.973).to(dtype)  # fmt: skip


def _of_another_layer(weight: Fp8Weight, gradient: Tensor) -> Tensor:
    other = Fp8Weight(weight.source.flip(0), weight.scales, weight.ones)  # type: ignore[union-attr]
    rows = fp8.quantize_rows(gradient, weight.scales)
    return fp8._product(rows, other.values(transposed=True), weight.ones, gradient.dtype)


def _coarser(weight: Fp8Weight, gradient: Tensor) -> Tensor:
    """Gradients in e5m2, whose numbers e4m3 has too."""
    rows = fp8.quantize_rows(gradient, weight.scales)
    values = rows.values.float().to(torch.float8_e5m2).to(fp8.E4M3)
    coarse = Rows(values, rows.scales)
    return fp8._product(coarse, weight.values(transposed=True), weight.ones, gradient.dtype)


def _of_one_layer(plan: Plan, outer: list[Tensor], total: Tensor | None) -> Tensor:
    """All products are made, and those of one layer are the gradient of a group's input."""
    through_bases(plan, outer, total)
    return through_bases(Plan.of(plan.parts[:1], 0), outer[:1], total)


def _of_other_rows(x: Tensor, factors: Tensor | None = None) -> Rows:
    return fp8_rows(x.roll(1, 0), factors)


PRODUCTS, GRADIENTS = "products are off", "not its replay's gradient"
FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "scales on the wrong side": (Fp8Weight, "back", _scales_on_the_wrong_side, PRODUCTS),
    "one scale for all rows": (Fp8Weight, "times", _one_scale_for_all, PRODUCTS),
    "sums that lose": (Fp8Weight, "times", _sums_that_lose, PRODUCTS),
    "another layer's weight": (Fp8Weight, "back", _of_another_layer, PRODUCTS),
    "gradients of two bits": (Fp8Weight, "back", _coarser, PRODUCTS),
    "a row's neighbour": (fp8, "quantize_rows", _of_other_rows, PRODUCTS),
    "a product left out": (linear, "through_bases", _of_one_layer, GRADIENTS),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str, tiny: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, instead, said = FAULTS[fault]
    monkeypatch.setattr(place, name, instead)
    with pytest.raises(AssertionError, match=said):
        check_steps(tiny, "none", steps=1)


@pytest.mark.parametrize("resident", [False, True])
def test_layers_that_run_again_round_the_same(resident: bool, folder: Path) -> None:
    """Weights in float8 may go and come between steps; no bit of a gradient changes."""
    model, loss, _ = made("internlm", folder, "fp8", resident=resident, quantization="nf4")
    found = []
    for again in (0, 2, 1):
        lay_out(model, Layout(1, 1, again))
        batches()[1].loss(loss).backward()
        found.append(gradients(model))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
    assert not any(base.eighths.kept for base in bases(model))


def test_answers_and_files_are_of_the_own_weights(folder: Path, tmp_path: Path) -> None:
    logits, names = [], []
    for compute in ("auto", "fp8"):
        model, _, _ = made("internlm", folder, compute, quantization="nf4")
        adapter.save_adapter(model, tmp_path / compute, "base")
        names.append(list(model.state_dict()))
        with torch.no_grad():
            logits.append(model.eval()(batches()[0].ids, use_cache=False).logits)
    assert torch.equal(*logits)
    assert names[0] == names[1]
    for file in (adapter.CONFIG_FILE, adapter.WEIGHTS_FILE):
        assert (tmp_path / "auto" / file).read_bytes() == (tmp_path / "fp8" / file).read_bytes()


@pytest.mark.parametrize("section", [{}, {"quantization": "nf4"}])
def test_held_out_losses_are_of_the_own_weights(section: dict[str, Any], folder: Path) -> None:
    """As the adapter is used afterwards; back in training they are rounded again."""
    found = []
    for compute in ("auto", "fp8"):
        model, loss, _ = made("internlm", folder, compute, **section)
        losses = []
        for training in (True, False, True):
            model.train(training)
            with torch.no_grad():
                losses.append(batches()[0].loss(loss).item())
        found.append(losses)
    own, eight = found
    assert eight[1] == own[1]
    assert eight[0] == eight[2] != own[0]


def test_layers_of_other_widths_stay_and_are_told(folder: Path) -> None:
    """Qwen 2 of 2 key heads and a width of 5 each: keys and values are 10 wide."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, vocab_size=96, head_dim=8,
    )  # fmt: skip
    model = with_adapter(Qwen2ForCausalLM(config).requires_grad_(False))
    report = install(model, CPU, True, compute="fp8")
    assert report.lines()[1:] == [
        "float8: frozen weights of 10 linear layers, kept in float8",
        "float8: emulated on a CPU, the same rounding, slower than without",
        "float8: not 4 of 8 x 32, no multiples of 16; in the model's type",
    ]
    loss = TokenLoss(model.train(), report)
    batches()[0].loss(loss).backward()
    assert all(value.isfinite().all() for value in gradients(model).values())


def test_a_model_with_nothing_to_multiply_so_is_refused(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3,
        vocab_size=96,
    )  # fmt: skip
    odd = with_adapter(LlamaForCausalLM(config).requires_grad_(False))
    with pytest.raises(ModelError, match="does nothing here: all weights are like 24 x 24, no"):
        install(odd, CPU, "auto", compute="fp8")
    trained = network("Llama", folder).requires_grad_(True)
    with pytest.raises(ModelError, match=r"is on the fast path \(.*trained in full"):
        install(trained, CPU, "auto", compute="fp8")
    with pytest.raises(ModelError, match="ZeRO-3 parts its weights"):
        install(trained, CPU, "auto", compute="fp8", sharded=True)


def test_gpus_without_float8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(fp8, "_failure", lambda _: None)
    for capability, is_refused in (
        ((7, 5), True),
        ((8, 6), True),
        ((8, 9), False),
        ((9, 0), False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert (fp8.refusal(device) is not None) is is_refused
        eighths.check("auto", device)
        if is_refused:
            with pytest.raises(ModelError, match=r"Tesla T4 has compute capability \d\.\d") as told:
                eighths.check("fp8", device)
            assert "\n" not in str(told.value)
        else:
            eighths.check("fp8", device)
    eighths.check("fp8", CPU)


def test_a_gpu_whose_torch_has_no_such_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.10 on a GPU of compute capability 12.0, whose message is this."""
    assert fp8._failure(CPU) is None

    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLt`\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(fp8, "_product", refuse)
    place = fp8._failure
    monkeypatch.setattr(fp8, "_failure", lambda _: place(CPU))
    with pytest.raises(ModelError, match=r"by rows here .*NOT_SUPPORTED when") as told:
        eighths.check("fp8", torch.device("cuda", 0))
    assert "\n" not in str(told.value)


def test_a_run_says_it_and_goes_on_by_it_alone(tiny_model: Path, tmp_path: Path) -> None:
    from tests.conftest import write_chats
    from tests.training.test_worker import cut_back
    from tests.training.test_worker import train as run_worker

    rows = write_chats(tmp_path / "train.jsonl", 12)
    content = {
        "model": {"path": str(tiny_model), "compute": "fp8", "gradient_checkpointing": True},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "data": {"sources": [{"path": str(rows)}], "max_length": 96, "window": 16},
        "train": {"max_steps": 2, "accumulation": 2, "lr": 5e-3, "deepspeed": "none"},
        "checkpoint": {"every": 1, "keep": -1},
        "chat_eval": {"every": None, "prompts": ["question 3?"], "max_new_tokens": 3},
        "run": {"trackers": []},
    }
    run = run_worker(Recipe.model_validate(content), tmp_path / "run")
    said = read_json(run.run_json)["fast_path"]
    assert said[1] == "float8: frozen weights of 14 linear layers, kept in float8"
    again = run_worker(Recipe.model_validate(content), cut_back(run, tmp_path / "again", 1))
    weights = adapter.WEIGHTS_FILE
    assert (again.adapter / weights).read_bytes() == (run.adapter / weights).read_bytes()
    del content["model"]["compute"]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="other values of model"):
        run_worker(Recipe.model_validate(content), tmp_path / "run")
