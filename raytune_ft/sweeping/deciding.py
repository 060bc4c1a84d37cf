"""Deciding: a sweep's trials in, the part of its page that says which fields decide out."""

from __future__ import annotations

from collections.abc import Sequence

from raytune_ft.config.schema import TuneSection
from raytune_ft.sweeping.importance import LEAST, importance
from raytune_ft.sweeping.trials import DONE, STOPPED, Trial
from raytune_ft.sweeping.words import short_field
from raytune_ft.training.watching.reporting.series import number
from raytune_ft.training.watching.reporting.style import text


def importance_part(section: TuneSection, trials: Sequence[Trial]) -> str:
    """Show what each field decides, how that is known, and when it is not."""
    judged = [
        one for one in trials
        if one.state in (DONE, STOPPED) and number(one.metric) is not None
    ]  # fmt: skip
    head = "<h2>What decides</h2>"
    if any(one.turns for one in trials):
        return (
            f"{head}<p class=note>Trials changed their values on the way and went on with weights "
            "of others, so that no share is one value's.</p>"
        )
    if len(judged) < LEAST:
        return (
            f"{head}<p class=note>Too few trials to say what each field decides: {len(judged)} "
            f"have an outcome, {LEAST} are needed, and 16 tell more than chance.</p>"
        )
    fields = list(dict.fromkeys(name for one in trials for name in one.values))
    found = importance([one.values for one in judged], order_of(judged, section))
    if not found:
        return f"{head}<p class=note>All trials came out alike, or had the same values.</p>"
    rows = []
    for one in found:
        names = text(", ".join(short_field(n, fields) for n in (one.name, *one.with_it)))
        weak = "" if one.is_sure else " weak"
        words = f"{one.share:.0%}" + ("" if one.is_sure else ", as by chance")
        rows.append(
            f"<tr><td>{names}</td><td><div class='share{weak}'>"
            f"<i style='width:{100 * one.share:.1f}%'></i>"
            f"<u style='left:{100 * min(1.0, one.by_chance):.1f}%'></u></div></td>"
            f"<td>{words}</td></tr>"
        )
    method = (
        f"Share of the variance of the trials' ranks that lies between groups of a field's values "
        f"(epsilon squared of the Kruskal-Wallis test), of {len(judged)} trials. Its choices are "
        "the groups; numbers of a range are cut into groups of equal size. The mark is what 95% of "
        "999 shuffles stay under: a share below it says nothing. Fields that move together count "
        "once; what two fields do only together is not seen; failed trials are left out, and "
        "those stopped early stand behind the others, the later stopped the better."
    )
    return f"{head}<table class=weights>{''.join(rows)}</table><p class=sub>{method}</p>"


def order_of(trials: Sequence[Trial], section: TuneSection) -> list[float]:
    """Return numbers that order trials: done ones by the metric, then those stopped, late first."""
    sign = 1 if section.mode == "min" else -1
    keys = [
        (0, 0, sign * (one.metric or 0.0)) if one.state == DONE
        else (1, -one.step, sign * (one.metric or 0.0))
        for one in trials
    ]  # fmt: skip
    places = {key: float(place) for place, key in enumerate(sorted(set(keys)))}
    return [places[key] for key in keys]
