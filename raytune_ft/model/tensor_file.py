"""Tensor files: the bytes of a safetensors file, one tensor at a time, without a second copy.

The layout is safetensors' own (https://github.com/huggingface/safetensors#format): a header's
length in 8 bytes, the header in JSON, then the tensors end to end, wide types first so that each
is aligned. The library writes by itself, past Python, where a test cannot stop it; it reads these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8
"""Bytes; what the first tensor's place is a multiple of."""


def blocks_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the file in blocks: its head, then a block for each tensor, on the host by then."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    yield _head({name: tensors[name] for name in order})
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data


def size_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of the tensors, without the head."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _head(tensors: Mapping[str, torch.Tensor]) -> bytes:
    header: dict[str, object] = {}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + size_of({name: tensor})
        shape, offsets = list(tensor.shape), [begin, end]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
