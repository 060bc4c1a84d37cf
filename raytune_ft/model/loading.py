"""Loading: a name or folder in, a frozen language model out. No remote code, nothing printed."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from raytune_ft.config.estimates.setting import EMBEDDING, HEAD
from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import MemoryPlanError, ModelError
from raytune_ft.model import default_model, hub, nf4_store
from raytune_ft.model.families import Family, detect, translate
from raytune_ft.model.silence import quiet
from raytune_ft.model.tensors import load_pickled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LFS_POINTER = b"version https://git-lfs"
LFS_POINTER_BYTES = 1024
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, UnpicklingError)

Log = Callable[[str], None]


def prepare_folder(path: str, log: Log = lambda _line: None) -> Path:
    """Return the folder of a model, checked; make or fetch it where `path` is a name.

    Args:
        path: a folder, `smollm2-135m-instruct`, or a hub name such as `org/model`.
        log: gets a line before anything that takes long.

    Raises:
        ModelError: one line: no such folder, files missing, or the name cannot be fetched.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ModelError(f"{path}: is a file; model.path is the folder with config.json")
    if not folder.exists():
        if path == default_model.NAME:
            folder = default_model.ensure(log)
        elif HUB_NAME.fullmatch(path):
            folder = hub.snapshot(path, log)
        else:
            raise ModelError(
                f"{path}: no such folder; model.path is a folder, a hub name such as org/model, "
                f"or {default_model.NAME}"
            )
    translate(read_config(folder), str(folder / "config.json"))
    weight_files(folder)
    return folder.resolve()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's config.json; ModelError if it has none."""
    file = folder / "config.json"
    if not file.is_file():
        hint = "; give its base model's folder" if (folder / "adapter_config.json").exists() else ""
        raise ModelError(f"{folder}: no config.json, so this is not the folder of a model{hint}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds no JSON object; copy the file again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return a model folder's weight files in order, safetensors before pickled tensors.

    Raises:
        ModelError: there are none, one is missing, or git fetched pointers instead of them.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        elif (folder / f"{stem}.{suffix}").is_file():
            names = [f"{stem}.{suffix}"]
        else:
            continue
        return [_checked(folder / Path(name).name) for name in names]
    raise ModelError(
        f"{folder}: no weights; model.safetensors or model.safetensors.index.json is needed"
    )


def compute_dtype(section: ModelSection, device: torch.device) -> torch.dtype:
    """Return the type in which the model computes; see ModelSection.dtype."""
    if section.dtype != "auto":
        dtype: torch.dtype = getattr(torch, section.dtype)
        return dtype
    # bfloat16 without hardware for it is 20 times slower than float32
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if capable else torch.float32


def load_model(
    folder: Path,
    section: ModelSection,
    device: torch.device,
    *,
    head_trained: bool = False,
    hosted: tuple[str, ...] = (),
) -> PreTrainedModel:
    """Load a model folder onto a device, frozen, quantised as `section` asks.

    Args:
        folder: config.json and weights, in any family's original layout.
        section: `dtype`, `quantization` and `double_quant` count.
        device: where the weights go.
        head_trained: the output head will be trained, or has an adapter: Baichuan2's then keeps
            dividing by its rows' lengths in the forward pass instead of being divided once.
        hosted: tables that never come to the device, by the names of `setting.LADDER`.

    Raises:
        ModelError: files and network do not fit each other tensor by tensor.
        MemoryPlanError: the weights do not fit into the device's memory.
    """
    config_json, where = read_config(folder), str(folder / "config.json")
    family = detect(config_json, where)
    dtype = compute_dtype(section, device)
    section = section.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    files = weight_files(folder)
    if family.normalised_head:  # it is divided where it computes
        hosted = tuple(name for name in hosted if name != HEAD)
    kept = nf4_store.Kept.of(folder, files, section, device)
    model = None
    if kept is not None:
        model = _from_store(kept, family, config_json, section, device, hosted)
    if model is None:
        config = translate(config_json, where)
        places = _places(family.network(config), config, device, hosted)
        quantization = _quantization(section, device, parted=len(places) > 1)
        model = _read(folder, files, family, config, places, dtype, quantization)
        if kept is not None:
            kept.write(model)
    gc.collect()  # the loader leaves a copy of the weights in reference cycles
    model.requires_grad_(False)
    if family.normalised_head and not head_trained:
        model.lm_head.fold()
    if section.quantization == "nf4":
        from raytune_ft.model.nf4 import mend_cpu_layers  # bitsandbytes takes seconds to import

        mend_cpu_layers(model)
    return model


def _from_store(
    kept: nf4_store.Kept,
    family: Family,
    config_json: Mapping[str, Any],
    section: ModelSection,
    device: torch.device,
    hosted: tuple[str, ...],
) -> PreTrainedModel | None:
    """Load quantised weights that an earlier start kept; None if there are none to be used."""
    place = kept.find()
    if place is None:
        return None
    config = translate(config_json, str(place))
    places = _places(family.network(config), config, device, hosted)
    quantization = _quantization(section, device, parted=len(places) > 1)
    config.quantization_config = quantization.to_dict()
    try:
        dtype = compute_dtype(section, device)
        model = _read(place, weight_files(place), family, config, places, dtype)
    except ModelError as error:
        kept.discard(str(error).removeprefix(f"{place}: "))
        return None
    model.name_or_path = model.config.name_or_path = str(kept.source)
    return model


def _read(
    folder: Path,
    files: list[Path],
    family: Family,
    config: Any,
    places: Mapping[str, torch.device],
    dtype: torch.dtype,
    quantization: Any = None,
) -> PreTrainedModel:
    """Have transformers read a folder's weights, and see that none is missing or too many."""
    network = family.network(config)
    with quiet(), _without_hooks():
        try:
            model, info = network.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa" if network._supports_sdpa else "eager",
                quantization_config=quantization,
                device_map=dict(places),
                output_loading_info=True,
                local_files_only=True,
            )
        except torch.OutOfMemoryError:
            raise MemoryPlanError(
                f"{folder}: the weights do not fit on {places['']}; set model.quantization: nf4"
            ) from None
        except (*UNREADABLE, SafetensorError) as error:
            _name_refused(files)
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{folder}: cannot be loaded ({reason})") from error
    _check_keys(folder, family, info)
    loaded: PreTrainedModel = model
    return loaded


