"""tiktoken: a rank file such as Qwen's in, a `tokenizers` pipeline with the same ids out."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from raytune_ft.errors import ModelError

# How the first Qwen release cuts text into words, and its tokens behind the file's ranks.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
)


def read_ranks(content: bytes, file: Path) -> dict[bytes, int]:
    """Parse lines of `base64 rank`.

    Returns:
        token -> rank; ranks are 0 to n - 1 in this order.

    Raises:
        ModelError: `file` is damaged; names the line.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ModelError(f"{file}:{number}: not 'base64 rank'; copy the file again") from None
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ModelError(f"{file}: ranks are not 0, 1, 2 and so on; copy the file again")
    return ranks


def build(
    ranks: Mapping[bytes, int],
    pattern: str = QWEN_PATTERN,
    special: Sequence[str] = QWEN_SPECIAL,
) -> Tokenizer:
    """Build the pipeline of a rank file; text is brought to NFC first, as Qwen does.

    Args:
        ranks: what `read_ranks` returned.
        pattern: cuts text into words; tokens never reach over a cut.
        special: tokens behind the ranks, by their ids' order.
    """
    names = byte_names()
    text = {token: "".join(names[byte] for byte in token) for token in ranks}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text[token]: rank for token, rank in ranks.items()},
            merges=[(text[left], text[right]) for left, right in _merges(ranks)],
            ignore_merges=True,  # tiktoken looks a whole word up before it merges
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in special]
    )
    return tokenizer


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """List the pairs that make a token, by its rank: tiktoken has no merges, only ranks."""
    found = []
    for whole in ranks:
        pairs = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        found += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found


def byte_names() -> list[str]:
    """Return the character that stands for each of the 256 bytes in a byte-level vocabulary.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and on (GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
