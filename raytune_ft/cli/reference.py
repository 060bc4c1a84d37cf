"""Verbs for people who come from XTuner: its own spellings, and the import of configurations."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from raytune_ft.cli import runs
from raytune_ft.cli.app import Overrides, Recipe, app, verb
from raytune_ft.errors import RecipeError

convert_app = typer.Typer(help="Do what XTuner's convert does: adapters and merged models.")
app.add_typer(convert_app, name="convert")
preprocess_app = typer.Typer(help="Prepare a data set that comes in a form of its own.")
app.add_typer(preprocess_app, name="preprocess")

Foreign = Annotated[
    str, typer.Argument(metavar="FILE", help="XTuner .py, LLaMA-Factory or Axolotl .yaml.")
]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest weight file.")]
Target = Annotated[str, typer.Argument(metavar="DIR", help="Folder to write.")]


def tell_note(line: str) -> None:
    """Print a line for people."""
    print(line, file=sys.stderr)


@verb("import")
def import_config(
    file: Foreign,
    out: Annotated[
        str | None, typer.Option("--out", help="File to write; default: STEM_recipe.yaml here.")
    ] = None,
    to_stdout: Annotated[bool, typer.Option("--stdout", help="Print the recipe instead.")] = False,
) -> None:
    """Turn a configuration of XTuner, LLaMA-Factory or Axolotl into a recipe; runs none of it."""
    from raytune_ft.config.written import dump_yaml
    from raytune_ft.importers import read_config

    draft = read_config(file)
    lines = draft.report()
    for line in lines:
        tell_note(line)
    recipe = draft.recipe()
    title = [f"From {draft.kind}'s {Path(file).name}, by raytune-ft import."]
    if lines:
        title += ["", "Not carried over as it stands:"]
        title += [_wrapped(line.replace(file, Path(file).name)) for line in lines]
    text = dump_yaml(recipe, "\n".join(title))
    if to_stdout:
        print(text, end="")
        return
    target = Path(out) if out is not None else Path(f"{Path(file).stem}_recipe.yaml")
    _write_new(target, text)
    print(target)
    tell_note(f"next: raytune-ft inspect {target}")


def _wrapped(line: str) -> str:
    """Break a line of the file's head, so that it stays readable beside the fields."""
    return textwrap.fill(line, 96, subsequent_indent="    ", break_on_hyphens=False)


def _write_new(target: Path, text: str) -> None:
    try:
        target.expanduser().parent.mkdir(parents=True, exist_ok=True)
        with target.expanduser().open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target}: exists; remove it, or name another file by --out") from None
    except OSError as error:
        raise RecipeError(f"{target}: cannot be written: {error.strerror}") from None


@verb("pth_to_hf", convert_app)
def pth_to_hf(
    config: Recipe,
    trained: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint inside one.")
    ],
    out: Target,
    fp32: Annotated[bool, typer.Option("--fp32", help="Accepted; adapters are float32.")] = False,
    max_shard_size: ShardSize = "2GB",
    cfg_options: Annotated[list[str] | None, typer.Option("--cfg-options", hidden=True)] = None,
) -> None:
    """Write a run's adapter as plain peft loads it, as `raytune-ft export` does."""
    del (
        fp32,
        max_shard_size,
        cfg_options,
    )  # an adapter is one float32 file; the run knows its recipe
    from raytune_ft import convert

    print(convert.to_adapter(config, trained, out))


@verb("merge", convert_app)
def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the base.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder, or a run.")],
    out: Target,
    max_shard_size: ShardSize = "2GB",
    base: Annotated[
        str | None, typer.Option("--base", help="original, or dequantized as training saw it.")
    ] = None,
) -> None:
    """Merge an adapter folder into the model it was trained on, tokenizer included."""
    from raytune_ft import convert

    print(convert.to_model(model, adapter, out, max_shard_size, base, tell_note))


@verb("split", convert_app)
def split(words: Annotated[list[str] | None, typer.Argument(metavar="SRC DST")] = None) -> None:
    """Say what is used instead: weights are read shard by shard."""
    raise RecipeError(
        f"convert split{''.join(f' {word}' for word in words or [])}: weights are read and merged "
        "one tensor after the other; for smaller files: raytune-ft merge --max-shard-size 500MB"
    )


@verb("check-custom-dataset")
def check_custom_dataset(
    config: Recipe,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Rows to look at instead of its own.")
    ] = None,
) -> int:
    """Show ten rows as the model will see them, as `raytune-ft inspect` does."""
    # a recipe's map function belongs to its own rows; the form of others is recognised
    words = [f"data.sources=[{{path: {json.dumps(data)}}}]"] if data is not None else []
    return runs.inspect(config=config, overrides=words, rows=10)


@verb("log-dataset")
def log_dataset(config: Recipe, overrides: Overrides = None) -> int:
    """Show the first row as the model will see it, as `raytune-ft inspect` does."""
    return runs.inspect(config=config, overrides=overrides, rows=1)


@verb("arxiv", preprocess_app)
def preprocess_arxiv(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Kaggle's arxiv-metadata, JSONL.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="JSON file to write.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    categories: Annotated[
        list[str] | None, typer.Option("--categories", help="Default: cs.AI cs.CL cs.CV.")
    ] = None,
    start_date: Annotated[str, typer.Option("--start-date", help="Oldest.")] = "2020-01-01",
) -> None:
    """Choose arXiv records by category and date, for the `arxiv_gentitle` recipes."""
    from raytune_ft import preprocess

    if more and not categories:
        raise RecipeError(f"argument: '{more[0]}': only SRC and DST; see --categories")
    wanted = [*(categories or []), *(more or [])] or preprocess.CATEGORIES
    chosen = preprocess.arxiv(source, target, wanted, start_date)
    for line in chosen.bad:
        tell_note(f"left out {line}")
    if chosen.n_bad > len(chosen.bad):
        tell_note(f"left out {chosen.n_bad - len(chosen.bad)} more lines of {source}")
    print(f"Save to {chosen.path}\n{chosen.rows} of {chosen.lines} records")


@verb("test")
def test(words: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG]...")] = None) -> None:
    """Say what is used instead: rows and MMLU are measured during training."""
    from raytune_ft.cli.spelling import NO_VERB

    raise RecipeError(f"test{''.join(f' {word}' for word in words or [])}: {NO_VERB['test']}")


@verb("help")
def show_help(context: typer.Context) -> None:
    """Print the verbs."""
    print(context.find_root().get_help())
