"""Texts of XTuner v0.1.9: 12 prompt templates, none at all, and 8 system texts, by their names.

Taken from its xtuner/utils/templates.py (Apache-2.0), spelling as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One row of PROMPTS; `{system}`, `{input}` and `{round}` are filled in."""

    system: str
    instruction: str
    stops: tuple[str, ...] = ()
    """Tokens that end an answer of an untuned chat model, where its vocabulary has them."""


PROMPTS: Mapping[str, Prompt] = {
    "default": Prompt("<|System|>:{system}\n", "<|User|>:{input}\n<|Bot|>:"),
    "zephyr": Prompt("<|system|>\n{system}\n", "<|user|>\n{input}\n<|assistant|>\n"),
    "internlm_chat": Prompt(
        "<|System|>:{system}\n", "<|User|>:{input}<eoh>\n<|Bot|>:", stops=("<eoa>",)
    ),
    "moss_sft": Prompt("{system}\n", "<|Human|>: {input}<eoh>", stops=("<eoc>", "<eom>")),
    "llama2_chat": Prompt(
        "[INST] <<SYS>>\n You are a helpful, respectful and honest assistant. Always answer as "
        "helpfully as possible, while being safe. Your answers should not include any harmful, "
        "unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
        "responses are socially unbiased and positive in nature.\n{system}\n<</SYS>>\n [/INST]",
        "[INST] {input} [/INST]",
    ),
    "code_llama_chat": Prompt("{system}\n", "[INST] {input} [/INST]"),
    "chatglm2": Prompt("{system}\n", "\n\n[Round {round}]\n\n问：{input}\n\n答："),
    "chatglm3": Prompt(
        "<|system|>\n{system}",
        "<|user|>\n{input}<|assistant|>\n",
        stops=("<|user|>", "<|observation|>"),
    ),
    "qwen_chat": Prompt(
        "\n<|im_start|>system\n{system}<|im_end|>",
        "\n<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    "baichuan_chat": Prompt(
        "{system}\n", "<reserved_102>{input}<reserved_103>", stops=("<reserved_102>",)
    ),
    "baichuan2_chat": Prompt(
        "{system}\n", "<reserved_106>{input}<reserved_107>", stops=("<reserved_106>",)
    ),
    "wizardlm": Prompt(
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. {system}\n",
        "USER: {input} ASSISTANT: ",
    ),
    # what that release does without a template: the words alone, for models of plain text
    "none": Prompt("{system}\n", "{input}"),
}

SYSTEMS: Mapping[str, str] = {
    "moss_sft": (
        "You are an AI assistant whose name is {bot_name}.\n"
        "Capabilities and tools that {bot_name} can possess.\n"
        "- Inner thoughts: enabled.\n"
        "- Web search: enabled. API: Search(query)\n"
        "- Calculator: enabled. API: Calculate(expression)\n"
        "- Equation solver: enabled. API: Solve(equation)\n"
        "- Text-to-image: disabled.\n"
        "- Image edition: disabled.\n"
        "- Text-to-speech: disabled.\n"
    ),
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n"
    ),
    "arxiv_gentile": (
        "If you are an expert in writing papers, please generate a good paper title for this "
        "paper based on other authors' descriptions of their abstracts.\n"
    ),
    "colorist": (
        "You are a professional color designer. "
        "Please provide the corresponding colors based on the description of Human.\n"
    ),
    "coder": (
        "You are a professional programer. "
        "Please provide the corresponding code based on the description of Human.\n"
    ),
    "lawyer": "你现在是一名专业的中国律师，请根据用户的问题给出准确、有理有据的回复。\n",
    "medical": "如果你是一名医生，请根据患者的描述回答医学问题。\n",
    "sql": (
        "If you are an expert in SQL, please generate a good SQL Query for Question "
        "based on the CREATE TABLE statement.\n"
    ),
}
"""System texts; only `moss_sft` has a place to fill in, `{bot_name}`."""
