"""Original layout in, original layout out: bit by bit, merged exactly, native on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import RecipeError
from raytune_ft.model.adapter import attach, load_adapter, save_adapter
from raytune_ft.model.merge import merge_to
from raytune_ft.model.side_files import save_full
from tests.families.checkpoints import SPECS, WITHOUT_NATIVE_FORM, Weights, weights_of
from tests.families.conftest import Checkpoint
from tests.families.loaded import (
    TOLERANCE,
    difference,
    load,
    logits,
    random_ids,
    read_folder,
    without_buffers,
)
from tests.families.mapping import place_of
from tests.families.oracles import logits_of

pytestmark = pytest.mark.families

FAMILIES = tuple(SPECS)
LORA = LoraSection(r=4, alpha=8, dropout=0.0)
HEADS = ("lm_head.weight", "output_layer.weight")
CODE = b"raise SystemExit('code of a model folder ran')\n"


def adapted(folder: Path, out: Path, seed: int = 5) -> Any:
    """Attach an adapter whose B is not zero, save it to `out`, and return the adapted model."""
    model = attach(load(folder), LORA, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    save_adapter(model, out, str(folder))
    return model.eval()


def merged_by_hand(family: str, adapter: Path) -> Weights:
    """Return W + scale * B A in float64, in the original's fused tensors."""
    merged = {name: w.double() for name, w in weights_of(family).items()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            target, start, end = place_of(family, SPECS[family].config, layer)
            merged[target][start:end] += LORA.alpha / LORA.r * (b.double() @ a.double())
    return merged


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_gives_back_the_original_tensors(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """As after full-parameter training: through the loaded network and back."""
    base = checkpoint(family, shards=3)
    save_full(load(base, head_trained=True), base, tmp_path / "saved")
    found, expected = read_folder(tmp_path / "saved"), without_buffers(weights_of(family))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], w) for name, w in expected.items())
    assert (tmp_path / "saved/config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_is_exact_in_the_original_tensors(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(family, shards=2)
    model = adapted(base, tmp_path / "adapter")
    merge_to(base, tmp_path / "adapter", tmp_path / "merged")
    found, exact = read_folder(tmp_path / "merged"), merged_by_hand(family, tmp_path / "adapter")
    untouched = weights_of(family)
    assert found.keys() == exact.keys()
    changed = [name for name in exact if not torch.equal(exact[name], untouched[name].double())]
    assert len(changed) >= 4 * 2, "an adapter on every linear layer of two layers"
    for name, wanted in exact.items():
        if name in changed:
            # one float32 sum of rank + 1 terms
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found[name], untouched[name]), name

    ids = random_ids(300, 17)
    wanted = logits_of(family, SPECS[family].config, exact, ids)
    assert difference(logits(model, ids)[0], wanted) <= TOLERANCE
    assert difference(logits(load(tmp_path / "merged"), ids)[0], wanted) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_side_files_are_copied_byte_for_byte_and_never_run(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(family, own_code=True)
    for module in ("modeling", "configuration", "tokenization"):
        (base / f"{module}_own.py").write_bytes(CODE)
    adapted(base, tmp_path / "adapter")
    merge_to(base, tmp_path / "adapter", tmp_path / "merged")
    for file in base.iterdir():
        if not file.name.startswith("model"):
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes(), file.name
    assert (tmp_path / "merged/modeling_own.py").read_bytes() == CODE


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_NATIVE_FORM])
def test_the_native_layout_loads_with_plain_auto_classes(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = checkpoint(family)
    adapted(base, tmp_path / "adapter")
    merge_to(base, tmp_path / "adapter", tmp_path / "native", layout="native")
    config = json.loads((tmp_path / "native/config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "native", dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids(300, 17)
    exact = merged_by_hand(family, tmp_path / "adapter")
    wanted = logits_of(family, SPECS[family].config, exact, ids)
    assert difference(logits(model.eval(), ids)[0], wanted) <= TOLERANCE


@pytest.mark.parametrize("family", WITHOUT_NATIVE_FORM)
def test_alibi_has_no_native_layout(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint(family)
    adapted(base, tmp_path / "adapter")
    with pytest.raises(RecipeError, match="no native layout"):
        merge_to(base, tmp_path / "adapter", tmp_path / "native", layout="native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    "family", ["internlm_7b", "baichuan_7b", "baichuan2_13b", "chatglm3", "qwen_aug", "yi_first"]
)
def test_adapters_of_the_original_network_are_read(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """An adapter of 2023 names the fused layers (`W_pack`, `c_attn`, `w1` ...)."""
    base, folder = checkpoint(family), tmp_path / "adapter"
    exact = {name: w.double() for name, w in weights_of(family).items()}
    linear = [
        name.removesuffix(".weight")
        for name, w in exact.items()
        if w.dim() == 2 and not name.endswith((*HEADS, "embed_tokens.weight", "wte.weight"))
        and "embedding" not in name
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for name in linear:
        rows, columns = exact[f"{name}.weight"].shape
        a = torch.randn(LORA.r, columns, generator=generator) * 0.2
        b = torch.randn(rows, LORA.r, generator=generator) * 0.05
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        exact[f"{name}.weight"] += LORA.alpha / LORA.r * (b.double() @ a.double())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA.r, "lora_alpha": LORA.alpha,
        "lora_dropout": 0.1, "bias": "none", "base_model_name_or_path": str(base),
        "target_modules": sorted({name.rpartition(".")[2] for name in linear}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    ids = random_ids(300, 17)
    wanted = logits_of(family, SPECS[family].config, exact, ids)
    assert difference(logits(load_adapter(load(base), folder), ids)[0], wanted) <= TOLERANCE
    merge_to(base, folder, tmp_path / "merged")
    for name, tensor in read_folder(tmp_path / "merged").items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-6, atol=1e-7)
