"""Prometheus metrics of one replica, and those of all replicas as one text.

In: records of requests and the engine's load. Out: families of samples as plain lists, which Ray
carries from replica to replica, and the text that Prometheus reads.

prometheus_client with a label `replica`, rather than ray.util.metrics: a scrape then goes to the
endpoint's own port, behind its key, at any place where the endpoint runs. Ray's metrics come out
of an agent per node, at a port of its own that asks for no key. Whichever replica is asked gathers
what all of them have (`Gather`), so that no counter jumps back and forth between scrapes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.utils import floatToGoString

from raytune_ft.serving.engine import ChatEngine, Load
from raytune_ft.serving.record import Record

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
REQUEST_S = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)

Sample = tuple[str, dict[str, str], float]
Family = tuple[str, str, str, list[Sample]]
"""Name, kind, help and samples of a metric."""
Gather = Callable[[], Awaitable[list[list[Family]]]]
"""Returns the families of every replica."""


class Metrics:
    """Counts what one replica does."""

    def __init__(self, engine: ChatEngine, replica: str) -> None:
        self._engine, self._replica = engine, replica
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            "raytune_requests",
            "Requests that were answered or refused.",
            ("route", "method", "status", "model"),
            registry=registry,
        )
        self._seconds = Histogram(
            "raytune_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("route",),
            buckets=REQUEST_S,
            registry=registry,
        )
        tokens = ("model",)
        self._prompt = Counter(
            "raytune_prompt_tokens", "Tokens of prompts.", tokens, registry=registry
        )
        self._completion = Counter(
            "raytune_completion_tokens", "Tokens of answers.", tokens, registry=registry
        )
        self._first = Histogram(
            "raytune_first_token_seconds",
            "Seconds from a request to the first token of its answer.",
            tokens,
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self._between = Histogram(
            "raytune_between_tokens_seconds",
            "Seconds between two tokens of an answer.",
            tokens,
            buckets=BETWEEN_TOKENS_S,
            registry=registry,
        )
        self._open = Gauge("raytune_requests_open", "Requests under way.", registry=registry)
        self._add_load()

    def _add_load(self) -> None:
        """Read the engine's load when somebody asks."""
        read: dict[str, tuple[str, Callable[[Load], float]]] = {
            "running": ("Requests being answered.", lambda load: load.running),
            "waiting": ("Requests that wait to be answered.", lambda load: load.waiting),
            "slots": ("Requests that can be answered at a time.", lambda load: load.slots),
            "kv_used_ratio": (
                "Share of the memory for keys and values that is taken.",
                lambda load: load.kv_used,
            ),
        }
        for name, (text, value) in read.items():
            gauge = Gauge(f"raytune_{name}", text, registry=self._registry)
            gauge.set_function(partial(self._of_load, value))
        ready = Gauge("raytune_ready", "1 where requests are answered.", registry=self._registry)
        ready.set_function(lambda: float(self._engine.ready()))

    def _of_load(self, value: Callable[[Load], float]) -> float:
        return float(value(self._engine.load()))

    def begin(self) -> None:
        """Count a request that came."""
        self._open.inc()

    def end(self, record: Record) -> None:
        """Count a request that is over, whatever its end."""
        self._open.dec()
        model = record.model or ""
        self._requests.labels(record.route, record.method, str(record.status), model).inc()
        self._seconds.labels(record.route).observe(record.seconds)
        if record.model is None:
            return
        self._prompt.labels(model).inc(record.prompt_tokens)
        self._completion.labels(model).inc(record.completion_tokens)
        if record.first is not None:
            self._first.labels(model).observe(record.first)
        between = self._between.labels(model)
        for gap in record.gaps:
            between.observe(gap)

    def families(self) -> list[Family]:
        """Return this replica's metrics, each sample under the replica's name."""
        mine = {"replica": self._replica}
        cached = float(self._engine.load().cached_tokens)
        name, text = "raytune_prefix_cached_tokens", "Prompt tokens that were not computed again."
        of_prefixes: Family = (name, "counter", text, [(f"{name}_total", mine, cached)])
        counted: list[Family] = []
        for family in self._registry.collect():
            samples = [
                (sample.name, {**sample.labels, **mine}, float(sample.value))
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            counted.append((family.name, family.type, family.documentation, samples))
        return [*counted, of_prefixes]


def exposition(replicas: Iterable[list[Family]]) -> str:
    """Write the metrics of all replicas in Prometheus' text format, each family once."""
    merged: dict[str, tuple[str, str, list[Sample]]] = {}
    for families in replicas:
        for name, kind, text, samples in families:
            merged.setdefault(name, (kind, text, []))[2].extend(samples)
    lines: list[str] = []
    for name, (kind, text, samples) in merged.items():
        shown = f"{name}_total" if kind == "counter" else name
        lines += [f"# HELP {shown} {_escaped(text)}", f"# TYPE {shown} {kind}"]
        lines += [_line(*sample) for sample in samples]
    return "\n".join(lines) + "\n"


def _line(name: str, labels: dict[str, str], value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(text, quoted=True)}"' for key, text in labels.items())
    return f"{name}{{{shown}}} {floatToGoString(value)}"  # type: ignore[no-untyped-call]


def _escaped(text: str, *, quoted: bool = False) -> str:
    plain = text.replace("\\", r"\\").replace("\n", r"\n")
    return plain.replace('"', r"\"") if quoted else plain
