"""`raytune-ft VERB`: one function per verb, which parses, calls one library function and prints.

Results go to stdout, words for people to stderr. Imports that cost time stand inside the verbs.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from raytune_ft.entry import exit_code, run_main, tell
from raytune_ft.errors import RecipeError

PROGRAM = "raytune-ft"
NOTHING_FOUND = 1
WRONG_USAGE = 2
UsageProblem: Any = typer.BadParameter.__bases__[0]
"""Click's UsageError, wherever this version of typer keeps it."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach a language model your own data on Ray, then talk to it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Run the console script."""
    run_main(lambda: dispatch(sys.argv[1:]))


def run_verb(verb: str) -> NoReturn:
    """Run `python -m raytune_ft.VERB` as the verb of the console script."""
    run_main(lambda: dispatch([verb, *sys.argv[1:]]))


def dispatch(arguments: list[str]) -> int:
    """Run a command line; return its exit code. Wrong usage is 2, with the nearest word."""
    try:
        result = app(arguments or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except UsageProblem as problem:
        message = " ".join(problem.format_message().split())
        context = getattr(problem, "ctx", None)
        path = context.command_path if context is not None else PROGRAM
        tell(f"{message.rstrip('.')}; see: {path} --help")
        return WRONG_USAGE
    return result if isinstance(result, int) else 0


def verb(name: str) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Register a verb, whose errors become its exit code."""

    def register(work: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(work)
        def guarded(**options: Any) -> int:
            return exit_code(lambda: work(**options))

        app.command(name)(guarded)
        return guarded

    return register


Pattern = Annotated[str | None, typer.Argument(help="Only names that contain this.")]
PatternOption = Annotated[
    str | None, typer.Option("--pattern", "-p", help="Only names that contain this.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Name = Annotated[str, typer.Argument(help="A shipped name; raytune-ft list shows them.")]
Config = Annotated[
    str | None,
    typer.Option("--config", "-c", help="A file, a file under configs/, or a shipped name."),
]
Recipe = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A file, a file under configs/, or a shipped name.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME] [KEY=VALUE]...", help="A recipe, and fields to set in it."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe fields to set.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")]
Run = Annotated[str, typer.Argument(help="A run folder, such as runs/quickstart.")]
Out = Annotated[str | None, typer.Option("--out", help="Folder to write; default: in the run.")]


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
) -> None:
    if version:
        print_version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@verb("list")
def list_recipes(pattern: Pattern = None, pattern_option: PatternOption = None) -> int:
    """Print the names of the shipped recipes."""
    from raytune_ft.config import catalog

    return _print_names(catalog.names(), pattern_option or pattern)


@verb("list-cfg")
def list_cfg(pattern: Pattern = None, pattern_option: PatternOption = None) -> int:
    """Print exactly the 301 names of XTuner v0.1.9."""
    from raytune_ft.config import catalog

    return _print_names(catalog.reference_names(), pattern_option or pattern)


def _print_names(names: list[str], pattern: str | None) -> int:
    found = [name for name in names if (pattern or "").lower() in name.lower()]
    if not found:
        tell(f"no name contains '{pattern}'; raytune-ft list shows all {len(names)}")
        return NOTHING_FOUND
    print("\n".join(found))
    return 0


@verb("show")
def show(name: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe with all its fields."""
    from raytune_ft.config import catalog, loader

    if name in catalog.PRESETS:
        print(json.dumps(catalog.preset(name), indent=2))
        return
    recipe = loader.load_recipe(name, overrides or [])
    if as_json:
        print(json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False, indent=2))
    else:
        print(loader.dump_yaml(recipe), end="")


FolderArgument = Annotated[str, typer.Argument(metavar="DIR", help="Folder to write into.")]


@verb("copy")
def copy(name: Name, folder: FolderArgument) -> None:
    """Write a shipped recipe into DIR as a full, commented file: NAME_copy.yaml."""
    from raytune_ft.config import catalog, loader

    if name in catalog.PRESETS:
        text, suffix = json.dumps(catalog.preset(name), indent=2) + "\n", ".json"
    else:
        text, suffix = loader.dump_yaml(loader.load_recipe(name), f"A copy of {name}."), ".yaml"
    target = Path(folder).expanduser() / f"{loader.recipe_stem(name)}_copy{suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        if target.exists():
            raise RecipeError(f"{target}: exists; remove it, or name another folder") from None
        raise RecipeError(f"{folder}: is not a folder; name one to write into") from None
    except OSError as error:
        raise RecipeError(f"{target}: cannot be written: {error.strerror}") from None
    print(f"Copy to {target}")


@verb("copy-cfg")
def copy_cfg(name: Name, folder: FolderArgument) -> int:
    """Do what `copy` does."""
    return copy(name=name, folder=folder)


Resume = Annotated[
    str | None, typer.Option("--resume", metavar="RUN", help="Go on with this run, exactly.")
]


