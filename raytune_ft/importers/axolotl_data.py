"""Axolotl's `datasets` entries become `data.sources`."""

from __future__ import annotations

from typing import Any

from raytune_ft.importers.draft import Keys

COLUMNS: dict[str, dict[str, str]] = {
    "alpaca": {},
    "alpaca_chat": {},
    "gpteacher": {"output": "response"},
    "oasst": {"instruction": "INSTRUCTION", "output": "RESPONSE"},
    "alpaca_chat.load_qa": {"instruction": "question", "output": "answer"},
    "alpaca_chat.load_concise": {},
    "explainchoice": {"instruction": "question", "output": "solution"},
    "summarizetldr": {"instruction": "article", "output": "summary"},
    "sharegpt": {},
}
"""Row types -> our column: theirs, where it is called otherwise."""
FILES = ("json", "csv", "parquet", "arrow", "text")
MACHINERY = (
    "ds_type", "shards_idx", "preprocess_shards", "trust_remote_code", "chat_template", "roles",
    "message_field_training_detail", "conversation",
)  # fmt: skip
ELSEWHERE = {
    "shards": "set limit at the source",
    "message_field_training": "loss: assistant, last or all is chosen per source",
    "train_on_eos": "the end of each trained answer is trained",
    "drop_system_message": "remove system messages from the rows",
    "revision": "the newest revision is read; bring the wanted one as files",
    "input_transform": "change the rows beforehand",
    "field_thinking": "rename the field to reasoning_content in the rows",
    "chat_template_jinja": "write it into the model folder as chat_template.jinja",
    "skip": "remove the first rows from the file",
}


def add_dataset(keys: Keys, loss: str | None, *, is_text: bool, are_pairs: bool = False) -> None:
    """Add the source of one entry, or note why it cannot be one."""
    fields = {**_rows(keys), "loss": loss}
    kind = keys.values.get("type")
    if are_pairs:
        fields["columns"] = _pair_columns(keys)
    elif kind is not None and isinstance(kind.data, dict):
        fields["columns"] = _own_type(keys)
    else:
        how = "completion" if is_text else str(keys.plain("type", "") or "")
        fields |= _by_type(keys, how)
    keys.drop(MACHINERY)
    keys.leave(ELSEWHERE)
    if keys.plain("roles_to_train", ["assistant"]) not in (["assistant"], ["gpt"]):
        keys.note("roles_to_train", "other roles are trained there", "loss: all trains every turn")
    paths = fields.pop("paths")
    if "skip" not in fields:
        for path in paths:
            keys.draft.add_source({"path": path, **fields}, keys.line)


def _rows(keys: Keys) -> dict[str, Any]:
    """Return where the rows are: `paths`, subset and split."""
    path, files = keys.plain("path"), keys.texts("data_files")
    split = keys.plain("split", "train")
    paths = [path]
    if files:
        in_hub = path not in FILES and "/" in str(path) and not str(path).startswith((".", "/"))
        if in_hub:
            keys.note("data_files", "data_files of a hub data set are not chosen", "use data_dir")
        else:
            paths = files
    return {
        "paths": paths, "name": keys.plain("name"), "split": split if split != "train" else None,
    }  # fmt: skip


def _by_type(keys: Keys, kind: str) -> dict[str, Any]:
    """Return the source's fields that a named row type decides."""
    base = kind.partition(":")[0].partition(".")[0]
    if base in ("completion", "pretrain"):
        column = keys.plain("field") or keys.plain("text_column") or "text"
        columns = {"text": column} if column != "text" else None
        return {"map": "pretrain_map_fn", "columns": columns}
    if base == "chat_template":
        return {"columns": _messages(keys)}
    known = COLUMNS.get(kind, COLUMNS.get(base))
    if known is None:
        keys.note(
            "type", f"row type {kind or '(rows that are token ids)'} is not known",
            "write the rows as jsonl with `messages`",
        )  # fmt: skip
        return {"skip": True}
    if base.startswith("alpaca"):
        keys.note(
            "type", f"row type {kind}: rows are asked in model.template, without a preamble",
            "give it as data.system if you want it",
        )  # fmt: skip
    return {"columns": known or None}


def _messages(keys: Keys) -> dict[str, str] | None:
    """Return our column -> theirs for a list of messages."""
    mapping = keys.mapping("message_property_mappings")
    role = str(keys.text("message_field_role") or mapping.get("role", "role"))
    content = str(keys.text("message_field_content") or mapping.get("content", "content"))
    column = keys.plain("field_messages", "messages")
    ours = {("role", "content"): "messages", ("from", "value"): "conversations"}.get(
        (role, content)
    )
    if ours is None:
        keys.note(
            "message_property_mappings", f"messages have {role} and {content}",
            "rename them in the rows: role and content",
        )  # fmt: skip
        ours = "messages"
    tools = keys.plain("field_tools", "tools")
    named = {ours: column, "tools": tools}
    return {our: their for our, their in named.items() if our != their} or None


def _pair_columns(keys: Keys) -> dict[str, str] | None:
    """Return our column -> theirs for preference rows; the named row types are recognised."""
    section = keys.section("type")
    if section is not None:
        section.drop(["prompt_format", "chosen_format", "rejected_format"])
    elif str(keys.plain("type", "")).startswith("passthrough"):
        keys.note("type", "answers are written out there", "here the template writes them")
    named = {"messages": keys.plain("field_messages", "messages")}
    for ours in ("prompt", "chosen", "rejected", "system"):
        theirs = keys.plain(f"field_{ours}")
        if section is not None:
            theirs = section.plain(f"field_{ours}", theirs)
        named[ours] = theirs or ours
    return {ours: theirs for ours, theirs in named.items() if ours != theirs} or None


def _own_type(keys: Keys) -> dict[str, str] | None:
    """Read a type that names its columns; its text layout is the template's matter here."""
    section = keys.section("type")
    if section is None:
        return None
    named = {
        ours: section.plain(f"field_{ours}")
        for ours in ("instruction", "input", "output", "system")
    }
    for key in ("format", "no_input_format", "system_format"):
        if key in section:
            section.note(key, f"{section.name(key)} is not carried over", "model.template asks")
    section.carry("system_prompt", "data.system")
    return {ours: theirs for ours, theirs in named.items() if theirs and ours != theirs} or None
