"""Space: `tune.space` of a recipe in, checked; the values and the recipe of a trial out.

A choice is a list, a range {low, high, log?, step?}, or a tie such as `2 * lora.r`. Values are
made of numbers in [0, 1), so that who draws them needs to know nothing of fields. No Ray, no torch.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from raytune_ft.config import problems
from raytune_ft.config.document import KeyPath, nearest
from raytune_ft.config.schema import Recipe, TuneSection
from raytune_ft.errors import RecipeError

FIXED_SECTIONS = {
    "run": "says where a run happens",
    "tune": "is the sweep's own",
    "checkpoint": "changes no number of a run",
    "chat_eval": "changes no number of a run",
    "eval": "is what trials are measured by",
}
FIXED = {
    "data.validation": "is what trials are measured by",
    "data.window": "says how many rows a task packs, and no more",
    "data.shuffle_rows": "says how many rows a shuffle has room for, and no more",
    "data.cache": "changes no number of a run",
    "data.on_error": "changes no number of a run",
    "data.compat": "is another release's way of making packs; sweep with one or the other",
    "train.layout": "changes no number of a run",
    "train.log_every": "changes no number of a run",
    "train.on_oom": "changes no number of a run",
    "train.loss_spike": "changes no number of a run",
    "model.gradient_checkpointing": "changes no number of a run",
}
"""Fields that cannot be swept, and why."""

ROWS = (
    "data.", "train.seed", "train.objective", "model.path", "model.template", "model.eos_token",
    "model.new_tokens", "model.load_from",
)  # fmt: skip
"""Fields of which other packs or another model folder come: each trial prepares for itself then,
as a run of its own would. All other trials share their windows."""
SPLITTING = ("data.sources", "train.seed")
"""Fields that decide which rows are held out, where `data.validation` is a fraction."""

STEPS = ("train.epochs", "train.max_steps", "train.micro_batch_size", "train.accumulation")
"""Fields that change the number of steps, which `data.compat` counts once for all trials."""

_TIE = re.compile(r"(?:([0-9.eE+-]+)\s*\*\s*)?([a-z_]+(?:\.\w+)+)")
_KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True)
class Tie:
    """A field that follows another one."""

    factor: float
    field: str


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both of them included."""

    low: float
    high: float
    log: bool
    step: float | None
    whole: bool
    """Whether the field takes whole numbers alone."""

    def at(self, u: float) -> float:
        """Return the number at `u` of the way, 0 <= u < 1."""
        if self.step is not None:
            return self.steps()[int(u * len(self.steps()))]
        if self.log:
            value = math.exp(math.log(self.low) + u * math.log(self.high / self.low))
        elif self.whole:
            value = math.floor(self.low + u * (self.high - self.low + 1))
        else:
            value = self.low + u * (self.high - self.low)
        value = min(max(value, self.low), self.high)  # what rounding adds
        return round(value) if self.whole else value

    def steps(self) -> list[float]:
        """List the numbers of a range with a step."""
        assert self.step is not None  # noqa: S101, for mypy
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        values = [self.low + i * self.step for i in range(count)]
        return [int(value) for value in values] if self.whole else values


Choice = list[Any] | Range


