"""Formats: one row of a data set in, one conversation out.

`data.sources[].map` names a format of today or a map function of XTuner v0.1.9; without it the
data set's first rows decide (`data.recognition`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.config.schema import DataSection, Source
from raytune_ft.data.rows.chat_rows import (
    from_conversation,
    from_messages,
    from_senders,
    read_messages,
)
from raytune_ft.data.rows.columns import (
    OR_SKIP,
    Row,
    check_text,
    check_texts,
    column_of,
    names,
    renamed,
    shown,
    text_if_any,
    text_of,
)
from raytune_ft.data.rows.map_functions import (
    MAP_FUNCTIONS,
    REFERENCE,
    Format,
    pretrain_map_fn,
    turn,
)
from raytune_ft.data.rows.moss import moss_map
from raytune_ft.data.rows.multi_turn import history_of, oasst1_map_fn
from raytune_ft.data.rows.preference import (
    BESIDE,
    CHOSEN,
    PROMPTS,
    REJECTED,
    advice_for_sft,
    read_pair,
)
from raytune_ft.data.rows.recognition import Recognition, recognise
from raytune_ft.data.rows.tool_rows import tools_of
from raytune_ft.data.segments import Conversation, Loss, Message
from raytune_ft.errors import DataError, RecipeError

MOSS, PREFERENCE = "moss", "preference"


def _alpaca(row: Row, where: str) -> list[Message]:
    """Read instruction, input, output, and what LLaMA-Factory adds: history and system."""
    question, answer = text_of(row, "instruction", where), text_of(row, "output", where)
    if answer == "<nooutput>":
        return []
    extra = text_if_any(row, "input", where)
    system = text_if_any(row, "system", where)
    last = turn(f"{question}\n{extra}" if extra else question, answer)
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *history_of(row, where), *last]


def _pair(question: str, answer: str) -> Format:
    """Make the format of a question and an answer: texts, or lists of messages."""

    def read(row: Row, where: str) -> list[Message]:
        first, last = column_of(row, question, where), column_of(row, answer, where)
        if isinstance(first, list) or isinstance(last, list):
            sides = (("user", first), ("assistant", last))
            joined: list[Any] = []
            for role, side in sides:
                joined += side if isinstance(side, list) else [{"role": role, "content": side}]
            return from_messages(joined, f"{where}: columns '{question}', '{answer}'")
        system = text_if_any(row, "system", where) or text_if_any(row, "system_prompt", where)
        return turn(text_of(row, question, where), text_of(row, answer, where), system)

    return Format(read, (question, answer), ("system", "system_prompt", "tools"), question)


def _openai(row: Row, where: str) -> list[Message]:
    return from_messages(column_of(row, "messages", where), f"{where}: column 'messages'")


def _sharegpt(row: Row, where: str) -> list[Message]:
    column = "conversations"
    messages = from_senders(column_of(row, column, where), f"{where}: column '{column}'")
    system = text_if_any(row, "system", where)
    if system and messages and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _conversation(row: Row, where: str) -> list[Message]:
    column = "conversation"
    return from_conversation(column_of(row, column, where), f"{where}: column '{column}'")


def _moss(row: Row, where: str) -> list[Message]:
    raise AssertionError(f"{where}: MOSS rows are written, not read")


def _preference(row: Row, where: str) -> list[Message]:
    raise AssertionError(f"{where}: a preference row is two conversations")


TODAY: Mapping[str, Format] = {
    "alpaca": Format(_alpaca, ("instruction", "output"), ("input", "history", "system", "tools")),
    "sharegpt": Format(_sharegpt, ("conversations",), ("system", "tools")),
    "openai": Format(_openai, ("messages",), ("tools",)),
    "conversation": Format(_conversation, ("conversation",)),
    "prompt_completion": _pair("prompt", "completion"),
    "prompt_response": _pair("prompt", "response"),
    "question_answer": _pair("question", "answer"),
    "question_response": _pair("question", "response"),
    "query_response": _pair("query", "response"),
    "input_output": _pair("input", "output"),
    "text": Format(pretrain_map_fn, ("text",)),
    "oasst1": Format(oasst1_map_fn, ("text",)),
    MOSS: Format(_moss, ("meta_instruction", "chat"), ("num_turns",)),
    PREFERENCE: Format(_preference, (CHOSEN, REJECTED), (*PROMPTS, *BESIDE, "tools")),
}
"""Formats that people have, recognised from the columns."""
FORMATS: Mapping[str, Format] = {**TODAY, **MAP_FUNCTIONS}
"""Every value that `data.sources[].map` may have."""
_COMPAT = {**REFERENCE, "oasst1": REFERENCE["oasst1_map_fn"]}


def to_conversation(
    row: Row, source: Source, data: DataSection, where: str = "row"
) -> Conversation | None:
    """Turn a row into a conversation.

    Args:
        row: columns by name.
        source: the row's data set: `map`, `columns`, `system` and `loss` are read. Sources that
            `open_sources` gives have a `map` wherever the rows could be recognised.
        data: `fill`, `system` and `compat` are read.
        where: the row's place, `file.jsonl:12`, for error messages.

    Returns:
        The conversation, or None when there is no answer to learn from.

    Raises:
        DataError: the row has not the shape that its format needs; begins with `where`.
        RecipeError: no format or map function has this name.
    """
    name, row, columns = _named(row, source, where)
    if name == PREFERENCE:
        advice = advice_for_sft(row, columns.get(CHOSEN, CHOSEN))
        raise DataError(f"{where}: {advice}, {OR_SKIP}")
    if name == MOSS:
        written = moss_map(row, where, data.fill, data.compat)
        return None if written is None else Conversation((), loss=source.loss, written=written)
    format_ = format_of(name)
    read = _COMPAT.get(name, format_.read) if data.compat else format_.read
    messages = _finished(read(row, where), data.fill, where)
    if not messages or not (data.compat or any(map(_answers, messages))):
        return None
    tools = _tools(row, where) if "tools" in format_.optional else ()
    loss = _loss(row, format_, source, where)
    return Conversation(_with_system(messages, source, data), tools, loss)


def _loss(row: Row, format_: Format, source: Source, where: str) -> Loss:
    """Return what is learned: of a prompt nothing, as in TRL's prompt and completion."""
    prompt = row.get(format_.prompt)
    if source.loss != "assistant" or not isinstance(prompt, list):
        return source.loss
    if not any(map(_answers, read_messages(prompt, where))):
        return source.loss
    completion = row.get(format_.columns[1])
    if isinstance(completion, list) and sum(map(_answers, read_messages(completion, where))) > 1:
        raise DataError(
            f"{where}: several answers in '{format_.columns[1]}' behind answers in "
            f"'{format_.prompt}': learned are all of them or the last; "
            f"set data.sources[].loss, or write a row for each, {OR_SKIP}"
        )
    return "last"


