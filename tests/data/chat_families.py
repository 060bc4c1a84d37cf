"""Chat templates shaped like those of today's families, each with an oracle that writes by hand.

An oracle takes messages of the roles system, user and assistant and lists pieces of text; what a
row's author wrote is marked `theirs`, and what the model is to learn `learn`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from raytune_ft.data.segments import Message
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer

FOLDER = Path(__file__).resolve().parent / "jinja"


@dataclass(frozen=True)
class Piece:
    text: str
    theirs: bool = False
    learn: bool = False


Oracle = Callable[[Sequence[Message]], list[Piece]]


@dataclass(frozen=True)
class Family:
    name: str
    oracle: Oracle
    special: tuple[str, ...]
    eos: str
    bos: str = "<s>"
    stops: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """Tokens that are added and not special."""
    rewrites: bool = False
    """Whether an earlier prompt is not a prefix of the whole."""

    @property
    def template(self) -> str:
        return (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")

    @property
    def marked(self) -> str:
        """The template with generation marks where the file has comments."""
        return re.sub(r"\{#- ((?:end)?generation) -#\}", r"{%- \1 -%}", self.template)

    def tokenizer(self, base: TextTokenizer, template: str | None = None) -> TextTokenizer:
        """The byte-level tokenizer of the tests with this family's tokens and template."""
        backend = Tokenizer.from_str(base.spec.tokenizer_json)
        special = dict.fromkeys((self.bos, self.eos, *self.special))
        backend.add_special_tokens(list(special))
        backend.add_tokens([AddedToken(word, normalized=False) for word in self.words])
        return TextTokenizer(
            dataclasses.replace(
                base.spec,
                tokenizer_json=backend.to_str(),
                bos_ids=(backend.token_to_id(self.bos),),
                eos_id=backend.token_to_id(self.eos),
                extra_stop_ids=frozenset(backend.token_to_id(stop) for stop in self.stops),
                named_tokens=(("bos_token", self.bos), ("eos_token", self.eos)),
                chat_template=template or self.template,
            )
        )


