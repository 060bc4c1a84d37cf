"""What lies on the host: the same numbers as on the device, in every layout; names and files too.

On a CPU the same code runs with plain copies; tests/gpu/test_small_card.py has it on a device.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from raytune_ft.config.estimates.layout import Layout, hosted_layouts
from raytune_ft.config.estimates.setting import EMBEDDING, HEAD, INPUTS, LADDER
from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import collate
from raytune_ft.kernels import transfer
from raytune_ft.model import capturable, host_head, hosting, loading
from raytune_ft.model.generate import stream_ids
from raytune_ft.model.host_embedding import HostEmbedding
from raytune_ft.model.host_head import HostHead
from raytune_ft.model.host_inputs import Shelf
from raytune_ft.model.loss import causal_model
from raytune_ft.model.memory import Shape
from raytune_ft.training.batching import TensorBatch, to_tensors
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import TorchEngine
from raytune_ft.training.guarding.dry_step import _full_pack
from raytune_ft.training.laid_out import decoder_layers, lay_out
from raytune_ft.training.step import seed_step
from tests.conftest import make_tiny_model
from tests.training import micro

CPU = torch.device("cpu")
LAYERS = 4
ALL = LADDER[-1]


def recipe_of(model: Path, *, path: bool = True, dropout: float = 0.2, **train: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(model), "fast_path": path},
        "lora": {"r": 4, "dropout": dropout},
        "data": {"sources": [{"path": "a.jsonl"}], "max_length": 64},
        "train": {"deepspeed": "none", "micro_batch_size": 2, "accumulation": 2, **train},
    })  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosted")
    make_tiny_model(folder, num_hidden_layers=LAYERS)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's words in many parts, more of them than lie on the device at once."""
    monkeypatch.setattr(host_head, "PART_WORDS", 40)
    monkeypatch.setattr(host_head, "PARTS_AHEAD", 3)


def engine_of(recipe: Recipe, model: Path, hosted: tuple[str, ...] = ()) -> TorchEngine:
    engine, _ = build_engine(recipe, model, CPU, hosted=hosted, tell=pytest.fail)
    assert isinstance(engine, TorchEngine)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in engine.trained.items():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return engine


def batch() -> TensorBatch:
    return to_tensors(collate([_full_pack(64, 3, 300)] * 2))


def gradients(engine: TorchEngine) -> tuple[float, dict[str, torch.Tensor]]:
    engine.module.train()
    torch.manual_seed(1)
    loss = float(engine.forward_backward(batch(), 100))
    found = {name: p.grad.clone() for name, p in engine.trained.items() if p.grad is not None}
    for parameter in engine.trained.values():
        parameter.grad = None
    return loss, found


@pytest.mark.parametrize("path", [True, False], ids=["fast", "plain"])
def test_gradients_are_those_of_the_layout_without_it(path: bool, model: Path) -> None:
    """Dropout is on. Rows and layer inputs to the bit; parts of the head by float32's rounding."""
    engine = engine_of(recipe_of(model, path=path), model)
    network: Any = engine.module.model
    for again in (LAYERS, 2):
        lay_out(network, Layout(2, 2, again))
        loss, plain = gradients(engine)
        assert all(float(gradient.abs().max()) > 0 for gradient in plain.values())
        largest = max(float(gradient.abs().max()) for gradient in plain.values())
        for hosted in (*LADDER, (INPUTS,), (HEAD,), ()):
            assert lay_out(network, Layout(2, 2, again, hosted=hosted)) == []
            found, its = gradients(engine)
            assert its.keys() == plain.keys()
            apart = max(float((its[name] - plain[name]).abs().max()) for name in plain)
            if HEAD in hosted:
                assert found == pytest.approx(loss, rel=1e-6)
                assert apart <= 2e-6 * largest
            else:
                assert (found, apart) == (loss, 0.0)


def test_a_model_built_so_has_the_same_names_and_goes_back(model: Path) -> None:
    recipe = recipe_of(model)
    plain, hosted = engine_of(recipe, model), engine_of(recipe, model, ALL)
    before, after = plain.module.state_dict(), hosted.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    network = causal_model(hosted.module.model)  # type: ignore[arg-type]
    assert isinstance(network.get_input_embeddings(), HostEmbedding)
    assert isinstance(network.get_output_embeddings(), HostHead)
    assert hosting.is_hosted(network)
    lay_out(hosted.module.model, Layout(2, 2, 0))
    assert not hosting.is_hosted(network)
    assert type(network.get_input_embeddings()) is nn.Embedding
    assert list(hosted.module.state_dict()) == list(before)
    assert gradients(hosted)[0] == gradients(plain)[0]


