"""Commands of the terminal chat: `/name rest of the line`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft.chat.history import split_turns
from raytune_ft.chat.transcript import Transcript
from raytune_ft.errors import DataError, RecipeError

if TYPE_CHECKING:
    from raytune_ft.chat.terminal import Conversation

SAVED = "chat.json"
NONE = "-"
"""Stands for no system text."""


@dataclass(frozen=True)
class Command:
    """What a word does."""

    usage: str
    help: str
    run: Callable[[Conversation, str], str | None]
    """Takes the conversation and the rest of the line; returns what to say."""


@dataclass(frozen=True)
class Bounds:
    """What a number may be."""

    kind: type[int] | type[float]
    low: float
    high: float


PARAMS = {
    "temperature": Bounds(float, 0, 5),
    "top_p": Bounds(float, 0, 1),
    "top_k": Bounds(int, 0, 1_000_000),
    "max_new_tokens": Bounds(int, 1, 1_000_000),
    "seed": Bounds(int, 0, 2**63 - 1),
    "frequency_penalty": Bounds(float, -2, 2),
    "presence_penalty": Bounds(float, -2, 2),
}
"""What /params sets; fields of Sampling."""


def _reset(talk: Conversation, _rest: str) -> str:
    for side in talk.sides:
        side.messages = []
    return "The conversation is forgotten."


def _system(talk: Conversation, rest: str) -> str:
    if rest:
        talk.set_system("" if rest == NONE else rest)
    system = talk.sides[0].chat.system
    return f"system text: {system}" if system else "no system text"


def _undo(talk: Conversation, _rest: str) -> str:
    asked = talk.last_question()
    for side in talk.sides:
        system, turns = split_turns(side.messages)
        side.messages = system + [message for turn in turns[:-1] for message in turn]
    return f"forgotten: {asked}"


def _retry(talk: Conversation, _rest: str) -> None:
    question = talk.last_question()
    before = [list(side.messages) for side in talk.sides]
    _undo(talk, "")
    if not talk.answer(question):
        for side, messages in zip(talk.sides, before, strict=True):
            side.messages = messages


def _params(talk: Conversation, rest: str) -> str:
    changes = dict(_param(word) for word in rest.split())
    talk.sampling = replace(talk.sampling, **changes)
    return "  ".join(f"{name}={getattr(talk.sampling, name)}" for name in PARAMS)


def _param(word: str) -> tuple[str, Any]:
    name, _, text = word.partition("=")
    bounds = PARAMS.get(name)
    if bounds is None:
        raise RecipeError(f"/params {word}: write NAME=VALUE, of {', '.join(PARAMS)}")
    try:
        value = bounds.kind(text)
    except ValueError:
        value = None
    if value is None or not bounds.low <= value <= bounds.high:
        raise RecipeError(f"/params {word}: {name} is {bounds.low:g} to {bounds.high:g}")
    return name, value


def _save(talk: Conversation, rest: str) -> str:
    side, path = talk.sides[0], Path(_one_path(rest, SAVED))
    params = {name: getattr(talk.sampling, name) for name in PARAMS}
    Transcript(side.label, side.chat.system, side.messages, params).save(path)
    return f"saved: {path}"


def _load(talk: Conversation, rest: str) -> str:
    path = Path(_one_path(rest, SAVED))
    found = Transcript.load(path)
    words = [f"{name}={value}" for name, value in found.params.items()]
    talk.sampling = replace(talk.sampling, **dict(_param(word) for word in words))
    talk.set_system(found.system)
    for side in talk.sides:
        side.messages = list(found.messages)
    turns = len(split_turns(found.messages)[1])
    other = "" if found.model == talk.sides[0].label else f", of {found.model}"
    return f"loaded: {path}, {turns} turns{other}"


def _good(talk: Conversation, rest: str) -> str:
    answers = talk.last_answers()
    if len(answers) == 1:
        if rest:
            raise RecipeError("/good takes nothing behind it; /bad TEXT says what was right")
        asked, answer = answers[0]
        return _kept(talk.feedback.good(asked, answer))
    if rest not in ("1", "2"):
        raise RecipeError("/good 1 or /good 2: which of the two answers?")
    better, worse = int(rest) - 1, 2 - int(rest)
    asked, answer = answers[better]
    path = talk.feedback.better(asked, answer, answers[worse][1])
    talk.feedback.good(asked, answer)
    talk.replace_answers(answer)  # both go on from the better one
    return _kept(path)


def _bad(talk: Conversation, rest: str) -> str:
    if not rest:
        raise RecipeError("/bad TEXT: say what the answer should have been")
    asked, answer = talk.last_answers()[0]
    path = talk.feedback.better(asked, rest, answer)
    talk.feedback.good(asked, rest)
    talk.replace_answers(rest)
    return _kept(path)


def _kept(path: Path) -> str:
    return f"kept in {path}; `raytune-ft train` takes it under data.sources"


def _one_path(rest: str, default: str) -> str:
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise DataError(f"{rest}: no file name ({error})") from None
    if len(words) > 1:
        raise DataError(f"{rest}: one file name, in quotes if it has spaces")
    return str(Path(words[0] if words else default).expanduser())


def _help(_talk: Conversation, _rest: str) -> str:
    return HELP


COMMANDS = {
    "/retry": Command("/retry", "answer the last question again", _retry),
    "/undo": Command("/undo", "forget the last question and its answer", _undo),
    "/reset": Command("/reset", "forget the conversation", _reset),
    "/system": Command("/system [TEXT]", f"show or set the system text; {NONE} for none", _system),
    "/params": Command("/params [NAME=VALUE]", "show or set how answers are drawn", _params),
    "/save": Command("/save [FILE]", f"save the conversation ({SAVED})", _save),
    "/load": Command("/load [FILE]", "go on with a saved one", _load),
    "/good": Command("/good [1|2]", "keep the answer as a training row; of two, the better", _good),
    "/bad": Command("/bad TEXT", "keep what the answer should have been", _bad),
    "/help": Command("/help", "show this", _help),
}
LEAVE = ("/exit", "/quit")
_USAGES = [
    *((command.usage, command.help) for command in COMMANDS.values()),
    ("/exit, Ctrl-D", "leave"),
    ("Ctrl-C", "stop the answer"),
    ("Alt+Enter", 'start a line; or write between """ and """'),
]
HELP = "\n".join(f"{usage:<22}{what}" for usage, what in _USAGES)
