"""Targets: a run in, its model in another tool's format out.

`gguf-TYPE` for llama.cpp and Ollama, `fp8` and `int8` for vLLM. What needs a calibration set and
its own versions of torch and transformers is named with the command that makes it elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raytune_ft.errors import RecipeError
from raytune_ft.exporting import compressed, gguf_file, modelfile, quantizer
from raytune_ft.exporting.beside import tokenizer_of
from raytune_ft.exporting.gguf_network import Network
from raytune_ft.model.loading import read_config
from raytune_ft.model.merge import Merge, check_layout
from raytune_ft.model.side_files import write_native_files
from raytune_ft.model.tensors import ShardWriter
from raytune_ft.training.run_folder import RunFolder

SAFETENSORS = "safetensors"
GGUF = "gguf-"
EIGHT_BITS = ("fp8", "int8")
ELSEWHERE = ("awq", "gptq", "w4a16", "nvfp4")
"""Schemes of llm-compressor that look at a calibration set."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A format that can be written here."""

    name: str

    @property
    def gguf(self) -> str | None:
        """The type of a GGUF file; None for other formats."""
        return self.name.removeprefix(GGUF) if self.name.startswith(GGUF) else None

    @property
    def room(self) -> int:
        """How many times the base's bytes it needs on the disk, at most."""
        return 2 if self.gguf == "f32" or self.gguf in quantizer.BY_PROGRAM else 1

    @classmethod
    def of(cls, name: str) -> Target:
        """Read `--format`.

        Raises:
            RecipeError: there is no such format, it is made elsewhere, or its maker is missing.
        """
        known = [SAFETENSORS, *EIGHT_BITS]
        made = (*quantizer.PACKAGED, *quantizer.BY_PROGRAM)
        known += [f"{GGUF}{kind}" for kind in (*gguf_file.TYPES, *made)]
        if name in ELSEWHERE:
            raise RecipeError(
                f"--format {name}: needs a calibration set, by llm-compressor, whose versions of "
                "transformers are not ours; merge, and run it on the merged folder in an "
                "environment of its own (docs/export.md), or take fp8 or int8"
            )
        if name not in known:
            raise RecipeError(f"--format: no format '{name}'; choose: {', '.join(known)}")
        target = cls(name)
        if target.gguf in made:
            quantizer.check_there(str(target.gguf))
        return target


def write(
    target: Target, run: RunFolder, merge: Merge, place: Path, max_bytes: int, tell: Tell
) -> None:
    """Write a merged model into an empty folder, in a format that is not plain safetensors.

    Raises:
        ModelError: the format has no place for the network or its tokenizer.
    """
    if target.gguf is not None:
        _write_gguf(target.gguf, run, merge, place, tell)
    else:
        _write_compressed(target.name, merge, place, max_bytes)


def check(target: Target, run: RunFolder, merge: Merge) -> None:
    """Refuse before anything is written what the format has no place for."""
    if target.name != SAFETENSORS:
        check_layout(merge.original, "native")
    if target.gguf is not None:
        _gguf_model(run, merge)


def _gguf_model(run: RunFolder, merge: Merge) -> gguf_file.Model:
    original, info = merge.original, run.info()
    return gguf_file.Model(
        info.get("name", run.path.name),
        original.folder,
        Network(original.config, str(original.folder)),
        lambda: merge.shapes("native"),
        lambda: merge.tensors("native"),
        tokenizer_of(run),
        info["template"],
    )


def _write_gguf(kind: str, run: RunFolder, merge: Merge, place: Path, tell: Tell) -> None:
    model = _gguf_model(run, merge)
    name = f"{model.name}-{kind}.gguf"
    if kind in gguf_file.TYPES or (kind in quantizer.PACKAGED and quantizer.has_package()):
        gguf_file.write(model, place / name, kind)
    else:
        between = place / f"{model.name}-f16.gguf"
        gguf_file.write(model, between, "f16")
        quantizer.by_program(between, place / name, kind)
        between.unlink()
    text, own = modelfile.write(name, model.template, run.info()["system"], model.tokenizer)
    (place / "Modelfile").write_text(text, encoding="utf-8")
    if not own:
        tell(
            f"Modelfile: template '{model.template}' is more than text around messages; Ollama "
            "takes the one in the GGUF file"
        )
    tell(f"next: ollama create {model.name} -f Modelfile, in that folder")


def _write_compressed(kind: str, merge: Merge, place: Path, max_bytes: int) -> None:
    writer = ShardWriter(place, max_bytes)
    linear = merge.original.linear_names() - {merge.original.head}
    for name, tensor in compressed.tensors(merge.tensors("native"), linear, kind):
        writer.add(name, tensor)
    writer.close()
    write_native_files(merge.original, place, untied=merge.untie, rows=merge.rows)
    head = merge.original.head.removesuffix(".weight")
    config = read_config(place) | {"quantization_config": compressed.config_of(kind, head)}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (place / "config.json").write_text(text + "\n", encoding="utf-8")
