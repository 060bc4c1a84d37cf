"""What `list` and `show` look like on a terminal, at most 100 columns wide. Imports rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytune_ft.config import catalog, listing
from raytune_ft.config.estimates.footprint import count
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.schema import Recipe
from raytune_ft.config.written import changed_fields, dump_changes

WIDTH = 100
GIB = 2**30
NUMERIC = {"step", "loss", "val loss", "best", "tok/s", "time", "seen"}
WANTED_LEAST = ("trials", "created", "model", "tok/s", "time", "method", "best", "seen")
"""Columns of runs that go where a terminal is too narrow, the first of them first."""
RESUMABLE, SHORT = " (resumable)", " +"
LEGEND = "+ goes on with raytune-ft train --resume RUN, a sweep with tune --resume"
UNBOUNDED = 1000
"""Columns of a terminal that has room for all."""
STATUS_STYLES = {
    "running": "cyan", "done": "green", "failed": "red", "interrupted": "red", "damaged": "red",
    "stopped": "yellow",
}  # fmt: skip
METHOD_WORDS = {"nf4": "QLoRA", "int8": "LoRA on 8-bit weights", "none": "LoRA"}


def print_names(entries: Sequence[listing.Entry], *, short: bool) -> None:
    """Print names by family with method, data and memory.

    Args:
        entries: in the order of families.
        short: one line per newer card, which goes with every recipe, instead of all its names.
    """
    # one text, not a table: measuring hundreds of cells would take longer than all the rest
    shown = Text()
    for family, group in groupby(entries, key=lambda entry: entry.family):
        known = catalog.families().get(family)
        shown.append(f"\n{known.title if known else 'DeepSpeed presets'}\n", style="bold cyan")
        for name, method, data, memory in _name_rows(list(group), short=short):
            shown.append(f"  {name:<47} {method:<9}  {data:<20} {memory:>14}".rstrip() + "\n")
    newer = len(catalog.newer_models())
    shown.append(
        f"\n{len(entries)} names: model, recipe, method, data, and memory predicted for one GPU.\n"
        f"{newer} newer models go with each of {len(catalog.recipes())} recipes.\n"
        "raytune-ft list PATTERN | --models | --data | --method M;  raytune-ft show NAME",
        style="dim",
    )
    _console().print(shown, no_wrap=True, overflow="ignore", crop=False)


def _name_rows(entries: Sequence[listing.Entry], *, short: bool) -> Iterator[tuple[str, ...]]:
    newer = set(catalog.newer_models()) if short else set()
    for model, group in groupby(entries, key=lambda entry: entry.model):
        if model in newer:
            need = listing.memory(model, listing.SAMPLE_RECIPE)
            yield f"{model}_…", "any", "every recipe", f"qlora {_size(need)}"
            continue
        for entry in group:
            yield entry.name, entry.method, entry.data, _size(entry.memory)


def print_models(models: Sequence[str]) -> None:
    """Print model cards with the memory that QLoRA needs."""
    console = _console()
    table = _table("model", "path", "template", "QLoRA")
    for model in models:
        card = catalog.card(model)
        need = listing.memory(model, listing.SAMPLE_RECIPE)
        table.add_row(model, card.path, card.template, _size(need))
    console.print(table)
    console.print(Text("Add a recipe to make a name: raytune-ft list --data", style="dim"))


def print_recipes(recipes: Sequence[str]) -> None:
    """Print recipes with their data sets."""
    console = _console()
    table = _table("recipe", "data sets", "tokens", "epochs", "lr")
    for recipe in recipes:
        body = catalog.body_for(catalog.models()[0], recipe)
        data, train = body["data"], body["train"]
        places = "\n".join(_tail(source["path"]) for source in data["sources"])
        table.add_row(
            recipe.replace("/", "_"),
            places,
            str(data["max_length"]),
            str(train["epochs"]),
            f"{train['lr']:g}",
        )
    console.print(table)
    console.print(
        Text("Put a model in front to make a name: raytune-ft list --models", style="dim")
    )


def print_recipe(recipe: Recipe, name: str) -> None:
    """Print what a recipe sets, then in few words what stays at its default."""
    from rich.syntax import Syntax  # brings pygments along, which `list` can do without

    console = _console()
    console.print(Text(name, style="bold cyan"))
    for label, words in _summary(recipe):
        console.print(Text(f"  {label:<8}", style="dim") + Text(words))
    console.print()
    console.print(
        Syntax(
            dump_changes(recipe).rstrip(), "yaml", background_color="default", word_wrap=True,
            theme="ansi_dark",
        )
    )  # fmt: skip
    console.print(Text("\nat their defaults", style="bold"))
    grid = Table.grid(padding=(0, 2))
    for section, words in _defaults(recipe):
        grid.add_row(f"  {section}", words, style="dim")
    console.print(grid)


def _summary(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model, data, train = recipe.model, recipe.data, recipe.train
    method = "all parameters" if model.method == "full" else METHOD_WORDS[model.quantization]
    yield "model", f"{model.path}, template {model.template}, {method}"
    yield "data", ", ".join(_tail(source.path) for source in data.sources)
    kind = "packs" if data.pack else "rows"
    tokens = f"{kind} of {data.max_length:,} tokens"
    yield "step", f"{recipe.global_batch_size} {tokens}, {train.epochs} epochs, lr {train.lr:g}"
    shape = catalog.card_config(model.path)
    if shape is not None:
        need = sum(memory_bytes(recipe, count(shape, recipe), on_gpu=True).values())
        yield "memory", f"{_size(need)} on each GPU, predicted; more: raytune-ft plan"


def _defaults(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for name in type(recipe).model_fields:
        section = getattr(recipe, name)
        content = section.model_dump(mode="json")
        rest = [key for key in content if key not in changed_fields(section)]
        if rest:
            yield name, "  ".join(f"{key}={_word(content[key])}" for key in rest)


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "''" if value == "" else str(value)


def _tail(path: str) -> str:
    """Shorten the path of a data file to its name, and a long name in its middle."""
    word = path.rpartition("/")[2] if path.startswith(".") else path
    return word if len(word) <= 40 else f"{word[:20]}…{word[-19:]}"


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.1f} GiB"


def _console() -> Console:
    console = Console(highlight=False)
    return Console(highlight=False, width=min(console.width, WIDTH))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, header_style="dim")
    for column in columns:
        right = column in {"memory", "QLoRA", "tokens", "epochs", "lr"}
        table.add_column(
            column, justify="right" if right else "left", overflow="fold", no_wrap=right
        )
    return table


def print_runs(head: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str]) -> None:
    """Print runs, a line each, then what is odd about some of them."""
    console = Console(highlight=False)
    places = [place for place in range(len(head)) if any(row[place] for row in rows)]
    for name in (*WANTED_LEAST[:-1], "", WANTED_LEAST[-1]):
        table = _runs_table(head, rows, places)
        if Console(width=UNBOUNDED).measure(table).maximum <= console.width:
            break
        if not name:  # the last thing before a column that everybody looks for
            rows = [(one, state.replace(RESUMABLE, SHORT), *more) for one, state, *more in rows]
            remarks = [*remarks, LEGEND] if any(SHORT in row[1] for row in rows) else remarks
        places = [place for place in places if head[place] != name]
    table = _runs_table(head, rows, places)
    console.print(table)
    for remark in remarks:
        console.print(Text(remark, style="yellow"))


def _runs_table(head: Sequence[str], rows: Sequence[Sequence[str]], places: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, header_style="dim")
    for place in places:
        numeric = head[place] in NUMERIC
        table.add_column(
            head[place], justify="right" if numeric else "left", no_wrap=numeric, overflow="fold"
        )
    for row in rows:
        cells = [Text(row[place]) for place in places]
        cells[1].stylize(STATUS_STYLES.get(row[1].split()[0], ""))
        table.add_row(*cells)
    return table


def print_comparison(
    names: Sequence[str], figures: Sequence[Sequence[str]], fields: Sequence[Sequence[str]]
) -> None:
    """Print the final figures of runs and the recipe fields that differ, a column a run."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, header_style="bold")
    for name in ("", *names):
        table.add_column(Text(name), overflow="fold")
    for rows in (figures, fields):
        for row in rows:
            table.add_row(Text(row[0], style="dim"), *map(Text, row[1:]))
        table.add_section()
    console.print(table)