def to_pair(
    row: Row, source: Source, data: DataSection, where: str = "row"
) -> tuple[Conversation, Conversation] | None:
    """Turn a preference row into the conversations with its chosen and its rejected answer.

    They differ in their last message, the only one that is learned. Arguments as for
    `to_conversation`; None when an answer is empty.

    Raises:
        DataError: the row has one answer, or not the shape that it needs; begins with `where`.
        RecipeError: no format or map function has the name of `map`.
    """
    name, row, _ = _named(row, source, where)
    if name != PREFERENCE:
        format_of(name)
        raise DataError(
            f"{where}: {name} rows have one answer, and train.objective dpo and orpo compare two; "
            f"give rows with columns chosen and rejected, or set train.objective: sft, {OR_SKIP}"
        )
    both = [_finished(messages, data.fill, where) for messages in read_pair(row, where)]
    if not all(_answers(messages[-1]) for messages in both):
        return None
    tools = _tools(row, where)
    chosen, rejected = (_with_system(messages, source, data) for messages in both)
    return Conversation(chosen, tools, "last"), Conversation(rejected, tools, "last")


def _named(row: Row, source: Source, where: str) -> tuple[str, Row, Mapping[str, str]]:
    """Return a row's format, the row with the columns that it expects, and their own names."""
    name, columns = source.map, source.columns
    if name is None:
        found = recognise([row], columns)
        if found.name is None:
            raise DataError(f"{where}: {found.why}, {OR_SKIP}")
        name, columns = found.name, dict(found.columns)
    return name, renamed(row, columns), columns


