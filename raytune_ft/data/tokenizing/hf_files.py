"""Tokenizer files for other tools: a TextTokenizer in, what transformers and vLLM read out.

tokenizer.json is the pipeline that training used. tokenizer_config.json asks for the class that
takes it as it is: transformers 5 builds LlamaTokenizer's pipeline anew, and other ids come out.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors

from raytune_ft.data.templating.templates import PROMPTS, TOKENIZER
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.tokenizing.tokenizer_spec import START_TOKENS

CHAT_TEMPLATE = (
    "{%- set state = namespace(round=0, system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set state.system = message['content'] -%}"
    "{%- elif message['role'] == 'user' -%}{%- set state.round = state.round + 1 -%}"
    "{{ BOS + (SYSTEM if state.system else '') + INPUT }}{%- set state.system = '' -%}"
    "{%- else -%}{{ message['content'] + EOS }}"
    "{%- endif -%}{%- endfor -%}"
)
"""One turn after another, each with its start and end tokens, as the prompt templates have it."""

VALUES = {
    "{system}": "state.system",
    "{round}": "state.round | string",
    "{input}": "message['content']",
}


def write(tokenizer: TextTokenizer, folder: Path, chat_template: str | None) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    backend = Tokenizer.from_str(tokenizer.spec.tokenizer_json)
    texts = [backend.id_to_token(id_) for id_ in tokenizer.bos_ids]
    # a chat template can only write them as text
    silent = [backend.id_to_token(id_) for id_ in sorted(tokenizer.spec.silent_ids)]
    backend.add_special_tokens([AddedToken(text, special=True) for text in silent])
    if texts and backend.post_processor is None:
        backend.post_processor = processors.TemplateProcessing(
            single=[*texts, "$A"],
            pair=[*texts, "$A", "$B:1"],
            special_tokens=list(zip(texts, tokenizer.bos_ids, strict=True)),
        )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        START_TOKENS: texts,
        **tokenizer.named_tokens,
        "eos_token": backend.id_to_token(tokenizer.eos_id),
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def chat_template(name: str, tokenizer: TextTokenizer) -> str | None:
    """Return the Jinja text of a template for chats of system, user and assistant.

    The text is the one of training; training encodes its parts one by one, so where a tokenizer
    puts a space before every text the ids of the parts can differ by it.

    Args:
        name: value of `model.template`.
        tokenizer: of the model.
    """
    if name == TOKENIZER:
        return tokenizer.chat_template
    prompt = PROMPTS[name]
    decode = tokenizer.decode
    words = {
        "BOS": json.dumps(decode(tokenizer.bos_ids, skip_special_tokens=False)),
        "EOS": json.dumps(decode([tokenizer.eos_id], skip_special_tokens=False)),
        "SYSTEM": _expression(prompt.system),
        "INPUT": _expression(prompt.instruction),
    }
    text = CHAT_TEMPLATE
    for word, expression in words.items():
        text = text.replace(word, expression)
    return text


def _expression(pattern: str) -> str:
    """Return a Jinja expression of a text with `{system}`, `{input}` or `{round}` in it."""
    parts, rest = [], pattern
    while found := [(rest.find(mark), mark) for mark in VALUES if mark in rest]:
        at, mark = min(found)
        parts += [json.dumps(rest[:at], ensure_ascii=False), VALUES[mark]]
        rest = rest[at + len(mark) :]
    return " + ".join([*parts, json.dumps(rest, ensure_ascii=False)])