def _places(
    network: Any, config: Any, device: torch.device, hosted: tuple[str, ...]
) -> dict[str, torch.device]:
    """Return where modules go, by the beginnings of their names."""
    places = {"": device}
    if not hosted or device.type == "cpu":
        return places
    with torch.device("meta"), quiet():
        model = network(config)
    tables = {EMBEDDING: model.get_input_embeddings(), HEAD: model.get_output_embeddings()}
    if config.get_text_config().tie_word_embeddings and HEAD not in hosted:
        return places
    chosen = [table for name, table in tables.items() if name in hosted]
    names = [name for name, module in model.named_modules() if module in chosen]
    return {**places, **dict.fromkeys(names, torch.device("cpu"))}


@contextmanager
def _without_hooks() -> Iterator[None]:
    """Keep transformers from bringing what lies on the host to the device at each use."""
    from transformers import modeling_utils

    found = modeling_utils.accelerate_dispatch
    modeling_utils.accelerate_dispatch = lambda *_, **__: None
    try:
        yield
    finally:
        modeling_utils.accelerate_dispatch = found


def _quantization(section: ModelSection, device: torch.device, *, parted: bool = False) -> Any:
    from transformers import BitsAndBytesConfig

    if section.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=section.double_quant,
            bnb_4bit_compute_dtype=compute_dtype(section, device),
            llm_int8_enable_fp32_cpu_offload=parted,  # else it refuses tables on the host
        )
    return BitsAndBytesConfig(load_in_8bit=True) if section.quantization == "int8" else None


def _check_keys(folder: Path, family: Family, info: Mapping[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(n[0] if isinstance(n, tuple) else n) for n in info.get(kind) or ())
        wrong = [name for name in names if not family.is_spare(name)]
        if wrong:
            what = kind.removesuffix("_keys")
            raise ModelError(
                f"{folder}: {len(wrong)} {what} tensors, first '{wrong[0]}'; "
                "config.json and weights belong to different models, or a file is incomplete"
            )


def _name_refused(files: list[Path]) -> None:
    """Raise a ModelError that names the first file of pickled tensors that is not one."""
    for file in files:
        if file.suffix != ".safetensors":
            load_pickled(file)


def _checked(file: Path) -> Path:
    if not file.is_file():
        raise ModelError(f"{file}: missing; the index beside it names it; copy it from the source")
    if file.stat().st_size < LFS_POINTER_BYTES:
        with file.open("rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(
                    f"{file}: a git-lfs pointer instead of the weights; run 'git lfs pull' there"
                )
    return file
