"""Verbs for a finished run: export, merge, chat, serve."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from raytune_ft.cli.app import Out, Run, verb
from raytune_ft.errors import RecipeError

Push = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", help="Send it to this repository, private if new; HF_TOKEN is needed."
    ),
]


@verb("export")
def export(run: Run, out: Out = None, push: Push = None) -> None:
    """Write a run's adapter as plain peft loads it, with tokenizer and model card."""
    from raytune_ft import export as export_module

    with _pushed(push) as done:
        done.append(export_module.export(run, out, again=push is not None))


@contextmanager
def _pushed(name: str | None) -> Iterator[list[Path]]:
    """Print the folder that the block puts into the list, sent to the hub where a name is given."""
    from raytune_ft.exporting import hub

    if name is not None:
        hub.check(name)
    done: list[Path] = []
    yield done
    print(done[0])
    if name is not None:
        print(hub.push(done[0], name, _tell))


ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest weight file.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Weights to merge into: original, or dequantized as training saw them."
    ),
]


Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        help="Tensor names and files: original, as the base's; or native, as transformers' own.",
    ),
]


Format = Annotated[
    str,
    typer.Option(
        "--format", help="safetensors, fp8, int8, or gguf-TYPE such as gguf-q8_0 or gguf-q4_k_m."
    ),
]
HeldOut = Annotated[
    bool | None,
    typer.Option(
        "--held-out-loss/--no-held-out-loss",
        help="Measure data.validation on both bases; default: for small quantised ones.",
    ),
]


@verb("merge")
def merge(
    run: Run,
    out: Out = None,
    max_shard_size: ShardSize = "2GB",
    base: Base = None,
    layout: Layout = "original",
    form: Format = "safetensors",
    held_out: HeldOut = None,
    push: Push = None,
) -> None:
    """Merge a run's adapter into its base model, for transformers, vLLM, llama.cpp or Ollama."""
    if layout not in ("original", "native"):
        raise RecipeError(f"--layout: expected original or native, got '{layout}'")
    if base not in (None, "original", "dequantized"):
        raise RecipeError(f"--base: expected original or dequantized, got '{base}'")
    if not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?)?B", max_shard_size, re.IGNORECASE):
        raise RecipeError(
            f"--max-shard-size: expected such as 2GB or 500MB, got '{max_shard_size}'"
        )
    from raytune_ft import export as export_module

    names: Literal["original", "native"] = "native" if layout == "native" else "original"
    with _pushed(push) as done:
        done.append(
            export_module.merge(
                run,
                out,
                max_shard_size,
                base,
                names,
                form=form,
                held_out=held_out,
                again=push is not None,
                tell=_tell,
            )
        )


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


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
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="Adapter folder to put onto PATH.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--prompt-template", help="Default: as in training.")
    ] = None,
    system_template: Annotated[
        str | None, typer.Option("--system-template", help="System text by XTuner's name.")
    ] = None,
    bot_name: Annotated[
        str, typer.Option("--bot-name", help="Stands for {bot_name} in the system text.")
    ] = "BOT",
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare", help="A second model beside it: base (without the adapter) or a path."
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option("--rows", help="Folder of the training rows that /good and /bad write.")
    ] = "chat_rows",
    plain: Annotated[
        bool, typer.Option("--plain", help="Text as it comes instead of markdown.")
    ] = False,
) -> int:
    """Talk to a trained model, or to two beside each other."""
    from raytune_ft.chat import run_chat

    if system_template is not None:
        if system is not None:
            raise RecipeError("--system-template: give it or --system, not both")
        system = _system_text(system_template, bot_name)
    if template is not None:
        _check_template(template)

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
        adapter=adapter,
        template=template,
        compare=compare,
        rows=rows,
        plain=plain,
    )


def _check_template(name: str) -> None:
    from raytune_ft.config.document import nearest
    from raytune_ft.data.templating.prompts import PROMPTS

    known = ["tokenizer", *PROMPTS]
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean '{near}'?" if near else f"choose: {', '.join(known)}"
        raise RecipeError(f"--prompt-template: no template '{name}'; {hint}")


def _system_text(name: str, bot_name: str) -> str:
    from raytune_ft.data.templating.prompts import SYSTEMS

    if name not in SYSTEMS:
        raise RecipeError(f"--system-template: no '{name}'; choose: {', '.join(SYSTEMS)}")
    return SYSTEMS[name].replace("{bot_name}", bot_name)


@verb("serve")
def serve(
    path: Chattable,
    host: Annotated[str, typer.Option(help="Address; others than loopback need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8000,
    bits: Bits = None,
    adapters: Annotated[
        str | None, typer.Option(help="Folder of runs or adapters, served by their names.")
    ] = None,
    keys: Annotated[
        str | None, typer.Option(help="YAML file of API keys' hashes and limits.")
    ] = None,
    access_log: Annotated[
        str | None, typer.Option(help="File for one JSON line per request.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    engine: Annotated[
        Literal["auto", "embedded", "vllm"], typer.Option(help="What generates.")
    ] = "auto",
) -> int:
    """Serve a trained model: an OpenAI-compatible endpoint and a chat page."""
    from raytune_ft.serving.app import serve as run

    options = {
        "adapters": adapters,
        "keys": keys,
        "access_log": access_log,
        "min_replicas": replicas,
        "engine": engine,
    }
    return run(path, host=host, port=port, bits=bits, options=options)
