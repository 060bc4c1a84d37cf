"""GGUF: a model's native tensors in, one after another, a file for llama.cpp and Ollama out.

The file's table of tensors comes before them, so their shapes are asked first. Norms and biases
stay float32, as llama.cpp wants them; rows without whole blocks of a type take a wider one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing import hf_files
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.exporting import gguf_vocabulary, modelfile, quantizer
from raytune_ft.exporting.gguf_network import Network
from raytune_ft.model.updates import row_blocks

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""What is written without another tool -> gguf's name of the type."""

Tensors = Callable[[], Iterator[tuple[str, torch.Tensor]]]
Shapes = Callable[[], Iterator[tuple[str, torch.Size]]]


@dataclass(frozen=True)
class Model:
    """What is written."""

    name: str
    base: Path
    """Folder of the base model."""
    network: Network
    shapes: Shapes
    """Names and shapes of the native tensors, in the order of `tensors`."""
    tensors: Tensors
    tokenizer: TextTokenizer
    template: str
    """Value of `model.template`."""


def write(model: Model, file: Path, kind: str) -> int:
    """Write a GGUF file; return its number of tensors.

    Args:
        model: what is written.
        file: target.
        kind: a key of `TYPES`, or of `quantizer.PACKAGED` where the package is there.

    Raises:
        ModelError: a GGUF file has no place for this network or tokenizer.
    """
    import gguf

    names = model.network.names()
    own = list(model.network.own_tensors())
    shapes = {name: tensor.shape for name, tensor in own}
    shapes |= {names(name): shape for name, shape in model.shapes()}
    rows = int(shapes["token_embd.weight"][0])
    types = _types(shapes, kind, int(model.network.config.num_hidden_layers))
    vocabulary = gguf_vocabulary.read(model.tokenizer, model.base, rows)
    writer = gguf.GGUFWriter(file, model.network.architecture)
    try:
        writer.add_name(model.name)
        writer.add_file_type(_file_type(kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        model.network.write_fields(writer, rows)
        vocabulary.write_fields(writer)
        _write_special(writer, model)
        for name, shape in shapes.items():
            _announce(writer, name, shape, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in own:
            writer.write_tensor_data(_packed(tensor, types[name]))
        for name, tensor in model.tensors():
            arranged = model.network.arranged(name, tensor)
            writer.write_tensor_data(_packed(arranged, types[names(name)]))
    finally:
        writer.close()
    return len(shapes)


def _write_special(writer: Any, model: Model) -> None:
    tokenizer, template = model.tokenizer, get_template(model.template, model.tokenizer)
    if tokenizer.bos_ids:
        writer.add_bos_token_id(tokenizer.bos_ids[0])
    writer.add_add_bos_token(bool(modelfile.first_text(template, tokenizer)))
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_eos_token(False)
    for key in ("pad", "unk"):
        id_ = tokenizer.token_id(tokenizer.named_tokens.get(f"{key}_token", ""))
        if id_ is not None:
            getattr(writer, f"add_{key}_token_id")(id_)
    ends = sorted(template.stop_ids - {tokenizer.eos_id})
    if ends:
        writer.add_eot_token_id(ends[0])
    text = hf_files.chat_template(model.template, tokenizer)
    if text is not None:
        writer.add_chat_template(text)


def _types(shapes: dict[str, torch.Size], kind: str, n_layers: int) -> dict[str, Any]:
    """Return gguf's type of each tensor in a file of a kind."""
    import gguf

    types = gguf.GGMLQuantizationType
    tied = "output.weight" not in shapes
    found = {}
    for name, shape in shapes.items():
        wanted = types.F32
        if len(shape) > 1 and not name.endswith("_norm.weight"):
            wanted = types[
                TYPES[kind] if kind in TYPES else quantizer.type_of(name, kind, n_layers, tied=tied)
            ]
            if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
                wanted = types[quantizer.SMALLER_BLOCKS.get(wanted.name, "F16")]
            if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
                wanted = types.F16
        found[name] = wanted
    return found


def _file_type(kind: str) -> Any:
    import gguf

    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return gguf.LlamaFileType[name]


def _announce(writer: Any, name: str, shape: torch.Size, kind: Any) -> None:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape))
    writer.add_tensor_info(name, list(shape), np.dtype(np.float32), count // block * size, kind)


def _packed(tensor: torch.Tensor, kind: Any) -> npt.NDArray[Any]:
    """Return a tensor's bytes in the file; only some of its rows are float32 at a time."""
    from gguf import quants

    parts = []
    for rows in row_blocks(tensor):
        part = tensor[rows].float().numpy()
        if kind.name in quantizer.SMALLER_BLOCKS:
            parts.append(quantizer.packed(part, kind.name))
        else:
            parts.append(np.ascontiguousarray(quants.quantize(part, kind)))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
