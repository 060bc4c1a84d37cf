"""Original layout in, original layout out: bit by bit, merged exactly, native on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import RecipeError
from raytune_ft.model.adapter import attach, save_adapter
from raytune_ft.model.merge import merge_to
from raytune_ft.model.side_files import save_full
from tests.families.checkpoints import SPECS, Weights, weights_of
from tests.families.conftest import Checkpoint
from tests.families.loaded import TOLERANCE, difference, load, logits, random_ids
from tests.families.mapping import place_of
from tests.families.oracles import logits_of

pytestmark = pytest.mark.families

FAMILIES = tuple(SPECS)
WITHOUT_NATIVE_FORM = ("baichuan_13b", "baichuan2_13b")
LORA = LoraSection(r=4, alpha=8, dropout=0.0)
CODE = b"raise SystemExit('code of a model folder ran')\n"


def read_folder(folder: Path) -> Weights:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def without_buffers(weights: Weights) -> Weights:
    return {name: w for name, w in weights.items() if not name.endswith("inv_freq")}


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
