"""Elsewhere: a folder of runs on an object store in, what is known of each out.

Of a run its record and the end of its metrics are read, many runs at a time; checkpoints and
results stay where they are. A run that cannot be read is an entry with a remark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from raytune_ft.errors import CheckpointError
from raytune_ft.lookout.seen import read_object, status_of
from raytune_ft.storing.places import Place
from raytune_ft.training.guarding import liveness
from raytune_ft.training.run_folder import Event
from raytune_ft.training.watching.reporting import listing, sweeps
from raytune_ft.training.watching.reporting.series import Columns
from raytune_ft.training.watching.reporting.summary import best_of, usual

AT_ONCE = 16
"""Runs that are read at the same time."""
TAIL_BYTES = 64 << 10
"""Of metrics.jsonl: about a hundred steps."""
NOTHING: Event = {"steps": 0, "seconds": 0.0}


def list_elsewhere(address: str) -> list[listing.Entry]:
    """Return the runs under an address; of a run's own address, that one.

    Raises:
        CheckpointError: the store cannot be reached, or there is no such bucket.
        RecipeError: it is no address.
    """
    place = Place(address)
    place.check()
    if place.stamp("run.json") is not None:
        return [_entry(place)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(_entry_if_run, (place / name for name in place.folders())))
    return listing.newest_first(entry for entry in found if entry is not None)


def _entry_if_run(place: Place) -> listing.Entry | None:
    try:
        if any(place.stamp(name) is not None for name in ("run.json", "metrics.jsonl")):
            return _entry(place)
    except (CheckpointError, FileNotFoundError) as error:
        return _composed(place, {}, NOTHING, "damaged", remark=str(error))
    return None


def _entry(place: Place) -> listing.Entry:
    info, stamps = read_object(place, "run.json"), {n: place.stamp(n) for n in listing.SIGNS}
    alive = read_object(place, liveness.ALIVE) if stamps[liveness.ALIVE] is not None else {}
    status = status_of(info, alive)
    figures = _figures(place, info, stamps["metrics.jsonl"])
    trials = None
    if stamps[sweeps.LEDGER] is not None:
        ledger = _objects(place.read(sweeps.LEDGER))
        trials = sweeps.count(ledger, runs=status == "running")
    goes_on = status in listing.GOES_ON
    return _composed(
        place, info, figures, status,
        resumable=goes_on and (trials is not None or bool((place / "checkpoints").folders())),
        remark=listing.remark_of(
            info, figures, status, is_there=stamps["run.json"] is not None,
            is_sweep=trials is not None,
        ),
        seen=listing.age(None if stamp is None else stamp[1] for stamp in stamps.values()),
        trials=trials,
    )  # fmt: skip


def _composed(
    place: Place,
    info: Event,
    figures: Event,
    status: str,
    *,
    remark: str,
    resumable: bool = False,
    seen: float | None = None,
    trials: dict[str, int] | None = None,
) -> listing.Entry:
    return listing.compose(
        info, figures, status, name=place.address.rpartition("/")[2], path=place.address,
        resumable=resumable, remark=remark, seen=seen, trials=trials,
    )  # fmt: skip


def _figures(place: Place, info: Event, stamp: tuple[int, float] | None) -> Event:
    """Return what the last steps tell; `seconds` would take all of them."""
    if stamp is None or not stamp[0]:
        return NOTHING
    start = max(0, stamp[0] - TAIL_BYTES)
    tail = place.part("metrics.jsonl", start, TAIL_BYTES)
    lines = list(_objects(tail if not start else tail.partition(b"\n")[2]))
    columns = Columns(lines)
    best = best_of(info, columns["val_loss"]) or {}
    return {
        "steps": max((line["step"] for line in lines if _is_step(line)), default=0),
        "total": columns.total,
        "loss": columns.last("loss"),
        "val_loss": columns.last("val_loss"),
        "best": best.get("value"),
        "best_step": best.get("step"),
        "tokens_per_s": usual(columns["tokens_per_s"]),
        "seconds": 0.0,
        "broken": not tail.endswith(b"\n"),
    }


def _is_step(line: Event) -> bool:
    return isinstance(line.get("step"), int) and not isinstance(line["step"], bool)


def _objects(text: bytes) -> Iterator[Event]:
    """Yield the JSON objects of lines; what is none is passed over."""
    for line in text.split(b"\n"):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            yield content
