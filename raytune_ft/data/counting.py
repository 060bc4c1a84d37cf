"""Counting: a run's windows in, the number of its packs and steps out.

`estimate` looks at the first windows alone, so that a run starts at once; `count_packs` is exact
and wants the sizes of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import Pack, divide_rows, pack_pieces
from raytune_ft.data.report import Report, add_report, new_report
from raytune_ft.data.windows import Feed, Measurement, Window

COUNTED_WINDOWS = 2
"""Windows that are made before a run, to see the first rows and to estimate its steps."""


@dataclass(frozen=True)
class Estimate:
    """What the first windows of a run tell of the whole."""

    windows: list[Window]
    """The first windows of epoch 0."""
    report: Report
    """Of the rows of these windows."""
    packs: int
    """Packs of an epoch."""
    density: float
    """Tokens over the room in the packs, 0 to 1."""
    exact: bool
    """Whether these are all windows of the epoch."""

    def steps(self, recipe: Recipe) -> int:
        """Optimizer steps of a run: a step never crosses an epoch's end."""
        steps = recipe.train.epochs * -(-self.packs // recipe.global_batch_size)
        return min(steps, recipe.train.max_steps or steps)

    def steps_are_sure(self, recipe: Recipe) -> bool:
        """Tell whether `steps` is what the run will have: every epoch has as many packs.

        Best fit makes as many packs of the same lengths in any order, so one window that holds all
        rows gives the same number in each epoch; several windows hold other rows in each.
        """
        data = recipe.data
        if not self.exact or data.compat is not None:
            return data.compat is not None
        if recipe.train.epochs == 1 or not data.shuffle_before_pack or data.packing == "none":
            return True
        return data.packing == "best_fit" and len(self.windows) == 1


def estimate(feed: Feed) -> Estimate:
    """Make the first windows of a run and conclude from them to all of an epoch.

    Two windows tell enough, unless neither has a pack: then more are made, up to the first pack.

    Raises:
        DataError: as `Feed.window`.
    """
    windows: list[Window] = []
    packs: list[Pack] = []
    report = new_report()
    while len(windows) < feed.n_windows and (len(windows) < COUNTED_WINDOWS or not packs):
        windows.append(feed.window(0, len(windows)))
        add_report(report, windows[-1].report)
        packs += windows[-1].packs
    share = windows[-1].last if windows else 1.0
    room = len(packs) * feed.encoder.data.max_length
    density = sum(len(pack.input_ids) for pack in packs) / room if room else 0.0
    exact = len(windows) == feed.n_windows
    if feed.plan is not None:
        return Estimate(windows, report, feed.plan.n_packs, density, True)
    return Estimate(windows, report, round(len(packs) / share), density, exact)


def count_packs(feed: Feed, measured: Measurement, epoch: int) -> int:
    """Count an epoch's packs exactly, from the sizes of all rows.

    A stretch of a split row that holds no answer is counted, though it makes no pack.
    """
    if feed.plan is not None:
        return feed.plan.n_packs
    total = 0
    for number in range(feed.n_windows):
        lengths = measured.lengths[feed.order.window_rows(epoch, number)]
        pieces = divide_rows(lengths, feed.encoder.data)
        total += len(pack_pieces(pieces, feed.encoder.data, np.random.default_rng(0)))
    return total