def split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """Take the system text off the beginning."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


def turns(
    messages: Sequence[Message],
    head: Callable[[str], str],
    end: str,
    after: str = "",
    change: Callable[[str], str] = str,
) -> list[Piece]:
    """Write turns of one form: head, content, end (learned behind an answer), what comes after."""
    pieces = []
    for message in messages:
        learn = message["role"] == "assistant"
        pieces += [
            Piece(head(message["role"])),
            Piece(change(message["content"]), theirs=True, learn=learn),
            Piece(end, learn=learn),
            Piece(after),
        ]
    return pieces


def im_start(role: str) -> str:
    return f"<|im_start|>{role}\n"


def qwen25(messages: Sequence[Message]) -> list[Piece]:
    told, rest = split_system(messages)
    first = [
        Piece("<|im_start|>system\n"),
        Piece("Be a helpful assistant.") if told is None else Piece(told, theirs=True),
        Piece("<|im_end|>\n"),
    ]
    return [*first, *turns(rest, im_start, "<|im_end|>", "\n")]


def qwen3(messages: Sequence[Message]) -> list[Piece]:
    """Thoughts of earlier answers are gone; the last answer has some, however empty."""
    pieces = []
    for place, message in enumerate(messages):
        said, thought, learn = message["content"], "", message["role"] == "assistant"
        if learn and "</think>" in said:
            before, said = said.split("</think>")[0], said.split("</think>")[-1].lstrip("\n")
            thought = before.rstrip("\n").split("<think>")[-1].lstrip("\n")
        pieces.append(Piece(im_start(message["role"])))
        if learn and place == len(messages) - 1:
            pieces += [
                Piece("<think>\n", learn=True),
                Piece(thought.strip("\n"), theirs=True, learn=True),
                Piece("\n</think>\n\n", learn=True),
            ]
            said = said.lstrip("\n")
        pieces += [
            Piece(said, theirs=True, learn=learn),
            Piece("<|im_end|>", learn=learn),
            Piece("\n"),
        ]
    return pieces


def llama3(messages: Sequence[Message]) -> list[Piece]:
    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    told, rest = split_system(messages)
    first = [
        Piece("<|begin_of_text|>" + head("system") + "Today Date: 26 Jul 2024\n\n"),
        Piece((told or "").strip(), theirs=True),
        Piece("<|eot_id|>"),
    ]
    return [*first, *turns(rest, head, "<|eot_id|>", change=str.strip)]


def gemma(messages: Sequence[Message]) -> list[Piece]:
    def head(role: str) -> str:
        return f"<start_of_turn>{'model' if role == 'assistant' else role}\n"

    told, rest = split_system(messages)
    pieces = turns(rest, head, "<end_of_turn>", "\n", change=str.strip)
    opening = [] if told is None else [Piece(told, theirs=True), Piece("\n\n")]
    return [Piece("<bos>"), pieces[0], *opening, *pieces[1:]]


def mistral(messages: Sequence[Message]) -> list[Piece]:
    told, rest = split_system(messages)
    last = max(i for i, message in enumerate(rest) if message["role"] == "user")
    pieces = [Piece("<s>")]
    for place, message in enumerate(rest):
        content = message["content"]
        if message["role"] == "user":
            system = [] if told is None else [Piece(told, theirs=True), Piece("\n\n")]
            pieces += [Piece("[INST] "), *(system if place == last else [])]
            pieces += [Piece(content, theirs=True), Piece(" [/INST]")]
        else:
            pieces += [Piece(" ", learn=True), Piece(content, theirs=True, learn=True)]
            pieces += [Piece("</s>", learn=True)]
    return pieces


def llama2(messages: Sequence[Message]) -> list[Piece]:
    told, rest = split_system(messages)
    pieces = []
    for place, message in enumerate(rest):
        content = message["content"]
        if message["role"] == "assistant":
            pieces += [Piece(" ", learn=True), Piece(content.strip(), theirs=True, learn=True)]
            pieces += [Piece(" ", learn=True), Piece("</s>", learn=True)]
            continue
        pieces.append(Piece("<s>[INST] "))
        if place == 0 and told is not None:
            pieces += [Piece("<<SYS>>\n"), Piece(told, theirs=True), Piece("\n<</SYS>>\n\n")]
            content = content.rstrip()
            # nothing of the question is left: the blanks before it are trimmed too
            if not content:
                pieces[-1] = Piece("\n<</SYS>>")
        else:
            content = content.strip()
        pieces += [Piece(content, theirs=True), Piece(" [/INST]")]
    return pieces


def phi3(messages: Sequence[Message]) -> list[Piece]:
    return turns(messages, lambda role: f"<|{role}|>\n", "<|end|>", "\n")


def phi4(messages: Sequence[Message]) -> list[Piece]:
    return turns(messages, lambda role: f"<|im_start|>{role}<|im_sep|>", "<|im_end|>")


def glm4(messages: Sequence[Message]) -> list[Piece]:
    """The next role's token is what ends an answer; the end of text ends the last one."""
    pieces = [Piece("[gMASK]<sop>")]
    for place, message in enumerate(messages):
        learn = message["role"] == "assistant"
        ends_answer = place > 0 and messages[place - 1]["role"] == "assistant"
        pieces += [
            Piece(f"<|{message['role']}|>", learn=ends_answer),
            Piece("\n"),
            Piece(message["content"], theirs=True, learn=learn),
        ]
    return [*pieces, Piece("<|endoftext|>", learn=True)]


def smollm2(messages: Sequence[Message]) -> list[Piece]:
    told, rest = split_system(messages)
    if told is None:
        default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        first = [Piece(im_start("system") + default + "<|im_end|>\n")]
    else:
        first = turns(messages[:1], im_start, "<|im_end|>", "\n")
    return [*first, *turns(rest, im_start, "<|im_end|>", "\n")]


def zephyr(messages: Sequence[Message]) -> list[Piece]:
    return turns(messages, lambda role: f"<|{role}|>\n", "</s>", "\n")


CHATML = ("<|im_start|>", "<|im_end|>")
WORDS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THOUGHTS = ("<think>", "</think>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
FAMILIES = {
    family.name: family
    for family in (
        Family("qwen25", qwen25, CHATML, "<|im_end|>", words=WORDS),
        Family("qwen3", qwen3, CHATML, "<|im_end|>", words=(*WORDS, *THOUGHTS)),
        Family("llama3", llama3, HEADERS, "<|eot_id|>", "<|begin_of_text|>"),
        Family("gemma", gemma, ("<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
        Family("mistral", mistral, ("[INST]", "[/INST]"), "</s>", rewrites=True),
        Family("llama2", llama2, (), "</s>"),
        Family("phi3", phi3, ("<|end|>", *ROLES), "<|endoftext|>", stops=("<|end|>",)),
        Family("phi4", phi4, (*CHATML, "<|im_sep|>"), "<|im_end|>"),
        Family(
            "glm4",
            glm4,
            ("[gMASK]", "<sop>", *ROLES, "<|observation|>"),
            "<|endoftext|>",
            stops=("<|user|>", "<|observation|>"),
        ),
        Family("smollm2", smollm2, CHATML, "<|im_end|>"),
        Family("zephyr", zephyr, (), "</s>"),
    )
}