@dataclass(frozen=True)
class Space:
    """What is chosen, in the recipe's order, and what follows from it."""

    choices: dict[str, Choice]
    ties: dict[str, Tie]

    @classmethod
    def of(cls, recipe: Recipe) -> Space:
        """Read a recipe's space; RecipeError says in one line what is wrong with it."""
        if not recipe.tune.space:
            raise RecipeError(
                "tune.space: is empty; name fields, such as: tune: {space: {lora.r: [8, 16]}}"
            )
        choices: dict[str, Choice] = {}
        ties: dict[str, Tie] = {}
        for field, choice in recipe.tune.space.items():
            _check_field(recipe, field)
            if isinstance(choice, str):
                ties[field] = _tie(recipe, field, choice)
            elif isinstance(choice, dict):
                choices[field] = _range(recipe, field, choice)
            elif not choice:
                raise RecipeError(f"tune.space: '{field}' has no choices; name some: [...]")
            else:
                choices[field] = list(choice)
        space = cls(choices, ties)
        space._check_ties(recipe)
        space._check_each(recipe)
        return space

    def values(self, drawn: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
        """Add what is tied to drawn values; in the order of `tune.space`."""
        known = dict(drawn)

        def follow(field: str) -> Any:
            if field in known:
                return known[field]
            tie = self.ties.get(field)
            if tie is None:
                return value_in(recipe, field)
            known[field] = _times(tie.factor, follow(tie.field))
            return known[field]

        return {field: follow(field) for field in recipe.tune.space}

    def grid(self, recipe: Recipe) -> list[dict[str, Any]]:
        """List every combination, the last field changing fastest.

        Raises:
            RecipeError: a range has no step, so that there is no end of its numbers.
        """
        axes: list[Sequence[Any]] = []
        for field, choice in self.choices.items():
            if isinstance(choice, Range) and choice.step is None:
                raise RecipeError(
                    f"tune.space: '{field}' has no step, which tune.search 'grid' goes by; add "
                    "one, or list the values"
                )
            axes.append(choice.steps() if isinstance(choice, Range) else choice)
        return [
            self.values(dict(zip(self.choices, each, strict=True)), recipe)
            for each in product(*axes)
        ]

    @property
    def own_rows(self) -> bool:
        """Whether trials differ in their rows, packs or base."""
        fields = (*self.choices, *self.ties)
        return any(field.startswith(ROWS) for field in fields)

    def _check_ties(self, recipe: Recipe) -> None:
        for field in self.ties:
            seen, here = [field], self.ties[field].field
            while here in self.ties and here not in seen:
                seen.append(here)
                here = self.ties[here].field
            if here in seen:
                raise RecipeError(
                    f"tune.space: '{field}' follows itself ({' -> '.join([*seen, here])}); give "
                    "one of them values"
                )
        self.values({field: _first(choice) for field, choice in self.choices.items()}, recipe)

    def _check_each(self, recipe: Recipe) -> None:
        """Refuse a value that no trial could have, whatever the other fields are."""
        for field, choice in self.choices.items():
            ends = [choice.low, choice.high] if isinstance(choice, Range) else choice
            if isinstance(choice, Range) and choice.whole:
                ends = [int(choice.low), int(choice.high)]
            for value in ends:
                with_values(recipe, {field: value}, alone=True)


def with_values(recipe: Recipe, values: Mapping[str, Any], *, alone: bool = False) -> Recipe:
    """Return a trial's recipe: a run's own, without a `tune` section, checked as a file would be.

    Args:
        recipe: of the sweep.
        values: dotted field -> value.
        alone: leave out what is wrong only together with the recipe's other fields.

    Raises:
        RecipeError: says which value cannot be.
    """
    content = recipe.model_dump(mode="json")
    content["tune"] = TuneSection().model_dump(mode="json")
    for field, value in values.items():
        *way, last = path_of(field)
        place: Any = content
        for part in way:
            place = place[part]
        place[last] = value
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        if alone and all(not detail["loc"] for detail in error.errors()):
            return recipe
        lines = problems.explain(error, content, lambda path: "tune.space")
        raise RecipeError(lines[0]) from None


def value_in(recipe: Recipe, field: str) -> Any:
    """Return a field's value in a recipe."""
    place: Any = recipe.model_dump(mode="json")
    for part in path_of(field):
        place = place[part]
    return place


def path_of(field: str) -> KeyPath:
    """Split a dotted field; places in lists are numbers."""
    return tuple(int(part) if part.isdecimal() else part for part in field.split("."))


def _check_field(recipe: Recipe, field: str) -> None:
    """Refuse a field that is none, or that it makes no sense to sweep."""
    section = field.partition(".")[0]
    plain = tuple(part for part in path_of(field) if isinstance(part, str))
    why = FIXED_SECTIONS.get(section) or FIXED.get(field)
    if plain[-1] not in problems.fields_at(plain[:-1]) or not _is_there(recipe, field):
        near = nearest(field, problems.all_fields())
        hint = f"did you mean '{near}'?" if near else "fields: raytune-ft show NAME"
        raise RecipeError(f"tune.space: there is no field '{field}' in a recipe; {hint}")
    if why is not None:
        raise RecipeError(f"tune.space: '{field}' cannot be swept: it {why}")
    if recipe.data.compat is not None and field in STEPS:
        raise RecipeError(
            f"tune.space: '{field}' cannot be swept under data.compat, whose learning rate "
            "goes by the steps counted before; leave out data.compat, or the field"
        )
    swept = recipe.tune.space
    if section == "lora" and recipe.model.method == "full" and "model.method" not in swept:
        raise RecipeError(
            f"tune.space: '{field}' changes nothing under model.method 'full'; leave it out, or "
            "set model.method: lora"
        )
    if isinstance(recipe.data.validation, float) and field.startswith(SPLITTING):
        raise RecipeError(
            f"tune.space: '{field}' decides which rows data.validation "
            f"{recipe.data.validation:g} holds out, so trials would be measured by different "
            "ones; name a file or a split there"
        )


def _is_there(recipe: Recipe, field: str) -> bool:
    try:
        value_in(recipe, field)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _tie(recipe: Recipe, field: str, text: str) -> Tie:
    """Read NUMBER * FIELD, or FIELD."""
    match = _TIE.fullmatch(text.strip())
    try:
        factor = _number(match[1]) if match else 0
    except ValueError:
        match = None
    if match is None or not math.isfinite(factor):
        raise RecipeError(
            f"tune.space: '{field}': '{text}' is no tie; write a field, or a number times one, "
            "such as 2 * lora.r"
        )
    other = match[2]
    if not _is_there(recipe, other):
        near = nearest(other, problems.all_fields())
        hint = f"did you mean '{near}'?" if near else "fields: raytune-ft show NAME"
        raise RecipeError(f"tune.space: '{field}' follows '{other}', which is no field; {hint}")
    choice = recipe.tune.space.get(other, value_in(recipe, other))
    numbers = choice if isinstance(choice, list) else [choice]
    if match[1] and any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        is_numeric = isinstance(choice, dict) or (
            isinstance(choice, str) and other in recipe.tune.space
        )
        if not is_numeric:
            raise RecipeError(
                f"tune.space: '{field}': '{text}' needs numbers, and {other} has others; leave "
                "out the factor"
            )
    return Tie(factor, other)


def _number(text: str | None) -> float:
    if text is None:
        return 1
    return int(text) if text.isdecimal() else float(text)


def _times(factor: float, value: Any) -> Any:
    if factor == 1 or isinstance(value, bool) or not isinstance(value, int | float):
        return value
    result = factor * value
    return int(result) if isinstance(value, int) and result == int(result) else result


def _range(recipe: Recipe, field: str, given: Mapping[str, float]) -> Range:
    where = f"tune.space: '{field}'"
    if not {"low", "high"} <= set(given) <= _KEYS:
        raise RecipeError(f"{where}: a range is {{low, high}}, with log: 1 or step if you like")
    low, high, step = given["low"], given["high"], given.get("step")
    log, whole = bool(given.get("log")), _is_whole(field)
    if low > high:
        raise RecipeError(f"{where}: low {low:g} is above high {high:g}; turn them round")
    if log and low <= 0:
        raise RecipeError(f"{where}: a log scale has no {low:g}; begin above 0")
    if log and step is not None:
        raise RecipeError(f"{where}: has a step and a log scale; list the values instead")
    if step is not None and step <= 0:
        raise RecipeError(f"{where}: step {step:g} leads nowhere; use more than 0")
    fractions = [n for n in (low, high, step) if n is not None and n != int(n)]
    if whole and fractions:
        raise RecipeError(f"{where}: takes whole numbers, not {fractions[0]:g}")
    return Range(low, high, log, step, whole)


def _is_whole(field: str) -> bool:
    """Tell whether a field takes no fractions."""
    path = tuple(part for part in path_of(field) if isinstance(part, str))
    return float not in _types(problems.annotation(path))


def _types(kind: Any) -> set[Any]:
    return {kind}.union(*(_types(inner) for inner in typing.get_args(kind)), set())


def _first(choice: Choice) -> Any:
    return choice.at(0.0) if isinstance(choice, Range) else choice[0]
