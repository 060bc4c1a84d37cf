"""K-quants: made by llama.cpp's own code, out of a package of PyPI or by its program on PATH.

gguf's Python has none to write. The wheel of `xllamacpp` (the extra `gguf`) brings ggml, whose
`ggml_quantize_chunk` takes rows as they come. Types that it is not asked for, and all of them
where it is not installed, are made by `llama-quantize` out of a float16 file.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raytune_ft.errors import RecipeError

PROGRAM = "llama-quantize"
PACKAGE = "xllamacpp"
LIBRARY = "xllamacpp.abi3.so"
PACKAGED = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}
"""What the package is asked for -> gguf's name of most of its tensors' type."""
BY_PROGRAM = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_k_s", "q5_0", "q5_k_s", "iq4_nl", "iq4_xs",
)  # fmt: skip
FINER = "Q6_K"
SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are no multiple of 256: what llama.cpp takes then."""
LAYER = re.compile(r"blk\.(\d+)\.")


def check_there(kind: str) -> None:
    """Refuse a type whose maker is not installed; RecipeError says how to get one."""
    if shutil.which(PROGRAM) is not None or (kind in PACKAGED and has_package()):
        return
    package = "pip install 'raytune_ft[gguf]' or " if kind in PACKAGED else ""
    raise RecipeError(
        f"--format gguf-{kind}: made by llama.cpp, of which there is nothing here; {package}put "
        f"its {PROGRAM} on PATH, or take gguf-q8_0"
    )


def has_package() -> bool:
    """Tell whether ggml can be asked."""
    return find_spec(PACKAGE) is not None


def type_of(name: str, kind: str, n_layers: int, *, tied: bool) -> str:
    """Return gguf's name of a matrix's type: llama.cpp's mixture of that name.

    Source: llama.cpp's src/llama-quant.cpp, `llama_tensor_get_type`: the head, and values and the
    last layer of the MLP in every third layer and in the outer eighths, get six bits.

    Args:
        name: in the GGUF file.
        kind: a key of `PACKAGED`.
        n_layers: of the network.
        tied: the embedding is the head.
    """
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return FINER
    layer = LAYER.match(name)
    part = name.split(".")[-2]
    if kind.endswith("_m") and layer and part in ("attn_v", "ffn_down"):
        number, eighth = int(layer[1]), n_layers // 8
        inner = eighth <= number < 7 * n_layers // 8
        return FINER if not inner or (number - eighth) % 3 == 2 else PACKAGED[kind]
    return PACKAGED[kind]


def packed(rows: npt.NDArray[np.float32], kind: str) -> npt.NDArray[np.uint8]:
    """Return rows (n, width) in blocks of a type of `PACKAGED`, uint8 (n, bytes)."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    source = np.ascontiguousarray(rows, dtype=np.float32)
    out = np.empty((len(source), source.shape[1] // block * size), np.uint8)
    written = _ggml().ggml_quantize_chunk(
        int(number), source.ctypes.data, out.ctypes.data, 0, len(source), source.shape[1], None
    )
    if written != out.nbytes:
        raise RecipeError(f"{PACKAGE}: ggml wrote {written} bytes where {out.nbytes} were due")
    return out


@functools.cache
def _ggml() -> Any:
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise RecipeError(f"{PACKAGE} is not installed; pip install 'raytune_ft[gguf]'")
    library = ctypes.CDLL(str(Path(found.origin).with_name(LIBRARY)))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, pointer, pointer, number, number, number, pointer,
    ]  # fmt: skip
    return library


def by_program(source: Path, target: Path, kind: str) -> None:
    """Write `target`, a GGUF file in another type, from `source`.

    Raises:
        RecipeError: the program failed; says what it said last.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        check_there(kind)
    done = subprocess.run(  # noqa: S603  fixed arguments, no shell
        [str(program), str(source), str(target), kind.upper()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0 or not target.is_file():
        said = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise RecipeError(
            f"--format gguf-{kind}: {PROGRAM} failed ({said or done.returncode}); take gguf-q8_0"
        )
