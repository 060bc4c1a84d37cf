"""The chat endpoint as a Ray Serve application, and the program that runs it on this machine.

`build` is the application of `serve/chat.yaml` (`serve deploy`, `serve run`); `serve` starts Ray
here, deploys it and waits.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raytune_ft.chat.source import ChatSource, find_source
from raytune_ft.errors import ServeError
from raytune_ft.serving.guard import GuardRules, hash_key, is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

KEY_VARIABLE = "RAYTUNE_API_KEY"
APP_NAME = "raytune_ft"
MAX_ONGOING = 512
"""Requests that Ray lets through to the replica, which answers 429 long before."""


class ServeArgs(BaseModel):
    """Arguments of the application, in `serve/chat.yaml` under `args`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)
    """Run folder, adapter, model folder, or `smollm2-135m-instruct`; on the replica's machine."""
    bits: int | None = None
    """4, 8, 16 or 32; null: the precision that training saw."""
    hosts: list[str] = []
    """Host names, beside localhost, under which the endpoint is reached."""
    max_waiting: int = Field(default=16, ge=0, le=400)
    """Requests that wait at most; more are answered 429."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the replica; null: all cores that it may use."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of the replica; null: one if the cluster has one."""


class ChatEndpoint:
    """The replica: one model, one engine, one HTTP application."""

    def __init__(self, args: dict[str, Any], key_hash: str | None) -> None:
        import torch

        from raytune_ft.chat.model import open_chat
        from raytune_ft.serving.engine import EmbeddedEngine

        wanted = ServeArgs.model_validate(args)
        # Ray sets OMP_NUM_THREADS=1 for an actor with one CPU: a tenth of the speed
        torch.set_num_threads(wanted.threads or len(os.sched_getaffinity(0)))
        self._rules = GuardRules(frozenset(h.lower() for h in wanted.hosts), key_hash)
        self._engine = EmbeddedEngine(open_chat(wanted.path, wanted.bits), wanted.max_waiting)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the HTTP application; Ray calls this once, after the constructor."""
        from raytune_ft.serving.api import build_api

        return build_api(self._engine, self._rules)

    def check_health(self) -> None:
        """Let Ray replace a replica that no longer answers."""
        if not self._engine.healthy():
            raise ServeError("the generating thread has ended")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def build(args: dict[str, Any]) -> Application:
    """Build the application for `serve deploy`; the API key comes from RAYTUNE_API_KEY.

    Raises:
        ServeError: an argument is unknown or out of bounds.
    """
    import ray
    from ray import serve as ray_serve

    wanted = _checked(args)
    gpus = wanted.gpus
    if gpus is None:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
    key = os.environ.get(KEY_VARIABLE)
    deployment = ray_serve.deployment(
        ray_serve.ingress()(ChatEndpoint),
        name="ChatEndpoint",
        max_ongoing_requests=MAX_ONGOING,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment.bind(wanted.model_dump(), hash_key(key) if key else None)


def serve(path: str, *, host: str = "127.0.0.1", port: int = 8000, bits: int | None = None) -> int:
    """Serve the model at `path` on this machine until Ctrl-C or SIGTERM; return the exit code.

    Args:
        path: a run folder, adapter, model folder, or `smollm2-135m-instruct`.
        host: address to listen on; others than loopback need RAYTUNE_API_KEY.
        port: TCP port.
        bits: 4, 8, 16 or 32; none: the precision that training saw.

    Raises:
        CheckpointError, ModelError, RecipeError: the path cannot be used; before Ray starts.
        ServeError: host or port cannot be used, or the model does not load.
    """
    source = find_source(path, bits)
    _check_host(host)
    _check_port(host, port)
    _prepare(source)
    place = Path(path).expanduser()
    args = ServeArgs(
        path=str(place.resolve()) if place.is_dir() else path,
        bits=bits,
        hosts=[] if is_loopback(host) else [host],
    )
    try:
        _start(args, host, port)
        with _stop_signal() as stopped:
            print(_greeting(source.name, host, port), flush=True)
            stopped.wait()
    finally:
        _shut_down()
    return 0


def _checked(args: dict[str, Any]) -> ServeArgs:
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ServeError(f"args.{key}: {first['msg']}; see serve/chat.yaml") from None


def _check_host(host: str) -> None:
    if not is_loopback(host) and not os.environ.get(KEY_VARIABLE):
        raise ServeError(
            f"--host {host}: others could use the model; set {KEY_VARIABLE} to a key that they "
            "must send, or keep 127.0.0.1"
        )


def _check_port(host: str, port: int) -> None:
    """Fail before Ray starts rather than after 20 seconds."""
    if not 1 <= port <= 65535:
        raise ServeError(f"--port {port}: not a port; use 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"{host}:{port}: cannot listen there ({error.strerror or error}); try another "
                f"--port, such as {port + 1}"
            ) from None


def _prepare(source: ChatSource) -> None:
    """Make or fetch a base that is only a name here, where the user sees how long it takes."""
    if not Path(source.base).is_dir():
        from raytune_ft.model.loading import prepare_folder

        prepare_folder(source.base, lambda line: print(line, file=sys.stderr, flush=True))


def _start(args: ServeArgs, host: str, port: int) -> None:
    import ray
    from ray import serve as ray_serve

    print("starting Ray and loading the model (about 20 seconds) ...", file=sys.stderr, flush=True)
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    for logger in ("ray", "ray.serve", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    quiet = {"enable_access_log": False, "log_level": "ERROR"}
    ray_serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        ray_serve.run(
            build(args.model_dump()), name=APP_NAME, route_prefix="/", logging_config=quiet
        )
    except RuntimeError as error:
        raise ServeError(_cause(args.path, _deploy_message() or str(error))) from None


def _deploy_message() -> str:
    from ray import serve as ray_serve

    status = ray_serve.status().applications.get(APP_NAME)
    deployments = status.deployments.values() if status else ()
    return "\n".join(deployment.message for deployment in deployments)


def _cause(path: str, message: str) -> str:
    """Return the line of a replica's traceback that says what went wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("raytune_ft.errors.")]
    errors = ours or [line for line in lines if "Error: " in line] or lines or ["no reason given"]
    reason = errors[-1].removeprefix("raytune_ft.errors.")
    return f"{path}: the endpoint did not start: {reason.removeprefix(f'ModelError: {path}: ')}"


def _shut_down() -> None:
    import ray
    from ray import serve as ray_serve

    if ray.is_initialized():
        # not serve.shutdown(): it kills its controller with a line of alarm on the screen
        ray_serve.delete(APP_NAME)
        ray.shutdown()


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event; after ray.init, which sets its own handlers."""
    event = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: event.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _greeting(name: str, host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "127.0.0.1") else host  # noqa: S104
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if os.environ.get(KEY_VARIABLE) else ""
    question = {"model": name, "messages": [{"role": "user", "content": "Who are you?"}]}
    return (
        f"{name} answers at {url}\n"
        f"  chat page:  {url}/\n"
        f"  from code:  base_url {url}/v1, model {name} (see serve/client_example.py)\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(question))}\n"
        "Ctrl-C stops it."
    )
