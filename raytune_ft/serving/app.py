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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft import host
from raytune_ft.chat.source import ChatSource, find_source
from raytune_ft.cluster import ray_session
from raytune_ft.errors import ServeError
from raytune_ft.serving.arguments import ServeArgs, checked
from raytune_ft.serving.front import CALLBACK, IMPORT_PATH, PROXY_CHECK, PROXY_CHECK_S
from raytune_ft.serving.guard import GuardRules, is_loopback
from raytune_ft.serving.keys import ApiKey, hash_key, read_keys
from raytune_ft.serving.options import ApiOptions

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from raytune_ft.serving.engine import ChatEngine

KEY_VARIABLE = "RAYTUNE_API_KEY"
APP_NAME = "raytune_ft"
MAX_ONGOING = 2048
"""Requests that Ray lets through to a replica, which answers 429 long before: Ray's own queue
would keep the rest waiting, or drop them with 503."""
SWITCH_S = 0.0005
"""For which one thread of a replica waits for another."""
GATHER_S = 5.0
"""For all replicas to tell their metrics."""
DRAIN_S = 5.0
"""For answers under way behind Ctrl-C, on this machine."""


class ChatEndpoint:
    """The replica: one engine, one HTTP application."""

    def __init__(
        self, args: dict[str, Any], key_hash: str | None, keys: Sequence[dict[str, Any]] = ()
    ) -> None:
        import torch
        from ray import serve as ray_serve

        from raytune_ft.serving.metrics import Metrics

        self._args = wanted = ServeArgs.model_validate(args)
        # the thread that computes hands the interpreter back at each operation of torch's, and
        # while another one has it waits this long for it: 5 ms unless said otherwise
        sys.setswitchinterval(SWITCH_S)
        # Ray sets OMP_NUM_THREADS=1 for an actor with one CPU: a tenth of the speed
        torch.set_num_threads(wanted.threads or host.cores())
        self._rules = GuardRules(
            hosts=frozenset(host.lower() for host in wanted.hosts),
            key_hash=key_hash,
            keys=tuple(ApiKey.model_validate(key) for key in keys),
            origins=frozenset(wanted.origins),
        )
        self._context = ray_serve.get_replica_context()
        self._engine = _open_engine(wanted)
        self._metrics = Metrics(self._engine, self._context.replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the HTTP application; Ray calls this once, after the constructor."""
        from raytune_ft.serving.api import build_api

        wanted = self._args
        options = ApiOptions(
            max_waiting=wanted.max_waiting,
            deadline_seconds=wanted.deadline_seconds,
            access_log=wanted.access_log,
            log_prompts=wanted.log_prompts,
        )
        gather = self._gather if wanted.several else None
        return build_api(self._engine, self._rules, options, metrics=self._metrics, gather=gather)

    def families(self) -> list[Any]:
        """Return this replica's metrics to the one that was asked for all."""
        return self._metrics.families()

    async def _gather(self) -> list[Any]:
        """Return the metrics of all replicas; of one that dies meanwhile, none."""
        from ray import serve as ray_serve

        handle = ray_serve.get_deployment_handle(self._context.deployment, self._context.app_name)
        answers = await handle.broadcast("families").results_async(
            timeout_s=GATHER_S, return_exceptions=True
        )
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def check_health(self) -> None:
        """Let Ray replace a replica that no longer answers."""
        if not self._engine.healthy():
            raise ServeError("the generating thread has ended")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def _open_engine(wanted: ServeArgs) -> ChatEngine:
    from raytune_ft.serving.engines import EngineOptions
    from raytune_ft.serving.engines import build as build_engine

    return build_engine(
        EngineOptions(
            path=wanted.path,
            bits=wanted.bits,
            engine=wanted.engine,
            max_waiting=wanted.max_waiting,
            slots=wanted.slots,
            kv_gib=wanted.kv_gib,
            adapters=wanted.adapters,
            max_adapters=wanted.max_adapters,
        )
    )


def build(args: dict[str, Any]) -> Application:
    """Build the application for `serve deploy`; the owner's key comes from RAYTUNE_API_KEY.

    Raises:
        ServeError: an argument is unknown or out of bounds, or the file of keys cannot be used.
    """
    from ray import serve as ray_serve

    wanted = checked(args)
    keys = read_keys(wanted.keys) if wanted.keys else ()
    gpus = _gpus(wanted)
    key = os.environ.get(KEY_VARIABLE)
    deployment = ray_serve.deployment(
        ray_serve.ingress()(ChatEndpoint),
        name="ChatEndpoint",
        **wanted.scale(),
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=-1,
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=wanted.drain_seconds,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": wanted.cpus, "num_gpus": gpus},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deployment.bind(
        wanted.model_dump(), hash_key(key) if key else None, [one.model_dump() for one in keys]
    )


def _gpus(wanted: ServeArgs) -> float:
    """Return the GPUs of a replica: one if the cluster has one, unless it is said."""
    if wanted.gpus is not None:
        return wanted.gpus
    import ray

    return float(min(1.0, ray.cluster_resources().get("GPU", 0.0)))


def serve(
    path: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    bits: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Serve the model at `path` on this machine until Ctrl-C or SIGTERM; return the exit code.

    Args:
        path: a run folder, adapter, model folder, or `smollm2-135m-instruct`.
        host: address to listen on; others than loopback need a key.
        port: TCP port.
        bits: 4, 8, 16 or 32; none: the precision that training saw.
        options: further ServeArgs, by name.

    Raises:
        CheckpointError, ModelError, RecipeError: the path cannot be used; before Ray starts.
        ServeError: host or port cannot be used, or the model does not load.
    """
    source = find_source(path, bits)
    args = _arguments(path, host, bits, dict(options or {}))
    _check_host(host, keys=bool(args.keys))
    _check_port(host, port)
    _prepare(source)
    with _ray():
        try:
            _start(args, host, port)
            with _stop_signal() as stopped:
                print(_greeting(source.name, host, port, keys=bool(args.keys)), flush=True)
                stopped.wait()
        finally:
            _shut_down()
    return 0


def _arguments(path: str, host: str, bits: int | None, options: dict[str, Any]) -> ServeArgs:
    """Return the application's arguments, with places as absolute paths: replicas run elsewhere."""
    if Path(path).expanduser().is_dir():
        path = str(Path(path).expanduser().resolve())
    for name in ("adapters", "keys", "access_log"):
        if options.get(name):
            options[name] = str(Path(options[name]).expanduser().resolve())
    hosts = [] if is_loopback(host) else [host]
    fixed = {"path": path, "bits": bits, "hosts": [*hosts, *options.pop("hosts", [])]}
    args = checked({"drain_seconds": DRAIN_S, **options, **fixed})
    if args.keys:
        read_keys(args.keys)
    return args


def _check_host(host: str, *, keys: bool) -> None:
    if is_loopback(host):
        return
    if not keys and not os.environ.get(KEY_VARIABLE):
        raise ServeError(
            f"--host {host}: others could use the model; set {KEY_VARIABLE} to a key that they "
            "must send, or name a file of keys, or keep 127.0.0.1"
        )
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise ServeError(
            f"--host {host}: RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} opens Ray itself to "
            "whoever reaches this machine; unset it, or keep 127.0.0.1"
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


@contextmanager
def _ray() -> Iterator[None]:
    """Start Ray on this machine as training does, with its token, without a dashboard."""
    if os.environ.get("RAY_ADDRESS"):
        raise ServeError(
            "RAY_ADDRESS is set, and raytune-ft serve starts a Ray of its own on this machine; "
            "unset it, or use `serve deploy serve/chat.yaml` on that cluster"
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault(CALLBACK, IMPORT_PATH)
    os.environ.setdefault(PROXY_CHECK, str(PROXY_CHECK_S))
    print("starting Ray and loading the model (about 20 seconds) ...", file=sys.stderr, flush=True)
    with ray_session():
        yield


def _check_replicas(args: ServeArgs) -> None:
    """Refuse more replicas than this machine has room for: Ray would wait for a larger one."""
    import ray

    there = ray.cluster_resources()
    for kind, each in (("CPU", args.cpus), ("GPU", _gpus(args))):
        if args.min_replicas * each > there.get(kind, 0.0):
            raise ServeError(
                f"--replicas {args.min_replicas}: each takes {each:g} {kind}, and this machine has "
                f"{there.get(kind, 0.0):g}; ask for fewer"
            )


def _start(args: ServeArgs, host: str, port: int) -> None:
    from ray import serve as ray_serve

    _check_replicas(args)
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


def _greeting(name: str, host: str, port: int, *, keys: bool) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "127.0.0.1") else host  # noqa: S104
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    asked = keys or os.environ.get(KEY_VARIABLE)
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if asked else ""
    question = {"model": name, "messages": [{"role": "user", "content": "Who are you?"}]}
    return (
        f"{name} answers at {url}\n"
        f"  chat page:  {url}/\n"
        f"  from code:  base_url {url}/v1, model {name} (see serve/client_example.py)\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(question))}\n"
        "Ctrl-C stops it."
    )
