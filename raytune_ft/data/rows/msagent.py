"""MSAgent-Bench rows: tool use in ReAct form, as XTuner v0.1.9 writes it.

The column is the text of a Python list. The reference runs `eval` on it; here it is read as a
literal, so a row can hold nothing but data.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from raytune_ft.data.rows.chat_rows import field
from raytune_ft.data.rows.columns import Row, list_in, shown, text_of
from raytune_ft.data.segments import Message
from raytune_ft.errors import DataError

_THINK = ("<|startofthink|>", "<|endofthink|>")
_EXEC = ("<|startofexec|>", "<|endofexec|>")
_FENCE = re.compile(r"^\s*```(?:JSON|json)?\s*|\s*```\s*$")

_INSTRUCTION = """\
你是一个可以调用外部工具的助手，可以使用的工具包括：
{tools}

                如果使用工具请遵循以下格式回复：
```

                Thought:思考你当前步骤需要解决什么问题，是否需要使用工具

                Action:工具名称，你的工具必须从 [{names}] 选择

                Action Input:工具输入参数
```
工具返回按照以下格式回复：
```

                Response:调用工具后的结果
```
如果你已经知道了答案，或者你不需要工具，
                请遵循以下格式回复
```

                Thought:给出最终答案的思考过程

                Final Answer:最终答案
```
开始!
"""


class _BrokenCallError(ValueError):
    """The first half of an answer cannot be read; the reference drops such rows."""


def msagent_react_map_fn(row: Row, where: str) -> list[Message]:
    """Read the literal in `conversations`; an unreadable tool call drops the row.

    Raises:
        DataError: the column is no literal list of {from, value}.
    """
    messages: list[Message] = []
    system, question = "", ""
    where = f"{where}: column 'conversations'"
    for place, item in enumerate(list_in(_literal(row, where), where), start=1):
        at = f"{where}, message {place}"
        sender, value = field(item, "from", at), field(item, "value", at)
        if sender == "system":
            system = _system(value)
        elif sender == "user":
            question += value + "\n"
        elif sender == "assistant":
            try:
                messages += _answer(value, system, question)
            except _BrokenCallError:
                return []
            system, question = "", ""
        else:
            raise DataError(
                f"{at} is from '{shown(sender)}'; known are system, user, assistant; "
                "choose another data.sources[].map, or leave the row out with data.on_error: skip"
            )
    return messages


def _literal(row: Row, where: str) -> Any:
    text = text_of(row, "conversations", where.partition(": column")[0])
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise DataError(
            f"{where} is not the text of a Python list of {{'from', 'value'}}; "
            "choose another data.sources[].map, or leave the row out with data.on_error: skip"
        ) from None


def _system(value: str) -> str:
    tools = {tool["name"]: _tool_text(tool) for tool in _objects(value)}
    return _INSTRUCTION.replace("{names}", str(list(tools)), 1).replace("{tools}", str(tools), 1)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Find every JSON object in a text that describes a tool, outermost first."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(found, dict) and {"name", "description"} <= found.keys():
                yield found
        start = text.find("{", end)


def _tool_text(tool: dict[str, Any]) -> str:
    try:
        inputs = {item["name"]: item["description"] for item in tool["paths"][0]["parameters"]}
    except (KeyError, IndexError, TypeError):
        return str(tool["description"])
    return f"{tool['description']}\n输入参数: {inputs}"


def _answer(value: str, system: str, question: str) -> list[Message]:
    """Write one assistant value as one or two turns."""
    call, _, result = value.partition(_EXEC[0])
    turn = [{"role": "system", "content": system}] if system else []
    turn.append({"role": "user", "content": question})
    turn.append({"role": "assistant", "content": _call_text(call)})
    return [*turn, *_result_turn(result)]


def _call_text(call: str) -> str:
    thought, thinks, rest = call.partition(_THINK[0])
    if not thinks:
        return f"Final Answer:{call}\n"
    try:
        action = _json(rest.partition(_THINK[1])[0])
        lines = f"Action:{action['api_name']}\nAction Input:{action['parameters']}\n"
    except (ValueError, KeyError, TypeError) as error:
        raise _BrokenCallError from error
    return (f"Thought:{thought}\n" if thought.strip() else "") + lines + "\n"


def _result_turn(result: str) -> list[Message]:
    """Write a tool's result as a turn without a question; nothing if it cannot be read."""
    executed, _, final = result.partition(_EXEC[1])
    try:
        response = _json(executed)
    except ValueError:
        return []
    if not final:
        return []
    return [
        {"role": "system", "content": f"Response:{response}\n"},
        {"role": "assistant", "content": f"Final Answer:{final}\n"},
    ]


def _json(text: str) -> Any:
    return json.loads(_FENCE.sub("", text))
