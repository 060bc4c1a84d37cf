"""The fast path under whole models of every family: losses, gradients and files of the plain way.

float32 on CPU, so kernels are their plain torch forms; what is tested is what stands around them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import TrainSection
from raytune_ft.kernels.linear import adapted
from raytune_ft.model import adapter
from raytune_ft.model.fastpath import attention, blocks, linears
from raytune_ft.model.fastpath.lane import LANE, Packed
from raytune_ft.model.fastpath.linears import PART
from raytune_ft.model.preference import build_loss
from tests.kernels.installed import (
    FAMILIES,
    batches,
    finish,
    gradients,
    least_cosine,
    made,
    network,
    train,
    with_adapter,
)  # fmt: skip

BIG = ("baichuan2-7b", "qwen-aug")
"""Of the same network as another family here."""
KINDS = ("layers", "attention", "mlp", "norms", "linear")
PARTLY = {
    "Mixtral": ("mlp",),
}
"""What has no fast form in a family."""


KERNELS = (
    (linears, "adapted"), (attention, "attend"), (attention, "rope"), (blocks, "rms_norm"),
    (blocks, "add_rms_norm"), (blocks, "swiglu"), (blocks, "fused_swiglu"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in BIG])
def test_ten_steps_are_those_of_the_plain_way(family: str, folder: Path) -> None:
    """Only the order of sums differs: losses within 1e-5, after ten steps too."""
    losses, first = [], []
    for fast in (False, True):
        one = made(family, folder, fast)
        torch.manual_seed(0)  # of dropouts that are not the adapter's
        batches()[0].loss(one[1]).backward()
        first.append(gradients(one[0]))
        losses.append(train(one, 10))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert least_cosine(first[1], first[0]) > 0.99999
    without = {kind for kind in KINDS if not one[2].counts[kind]}
    assert without == set(PARTLY.get(family, ()))


@pytest.mark.parametrize("family", ["internlm", "chatglm", "baichuan-13b", "starcoder"])
def test_nf4_bases_compute_the_same(family: str, folder: Path) -> None:
    """Blocks of 64 weights run over the ends of these models' rows of 32 and 48."""
    found = []
    for fast in (False, True):
        model = with_adapter(network(family, folder, quantization="nf4"))
        found.append(train(finish(model, fast), 4))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("family", ["Llama", "starcoder"])
def test_weights_of_keys_drop_the_same(family: str, which: int, folder: Path) -> None:
    """Torch's generator gives both ways the same numbers, with and without a mask."""
    found = []
    for fast in (False, True):
        model = with_adapter(network(family, folder))
        for block in (m for m in model.modules() if type(m).__name__.endswith("Attention")):
            block.attention_dropout = block.attn_dropout = 0.4
        one = finish(model, fast)
        torch.manual_seed(0)
        value = batches()[which].loss(one[1])
        value.backward()
        found.append((value.item(), gradients(model)))
    assert one[2].packed
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert least_cosine(found[1][1], found[0][1]) > 0.99999


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["internlm", "Gemma3", "starcoder"])
def test_recomputed_layers_have_the_same_gradients(
    family: str, dropout: float, folder: Path
) -> None:
    """Masks of dropout among what is computed again."""
    found = []
    for again in (False, True):
        model = with_adapter(network(family, folder), dropout=dropout)
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        _, loss, _ = finish(model, fast=True)
        torch.manual_seed(3)
        batches()[1].loss(loss).backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7)


def test_dropouts_of_a_batch_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one input have streams that follow each other; no two layers share one."""
    model, loss, report = made("internlm", folder, True, dropout=0.1)
    parts = {name: m.__dict__[PART] for name, m in model.named_modules() if PART in m.__dict__}
    streams = {name.rpartition("model.layers.")[2]: part.stream for name, part in parts.items()}
    assert report.drops and len(set(streams.values())) == len(streams) == 14
    for number in range(2):
        at = f"{number}.self_attn"
        q, k, v = (streams[f"{at}.{part}_proj"] for part in "qkv")
        assert (k, v) == (q + 1, q + 2)
        assert streams[f"{number}.mlp.up_proj"] == streams[f"{number}.mlp.gate_proj"] + 1
    used: list[tuple[int, int]] = []

    def note(x: Any, pairs: Any, seed: torch.Tensor, offset: int) -> Any:
        used.append((int(seed), offset))
        return adapted(x, pairs, seed, offset)

    monkeypatch.setattr(linears, "adapted", note)
    for _ in range(2):
        batches()[0].loss(loss)
    seeds, offsets = zip(*used, strict=True)
    assert len(set(seeds[:8])) == len(set(seeds[8:])) == 1 and len(set(seeds)) == 2
    assert len(set(offsets[:8])) == 8 and offsets[:8] == offsets[8:]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["internlm", "chatglm"])
def test_long_contexts_go_through_the_mlp_in_tiles(
    family: str, again: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 tokens by 7: the same numbers, in layers that are computed again as well."""
    found = []
    for tile in (7, 100):
        monkeypatch.setattr(blocks, "TILE", tile)
        monkeypatch.setattr(blocks, "LONG", 2 * tile)
        model = with_adapter(network(family, folder))
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        batches()[0].loss(finish(model, fast=True)[1]).backward()
        found.append(gradients(model))
    assert least_cosine(found[0], found[1]) > 0.99999