@verb("train")
def train(
    words: Words = None,
    config: Config = None,
    dry_run: DryRun = False,
    resume: Resume = None,
    as_json: Json = False,
) -> int:
    """Train a recipe."""
    from raytune_ft.config import loader

    name, overrides = split_words(words or [], config)
    if resume is not None:
        if name is not None or overrides:
            raise RecipeError(
                "--resume: goes on with the run's own recipe; leave NAME and key=value out"
            )
        from raytune_ft.training.run_folder import RunFolder

        name = str(RunFolder.existing(resume).recipe)
    name = _named(name)
    if as_json and not dry_run:
        raise RecipeError("--json: prints the plan; add --dry-run")
    recipe = loader.load_recipe(name, overrides)
    if dry_run:
        from raytune_ft.inspection import print_plan

        return print_plan(recipe, as_json=as_json)
    from raytune_ft.train import train as run

    return run(recipe, source=name, resume=resume)


@verb("tune")
def tune(words: Words = None, config: Config = None, dry_run: DryRun = False) -> int:
    """Sweep over the fields in a recipe's `tune` section."""
    from raytune_ft.config import loader

    name, overrides = split_words(words or [], config)
    name = _named(name)
    recipe = loader.load_recipe(name, overrides)
    from raytune_ft.tune import tune as run

    return run(recipe, source=name, dry_run=dry_run)


def split_words(words: list[str], config: str | None) -> tuple[str | None, list[str]]:
    """Tell the recipe's name from `key=value` words; RecipeError if it is there twice."""
    overrides = [word for word in words if re.match(r"[\w.]*=", word)]
    names = [word for word in words if word not in overrides]
    if config is not None:
        names.insert(0, config)
    if len(names) > 1:
        raise RecipeError(
            f"argument: '{names[1]}': the recipe is '{names[0]}' already; "
            "fields are set by key=value"
        )
    return (names[0] if names else None), overrides


def _named(name: str | None) -> str:
    if name is None:
        raise RecipeError("--config: name a recipe; start with --config quickstart.yaml")
    return name


@verb("inspect")
def inspect(
    config: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to show.")] = 3,
) -> None:
    """Show rows as the model will see them, and what is dropped."""
    from raytune_ft.config import loader

    recipe = loader.load_recipe(config, overrides or [])
    from raytune_ft.inspection import inspect_recipe

    inspect_recipe(recipe, rows)


@verb("plan")
def plan(
    config: Recipe,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="What there is, such as 8GiB.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Predict memory, steps and tokens, without weights and without a GPU."""
    from raytune_ft.config import loader

    recipe = loader.load_recipe(config, overrides or [])
    from raytune_ft.inspection import print_plan

    return print_plan(recipe, gpu_memory, as_json=as_json)


@verb("export")
def export(run: Run, out: Out = None) -> None:
    """Write a run's adapter as plain peft loads it."""
    from raytune_ft import export as export_module

    print(export_module.export(run, out))


ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest weight file.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Weights to merge into: original, or dequantized as training saw them."
    ),
]


@verb("merge")
def merge(run: Run, out: Out = None, max_shard_size: ShardSize = "2GB", base: Base = None) -> None:
    """Merge a run's adapter into its base model."""
    if base not in (None, "original", "dequantized"):
        raise RecipeError(f"--base: expected original or dequantized, got '{base}'")
    if not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?)?B", max_shard_size, re.IGNORECASE):
        raise RecipeError(
            f"--max-shard-size: expected such as 2GB or 500MB, got '{max_shard_size}'"
        )
    from raytune_ft import export as export_module

    print(export_module.merge(run, out, max_shard_size, base))


Chattable = Annotated[
    str, typer.Argument(metavar="PATH", help="A run, adapter, merged or plain model folder.")
]
Bits = Annotated[int | None, typer.Option("--bits", help="4 or 8; default: as in training.")]


@verb("chat")
def chat(
    path: Chattable,
    ask: Annotated[
        list[str] | None, typer.Option("--ask", help="Answer this and leave; repeatable.")
    ] = None,
    bits: Bits = None,
    system: Annotated[str | None, typer.Option("--system", help="System text.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 answers greedily.")] = 0.1,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus.")] = 0.75,
    top_k: Annotated[int, typer.Option(min=0, help="Candidates per token.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same answers.")] = 0,
) -> int:
    """Talk to a trained model."""
    from raytune_ft.chat import run_chat

    return run_chat(
        path,
        ask=ask or [],
        bits=bits,
        system=system,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


@verb("serve")
def serve(
    path: Chattable,
    host: Annotated[str, typer.Option(help="Address; others than loopback need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8000,
    bits: Bits = None,
) -> int:
    """Serve a trained model: an OpenAI-compatible endpoint and a chat page."""
    from raytune_ft.serving.app import serve as run

    return run(path, host=host, port=port, bits=bits)


@verb("version")
def print_version() -> None:
    """Print the version."""
    from raytune_ft import __version__

    print(f"{PROGRAM} {__version__}")