def _tools(row: Row, where: str) -> Sequence[Mapping[str, Any]]:
    tools = tools_of(row, where)
    check_texts(list(tools), f"{where}: column 'tools'")
    return tools


def _with_system(messages: list[Message], source: Source, data: DataSection) -> list[Message]:
    """Begin with the recipe's system text, unless the row has one or is mere text."""
    system = data.system if source.system is None else source.system
    has_system = any(message["role"] == "system" for message in messages)
    if system and not has_system and len(messages) > 1:
        return [{"role": "system", "content": fill_text(system, data.fill)}, *messages]
    return messages


def _finished(messages: list[Message], fill: Mapping[str, str], where: str) -> list[Message]:
    """Fill placeholders, and check that every text can be tokenised."""
    done = []
    for message in messages:
        texts: dict[str, str] = {
            key: fill_text(message[key], fill)
            for key in ("content", "reasoning_content")
            if key in message
        }
        for text in texts.values():
            check_text(text, f"{where}: {message['role']} text")
        check_texts(message.get("tool_calls"), f"{where}: a tool call")
        done.append({**message, **texts})
    return done


def _answers(message: Message) -> bool:
    """Tell whether a message has something to learn."""
    if message["role"] != "assistant":
        return False
    reasoning = message.get("reasoning_content", "")
    return bool(message["content"].strip() or reasoning.strip() or message.get("tool_calls"))


def format_of(name: str, key: str = "data.sources[].map") -> Format:
    """Look up a format or map function; RecipeError names the nearest one."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.6)
        hint = f"did you mean '{near[0]}'?" if near else f"choose: {', '.join(FORMATS)}"
        raise RecipeError(f"{key}: no format or map function '{name}'; {hint}")
    return FORMATS[name]


def decide(source: Source, rows: Sequence[Row], key: str) -> tuple[Source, Recognition]:
    """Fix the format of a data set, once, from its first rows or from what the recipe says.

    Args:
        source: as in the recipe.
        rows: its first rows that can be read.
        key: the recipe's field, `data.sources[0]`, for error messages.

    Returns:
        The source with `map` and `columns` set, and why. A source whose rows fit no format stays
        as it is: reading its first row says what is wrong.

    Raises:
        RecipeError: `map` names no format, or `columns` names no column.
    """
    if source.map is None:
        found = recognise(rows, source.columns)
        if found.name is None:
            return source, found
        update: dict[str, Any] = {"map": found.name, "columns": dict(found.columns)}
        source = source.model_copy(update=update)
    else:
        found = Recognition(source.map, f"as {key}.map says", source.columns)
    _check_columns(source, rows, f"{key}.columns")
    return source, found


def _check_columns(source: Source, rows: Sequence[Row], key: str) -> None:
    format_ = format_of(source.map or "", f"{key.rpartition('.')[0]}.map")
    expected = (*format_.columns, *format_.optional)
    for column, own in source.columns.items():
        if column not in expected:
            raise RecipeError(
                f"{key}: '{column}' is no column of {source.map}; it reads {', '.join(expected)}"
            )
        if rows and not any(own in row for row in rows):
            known = dict.fromkeys(str(name) for row in rows for name in row)
            near = difflib.get_close_matches(own, known, n=1, cutoff=0.6)
            hint = f"did you mean '{shown(near[0])}'?" if near else f"columns: {names(known)}"
            raise RecipeError(f"{key}: no column '{own}' in {source.path}; {hint}")


def fill_text(text: str, fill: Mapping[str, str]) -> str:
    """Put words into the `{key}` placeholders of a text."""
    for key, word in fill.items():
        text = text.replace("{" + key + "}", word)
    return text
