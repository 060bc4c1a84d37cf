"""The verb for benchmarks: eval."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from raytune_ft.cli.app import Json, verb
from raytune_ft.cli.results import Bits, Chattable

Tasks = Annotated[
    list[str], typer.Option("--tasks", help="Names of tasks, with commas between; repeatable.")
]
IncludePath = Annotated[
    str | None,
    typer.Option(
        "--include-path", metavar="DIR", help="Folder of task YAML files; may run Python beside."
    ),
]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Ask as in a chat, by the template of training.")
]


@verb("eval")
def evaluate(
    path: Chattable,
    tasks: Tasks,
    include_path: IncludePath = None,
    bits: Bits = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Examples before each question.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions per task.")] = None,
    chat_template: ChatTemplate = False,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn answers and examples.")] = 0,
    out: Annotated[
        str | None, typer.Option("--out", help="JSON file; default: in evaluations/ of PATH.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained model by tasks of lm-evaluation-harness."""
    from raytune_ft import evaluate as stage

    wanted = stage.Wanted(stage.split_names(tasks), include_path, shots, limit, chat_template, seed)
    record, target = stage.evaluate(path, wanted, bits=bits, out=out)
    if as_json:
        print(json.dumps(record, ensure_ascii=False, indent=1))
        return
    _print_table(stage.rows_of(record))
    print(target)


def _print_table(rows: list[tuple[str, str, float, float | None]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("task", "metric", "value", "± standard error"):
        table.add_column(column, justify="right" if column[0] in "v±" else "left")
    for task, metric, value, error in rows:
        table.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    Console(highlight=False).print(table)
