"""Eight bits: the stored numbers are the weights to half a step, and other tools read them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from raytune_ft import export
from raytune_ft.exporting.compressed import LARGEST, quantized
from tests.exporting.conftest import Made, content_of


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["fp8", "int8"]), half=st.booleans())
def test_each_number_is_the_nearest_one(seed: int, kind: str, half: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 33, generator=generator) * 10.0 ** (seed % 7 - 3)
    weight[2] = 0
    weight = weight.bfloat16() if half else weight
    packed, scales = quantized(weight, kind)
    assert scales.shape == (5, 1)
    assert scales.dtype == weight.dtype
    found = packed.double() * scales.double()
    # float8 has three bits behind the first one; int8 has equal steps; scales are rounded too
    step = weight.double().abs() / 16 if kind == "fp8" else scales.double() / 2
    least = scales.double() * 2.0**-10 if kind == "fp8" else 0.0
    rounded = weight.double().abs().amax(1, keepdim=True) * (2.0**-8 if half else 2.0**-23)
    assert ((found - weight.double()).abs() <= step + least + rounded + 1e-300).all()
    assert (packed.double().abs() <= LARGEST[kind]).all()
    assert (found[2] == 0).all()


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_run_in_eight_bits(plain: Made, tmp_path: Path, kind: str) -> None:
    merged = export.merge(plain.words, str(tmp_path / "merged"))
    out = export.merge(plain.words, str(tmp_path / "small"), form=kind)
    full, small = (load_file(folder / "model.safetensors") for folder in (merged, out))
    config = content_of(out / "config.json")["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head"]
    scaled = {name.removesuffix("_scale") for name in small if name.endswith("_scale")}
    assert len(scaled) == 14
    for name, tensor in full.items():
        if name in scaled:
            packed, scales = quantized(tensor, kind)
            assert torch.equal(small[name].float(), packed.float()), name
            assert torch.equal(small[f"{name}_scale"], scales), name
        else:
            assert torch.equal(small[name], tensor), name
    assert {file.name for file in out.iterdir()} >= {
        "tokenizer.json", "generation_config.json", "README.md", "raytune_ft.json",
    }  # fmt: skip


class EightBits(torch.nn.Module):
    """A linear layer as the format means it: each token's activations go through eight bits."""

    def __init__(self, packed: torch.Tensor, scales: torch.Tensor, kind: str) -> None:
        super().__init__()
        self.weight, self.kind = packed.float() * scales, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        if self.kind == "fp8":
            scale = largest / 448
            seen = (x / scale).to(torch.float8_e4m3fn).float() * scale
        else:
            scale = largest / 127.5
            seen = (x / scale).round().clamp(-128, 127) * scale
        return torch.nn.functional.linear(seen, self.weight)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs compressed-tensors")
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_transformers_reads_it(plain: Made, tmp_path: Path, kind: str) -> None:
    """Its logits are those of layers written down here."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 60)[None]
    merged = export.merge(plain.words, str(tmp_path / "merged"))
    out = export.merge(plain.words, str(tmp_path / "small"), form=kind)
    stored = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        plain_logits = model(ids).logits
        for name in [key.removesuffix(".weight_scale") for key in stored if key.endswith("_scale")]:
            layer = EightBits(stored[f"{name}.weight"], stored[f"{name}.weight_scale"], kind)
            model.set_submodule(name, layer)
        wanted = model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    size = float(wanted.norm())
    assert float((plain_logits - wanted).norm()) / size > 0.01
    # roundings fall the other way where a float32 sum differs in its last bit
    assert float((found - wanted).norm()) / size < 0.01