def test_tiles_drop_by_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles of the same rows give other outputs; a pass again gives the same gradient."""
    model, _, _ = made("internlm", folder, True, dropout=0.5)
    mlp = model.base_model.model.model.layers[0].mlp
    monkeypatch.setattr(blocks, "TILE", 6)
    monkeypatch.setattr(blocks, "LONG", 6)
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).repeat(2, 1)[None]
    packed = Packed(torch.tensor([0, 12]), 12, torch.tensor([77]))
    seen = []
    for _ in range(2):
        x = rows.clone().requires_grad_()
        with LANE.within(packed):
            output = mlp(x)
        first, second = output[0].split(6)
        assert not torch.equal(first, second)
        output.square().sum().backward()
        seen.append(x.grad)
    assert torch.equal(seen[0], seen[1])


def test_layers_are_recomputed_where_they_are_told_to(folder: Path) -> None:
    model = with_adapter(network("Llama", folder))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    _, loss, _ = finish(model, fast=True)
    calls: list[str] = []
    for number, layer in enumerate(model.base_model.model.model.layers):
        # before, not after: torch ends a second pass where it has what it needs
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: calls.append(f"layer {n}"))  # type: ignore[misc]
    batches()[0].loss(loss).backward()
    assert sorted(calls) == sorted([f"layer {n}" for n in range(3)] * 2)


def test_names_and_files_stay(folder: Path, tmp_path: Path) -> None:
    models = [made("internlm", folder, fast)[0] for fast in (False, True)]
    plain, fast = models
    for of in ("state_dict", "named_parameters", "named_modules", "named_buffers"):
        assert [n for n, _ in _items(plain, of)] == [n for n, _ in _items(fast, of)]
    for name, model in (("plain", plain), ("fast", fast)):
        adapter.save_adapter(model, tmp_path / name, "base")
    for file in (adapter.CONFIG_FILE, adapter.WEIGHTS_FILE):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fast" / file).read_bytes()
    assert [str(type(m).__name__) for m in fast.modules()] == [
        str(type(m).__name__) for m in plain.modules()
    ]
    again = adapter.load_adapter(network("internlm", folder), tmp_path / "fast")
    ids = batches()[0].ids
    assert torch.equal(again(ids).logits, plain.eval()(ids).logits)


def _items(model: Any, of: str) -> list[tuple[str, Any]]:
    found = getattr(model, of)()
    return list(found.items() if isinstance(found, dict) else found)


@pytest.mark.parametrize("family", ["internlm", "baichuan-13b", "Qwen2", "Gemma3", "starcoder"])
def test_answers_are_the_same_bits(
    family: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache and without one: answers go the way of transformers and PEFT alone."""
    answers, logits = [], []
    for fast in (False, True):
        model, loss, _ = made(family, folder, fast)
        batches()[0].loss(loss).backward()
        model.eval()
        ids = batches()[0].ids[:, :9]
        with torch.no_grad(), monkeypatch.context() as patch:
            for place, kernel in KERNELS:
                patch.setattr(place, kernel, None)  # whoever calls it fails
            answers.append(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
            logits.append(model(ids, use_cache=False).logits)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("family", ["internlm", "baichuan2-13b", "Mistral"])
def test_held_out_losses_need_no_gradient(family: str, folder: Path) -> None:
    found = []
    for fast in (False, True):
        model, loss, _ = made(family, folder, fast, dropout=0.5)
        model.eval()
        with torch.no_grad():
            found.append([batch.loss(loss).item() for batch in batches()])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert LANE.depth == 0


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_preferences_are_the_same(objective: str, folder: Path) -> None:
    """DPO's first model as well: trained weights are swapped under the same modules."""
    train_section = TrainSection.model_validate({"objective": objective})
    found = []
    for fast in (False, True):
        model, _, report = made("internlm", folder, fast)
        loss = build_loss(model, train_section, report)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        value = batches()[0].loss(loss)
        value.backward()
        found.append((value.item(), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert least_cosine(found[1][1], found[0][1]) > 0.99999


@pytest.mark.parametrize("family", ["internlm", "starcoder"])
def test_float16_is_as_near_to_float32_as_the_plain_way(family: str, folder: Path) -> None:
    """PEFT computes updates in float32 there; ours in float16 with sums in float32.

    With a loss scale as training has it, and outliers of activations as trained models have them.
    """
    found = {}
    for name, fast, dtype in (
        ("exact", False, "float32"), ("plain", False, "float16"), ("fast", True, "float16"),
    ):  # fmt: skip
        model = with_adapter(network(family, folder, dtype=dtype))
        body = model.base_model.model.base_model
        with torch.no_grad():
            body.get_input_embeddings().weight[:, 5] = 3.0
        one = finish(model, fast)
        one[0].eval()  # StarCoder's own dropouts
        value = batches()[0].loss(one[1])
        (value * 4096).backward()
        found[name] = gradients(model)
    assert one[2].counts["linear"] and not one[2].plain
    cosines = {way: least_cosine(found[way], found["exact"]) for way in ("plain", "fast")}
    assert cosines["fast"] > 0.999 and cosines["fast"] > cosines["plain"] - 5e-4


def test_all_weights_can_be_trained(folder: Path) -> None:
    """Linear layers stay as they are; norms get their gradients."""
    found = []
    for fast in (False, True):
        model = network("Llama", folder).requires_grad_(True)
        one = finish(model, fast)
        batches()[0].loss(one[1]).backward()
        found.append(gradients(model))
    assert one[2].counts == {"layers": 3, "attention": 3, "mlp": 3, "norms": 7, "linear": 0}
    assert one[2].plain[0].startswith("q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj")
    assert one[2].plain[0].count("of 3 layers: trained in full") == 1
    assert least_cosine(found[1], found[0]) > 0.99999