def test_tied_tables_go_together_or_stay(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    network: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )).requires_grad_(False).eval()  # fmt: skip
    ids = torch.arange(12).view(2, 6)
    expected = network(ids).logits
    assert hosting.place(network, (EMBEDDING,), CPU) == []
    assert not hosting.is_hosted(network)
    hosting.place(network, ALL, CPU)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert torch.allclose(network(ids).logits, expected, atol=1e-6)
    hosting.place(network, (), CPU)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert isinstance(network.lm_head.weight, nn.Parameter)
    assert torch.equal(network(ids).logits, expected)


def test_what_is_trained_stays_on_the_device(model: Path) -> None:
    recipe = recipe_of(model)
    lora = recipe.lora.model_copy(update={"modules_to_save": ["lm_head", "embed_tokens"]})
    wide = recipe.model_copy(update={"lora": lora})
    engine, network = build_engine(wide, model, CPU)
    lines = hosting.place(network, ALL, CPU)
    assert len(lines) == 2 and all("stays on the device: " in line for line in lines)
    assert not list(hosted_layouts(wide, counts_of(wide, model)))
    assert list(hosted_layouts(recipe, counts_of(recipe, model)))
    gradients(engine)  # type: ignore[arg-type]


def counts_of(recipe: Recipe, model: Path) -> Any:
    return Shape(loading.read_config(model)).counts(recipe)


def test_answers_are_the_same(model: Path) -> None:
    answers = []
    for hosted in ((), ALL):
        engine = engine_of(recipe_of(model), model, hosted)
        answers.append(
            list(stream_ids(engine.module.model, [5, 6, 7], stop_ids=(), max_new_tokens=8))  # type: ignore[arg-type]
        )
    assert answers[0] == answers[1]


def test_a_table_stays_when_the_model_moves_and_changes_its_type(model: Path) -> None:
    engine = engine_of(recipe_of(model), model, ALL)
    table = causal_model(engine.module.model).get_input_embeddings().weight  # type: ignore[arg-type]
    engine.module.to("meta")
    network = causal_model(engine.module.model)  # type: ignore[arg-type]
    assert network.get_input_embeddings().weight is table
    assert {p.device.type for p in network.parameters()} == {"meta"}
    network.to(torch.bfloat16)
    assert network.get_input_embeddings().weight.dtype is torch.bfloat16
    assert network.get_input_embeddings().weight.device == CPU


class Counted:
    """Copies that are begun, and the tensors that are held on the device."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = 0

        def begin(target: torch.Tensor, source: torch.Tensor) -> transfer.Arrival:
            self.begun += 1
            return transfer.begin(target, source)

        patch.setattr("raytune_ft.model.host_inputs.begin", begin)


def test_inputs_leave_once_and_come_back_once_and_places_serve_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(recipe_of(model), model)
    lay_out(engine.module.model, Layout(2, 2, LAYERS, hosted=(EMBEDDING, INPUTS)))
    counted = Counted(monkeypatch)
    for _ in range(3):
        gradients(engine)
    assert counted.begun == 3 * 2 * (LAYERS - 1)  # the last layer's input stays
    shelf: Shelf = decoder_layers(engine.module)[0]._gradient_checkpointing_func.func.__self__
    gc.collect()
    assert shelf.taken == LAYERS - 1
    assert sum(map(len, shelf._free.values())) == shelf.taken


def alive_behind(engine: TorchEngine, layout: Layout) -> list[bool]:
    """Return which layers' inputs are still in memory when the last layer has run."""
    lay_out(engine.module.model, layout)
    entered: list[StorageWeakRef] = []
    found: list[bool] = []

    def enter(_layer: Any, args: tuple[Any, ...]) -> None:
        entered.append(StorageWeakRef(args[0].untyped_storage()))

    def look(_norm: Any, _args: Any) -> None:
        found.extend(not one.expired() for one in entered)

    hooks = [one.register_forward_pre_hook(enter) for one in decoder_layers(engine.module)]
    norm = causal_model(engine.module.model).model.norm  # type: ignore[arg-type]
    hooks.append(norm.register_forward_pre_hook(look))
    gradients(engine)
    for hook in hooks:
        hook.remove()
    return found


