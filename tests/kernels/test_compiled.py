"""The programs in the machine code of a GPU: the interpreter forgives types that do not fit.

Triton compiles for a GPU that is not there. Shapes are those of a 7B model, numbers bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

BF16, FLOAT32 = "bf16", "fp32"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield


def _compiled(
    program: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    *,
    warps: int = 8,
    stages: int = 3,
) -> Any:
    """Compile for a Hopper; what is neither pointer nor constant is a number."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for

    signature, attributes = {}, {}
    for place, name in enumerate(program.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in {"eps", "offset", "sign", "cap", "scale", "growth"}:
            signature[name] = FLOAT32
        else:
            signature[name] = f"*{pointers[name]}" if name in pointers else "i32"
            if place not in {p.num for p in program.params if p.do_not_specialize}:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(program, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return compile_for(source, target=GPUTarget("cuda", 90, 32), options=options)


def _assert_reads_wide(found: Any, narrow_reads: int) -> None:
    """All but so many reads of a thread take 16 bytes at once."""
    reads = re.findall(r"ld\.global\S*", found.asm["ptx"])
    assert reads and len([read for read in reads if ".v4" not in read]) <= narrow_reads


@pytest.mark.parametrize("adds", [False, True])
def test_norm(adds: bool) -> None:
    from raytune_ft.kernels import norm_triton

    rows = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "total_ptr"), BF16)
    constants = {"ADDS": adds, "OFFSETS": not adds, "ROWS": 1, "BLOCK": 4096}
    found = _compiled(norm_triton._forward_kernel, {**rows, "scale_ptr": FLOAT32}, constants)
    _assert_reads_wide(found, 0)

    rows = dict.fromkeys(("dy_ptr", "x_ptr", "weight_ptr", "added_ptr", "dx_ptr"), BF16)
    rows |= {"scale_ptr": FLOAT32, "dweight_ptr": FLOAT32}
    found = _compiled(norm_triton._backward_kernel, rows, {**constants, "TRAINS": not adds})
    _assert_reads_wide(found, 1)


@pytest.mark.parametrize("adds", [False, True])
def test_layer_norm(adds: bool) -> None:
    from raytune_ft.kernels import layer_norm_triton

    names = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "total_ptr")
    numbers = {"mean_ptr": FLOAT32, "scale_ptr": FLOAT32}
    constants = {"SHIFTS": adds, "ROWS": 1, "BLOCK": 8192}
    pointers = dict.fromkeys(names, BF16) | numbers
    found = _compiled(layer_norm_triton._forward_kernel, pointers, constants)
    _assert_reads_wide(found, 0)

    names = ("dy_ptr", "total_ptr", "weight_ptr", "added_ptr", "dx_ptr")
    numbers |= {"dweight_ptr": FLOAT32, "dbias_ptr": FLOAT32}
    constants = {"ADDS": adds, "TRAINS": not adds, "ROWS": 1, "BLOCK": 8192}
    pointers = dict.fromkeys(names, BF16) | numbers
    found = _compiled(layer_norm_triton._backward_kernel, pointers, constants)
    _assert_reads_wide(found, 2)


@pytest.mark.parametrize("width", [128, 256])
def test_capped_attention(width: int) -> None:
    """Within the memory that a Hopper's processor shares among programs."""
    from raytune_ft.kernels import capped_attention_triton as capped

    names = ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    pointers = dict.fromkeys(names, BF16) | {"sums_ptr": FLOAT32, "pulls_ptr": FLOAT32}
    pointers |= {"first_ptr": "i32", "last_ptr": "i32"}
    few = 64 if width == 128 else 32
    for program, m in (
        (capped._forward, 64), (capped._backward_q, 64), (capped._backward_kv, few),
    ):  # fmt: skip
        constants = {"BLOCK_M": m, "BLOCK_N": few, "BLOCK_D": width}
        constants |= {"FAR": capped.FAR} if program is capped._forward else {}
        found = _compiled(program, pointers, constants)
        assert found.metadata.shared <= 128 << 10


@pytest.mark.parametrize("adapters", [1, 2, 3])
def test_dropout(adapters: int) -> None:
    """Masks cost instructions: products of 32 bits come whole, bits are made once for both uses."""
    from raytune_ft.kernels import dropout_triton

    tiles = dropout_triton.HOPPER[adapters]
    rows = dict.fromkeys(("x", "a", "gradient", "x_gradient"), BF16)
    rows |= {"out": FLOAT32, "seed": "i64"}
    constants = dropout_triton._constants(tiles) | {
        "STEPS": 32, "RANK": 64, "ADAPTERS": adapters, "WANTED": True, "ADDS": False,
        "BESIDE": tiles.beside,
    }  # fmt: skip
    del constants["num_warps"], constants["num_stages"]
    program = dropout_triton._project_backward
    found = _compiled(program, rows, constants, warps=tiles.warps, stages=tiles.stages)
    calls = adapters * tiles.rows * tiles.columns // 8 // (32 * tiles.warps)
    products = re.findall(r"mul\.(?:wide|hi)\.u32", found.asm["ptx"])
    # two for each of 7 rounds, less what rows and columns share
    assert 7 * calls < len(products) <= 14 * calls
    # programs have room beside each other: three of one adapter, else one
    assert found.metadata.shared <= (227 << 10) // (3 if adapters == 1 else 1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(interleaved: bool) -> None:
    from raytune_ft.kernels import rope_triton

    pointers = dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out", "k_out"), BF16)
    constants = {"INTERLEAVED": interleaved, "Q_HEADS": 32, "K_HEADS": 2, "HALF": 32, "REST": 64}
    found = _compiled(rope_triton._rope_kernel, pointers, constants)
    # angles, and two heads are too few to fill the threads
    _assert_reads_wide(found, 12)


@pytest.mark.parametrize("gelu", [False, True])
def test_gate(gelu: bool) -> None:
    from raytune_ft.kernels import swiglu_triton

    constants = {"GELU": gelu, "BLOCK": 2048}
    pointers = dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr"), BF16)
    _assert_reads_wide(_compiled(swiglu_triton._forward_kernel, pointers, constants), 0)

    pointers = dict.fromkeys(("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr"), BF16)
    _assert_reads_wide(_compiled(swiglu_triton._backward_kernel, pointers, constants), 0)


@pytest.mark.parametrize(("dtype", "caps"), [(BF16, False), (FLOAT32, False), (FLOAT32, True)])
def test_loss(dtype: str, caps: bool) -> None:
    from raytune_ft.kernels import cross_entropy_triton

    pointers = {"logits_ptr": dtype, "targets_ptr": "i64", "losses_ptr": FLOAT32}
    constants = {"words": 103168, "BLOCK": 4096, "CAPS": caps}
    found = _compiled(cross_entropy_triton._cross_entropy_kernel, pointers, constants)
    # the target and its logit
    _assert_reads_wide(found, 2)
