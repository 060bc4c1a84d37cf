"""A run that waits for room on its cluster says so once, and once that it need not any more."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from typing import Any

from raytune_ft.mailbox import Mailbox
from raytune_ft.waiting import Need, is_free, line, room_for, told_of_room

GPUS = Need({"CPU": 0.5, "GPU": 1}, least=3, most=4)


def node(*, up: bool = True, **resources: float) -> Mapping[str, Any]:
    return {"Alive": up, "Resources": resources}


def test_room_is_counted_node_by_node() -> None:
    """Half a GPU here and half a one there hold no worker, nor does a node without cores."""
    each = GPUS.each
    assert room_for([node(CPU=8, GPU=2), node(CPU=0, GPU=4), node(CPU=1, GPU=4)], each) == 4
    assert room_for([node(CPU=8, GPU=1.5), node(CPU=8, GPU=0.5), node(CPU=64)], each) == 1
    assert room_for([node(CPU=8, GPU=8, up=False)], each) == 0
    assert room_for([node(CPU=2)], {"CPU": 0.6666}) == 3, "Ray's rounded thirds"
    assert room_for([], each) == 0


def test_what_is_told() -> None:
    assert line(3, GPUS, None) is None
    assert line(2, GPUS, None) == (
        "the cluster has room for 2 of 3 workers (0.5 CPU, 1 GPU each); waiting for a node, or end "
        "this run and go on with fewer run.workers"
    )
    assert line(3, GPUS, 2) == "the cluster has room for the workers again"


def test_each_change_is_told_once_and_a_lost_head_tells_nothing() -> None:
    eight, four = [node(CPU=8, GPU=4)], [node(CPU=8, GPU=2)]
    looks = [eight] * 3 + [four] + [eight] * 2 + [four] * 4 + [None] * 2 + [four] * 2 + [eight] * 4
    left, done, said, rooms = iter(looks), threading.Event(), list[str](), list[int]()

    def look() -> list[Mapping[str, Any]]:
        found = next(left, ...)
        if found is ...:
            done.set()
            return eight
        if found is None:
            raise RuntimeError("no head")
        return found

    def free() -> dict[str, float]:
        return {"CPU": 4.0, "GPU": 1.0}

    with told_of_room(look, free, GPUS, said.append, rooms.append, every_s=0.001):
        assert done.wait(30)
    assert said == [str(line(2, GPUS, None)), str(line(4, GPUS, 2))]
    assert [room for room, _ in itertools.groupby(rooms)] == [4, 2, 4]


def test_what_others_hold_is_not_free() -> None:
    assert is_free({"CPU": 0.5, "GPU": 1.0}, GPUS.each)
    assert not is_free({"CPU": 8.0}, GPUS.each)
    assert not is_free({"CPU": 0.4, "GPU": 1.0}, GPUS.each)


def test_workers_grow_once_and_not_again_in_vain() -> None:
    """Until the cluster's room is another one: each try costs a start of all workers."""
    mailbox = Mailbox()
    assert mailbox.wishes(2) == (False, False), "nothing is known yet"
    mailbox.begin(2)
    mailbox.has_room(4)
    assert mailbox.wishes(2) == (False, True) and mailbox.wishes(4) == (False, False)
    mailbox.grow(2)
    assert mailbox.growing() and not mailbox.growing()
    mailbox.begin(2)
    mailbox.has_room(4)
    assert mailbox.wishes(2) == (False, False)
    mailbox.has_room(3)
    assert mailbox.wishes(2) == (False, True)
    mailbox.grow(2)
    mailbox.begin(3)
    mailbox.begin(2)  # a worker was lost
    assert mailbox.wishes(2) == (False, True)