def test_inputs_do_not_outlive_their_layers(model: Path) -> None:
    """But the last layer's, which stays, and the first's, which transformers holds so long."""
    engine = engine_of(recipe_of(model), model)
    assert alive_behind(engine, Layout(2, 2, LAYERS)) == [True] * LAYERS
    away = Layout(2, 2, LAYERS, hosted=(EMBEDDING, INPUTS))
    assert alive_behind(engine, away) == [True, False, False, True]


def test_a_run_s_layout_is_read_as_it_was_written() -> None:
    layout = Layout(4, 4, 32, hosted=ALL)
    content = json.loads(json.dumps(layout.to_json()))
    assert Layout(**content) == layout
    assert content == layout.to_json()
    assert "hosted" not in replace(layout, hosted=()).to_json()  # as earlier versions wrote it
    assert layout.said(32).endswith("embedding, layer inputs and head on the host")


def test_a_head_sets_out_before_the_layers_run(model: Path) -> None:
    """So that parts of it arrive meanwhile; each part comes once a pass, none is left over."""
    engine = engine_of(recipe_of(model), model, ALL)
    network: Any = causal_model(engine.module.model)  # type: ignore[arg-type]
    head, order = network.get_output_embeddings(), []
    parts_ahead, words = host_head.PARTS_AHEAD, network.config.vocab_size

    def note(target: torch.Tensor, source: torch.Tensor) -> transfer.Arrival:
        order.append(len(source))
        return transfer.begin(target, source)

    hook = decoder_layers(engine.module)[0].register_forward_pre_hook(lambda *_: order.append(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_head, "begin", note)
        gradients(engine)
    hook.remove()
    assert order.index(0) == parts_ahead
    assert sum(order) == words
    assert host_head.COMING not in head.__dict__


def test_tables_are_loaded_where_they_are_to_lie(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's name stands for a GPU: transformers sees two devices, and attaches nothing."""
    section = recipe_of(model).model.model_copy(update={"quantization": "nf4"})
    seen: list[dict[str, torch.device]] = []
    places = loading._places

    def other(network: Any, config: Any, _device: torch.device, hosted: Any) -> Any:
        found = places(network, config, torch.device("cuda", 0), hosted)
        seen.append(found)
        return {name: torch.device("cpu", 0) if at.type == "cuda" else at
                for name, at in found.items()}  # fmt: skip

    monkeypatch.setattr(loading, "_places", other)
    plain = loading.load_model(model, section, CPU)
    hosted = loading.load_model(model, section, CPU, hosted=ALL)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert seen == [{"": cuda}, {"": cuda, "model.embed_tokens": cpu, "lm_head": cpu}]
    assert not any(hasattr(module, "_hf_hook") for module in hosted.modules())
    before, after = plain.state_dict(), hosted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_passes_of_fixed_shapes_have_things_on_the_host_too(model: Path) -> None:
    """Nothing in them asks the device, so that a GPU replays them from a graph."""
    again = {"model.gradient_checkpointing": True}
    fixed, free = micro.side(model, "fixed", **again), micro.side(model, None, **again)
    lay_out(fixed.engine.module.model, Layout(1, 3, LAYERS, hosted=ALL))
    step, n_targets = micro.batches()[0]
    losses = []
    for one in (fixed, free):
        seed_step(7, 1)
        losses.append([float(one.engine.forward_backward(batch, n_targets)) for batch in step])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in fixed.gradients().items():
        expected = free.gradients()[name]
        assert float((gradient - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    assert fixed.micro is not None and fixed.micro.seen_safe
    assert not fixed.micro.refused and not fixed.said


def test_a_copy_beside_the_device_s_work_is_one_that_nobody_waits_for() -> None:
    class Pinned:
        device = CPU

        def __init__(self, pinned: bool) -> None:
            self.pinned = pinned

        def is_pinned(self) -> bool:
            return self.pinned

    class There:
        device = torch.device("cuda", 0)

    for pinned, beside, expected in (
        (True, True, True), (True, False, False), (False, True, False),
    ):  # fmt: skip
        for pair in ((There(), Pinned(pinned)), (Pinned(pinned), There())):
            assert capturable._is_beside((*pair, beside), {}) is expected
            assert capturable._is_beside(pair, {"non_blocking": beside}) is expected
