"""The faster exact tokenizer: texts in, ids out, where they are proved to be the same ids.

`gigatoken` (the extra `fast`) reads the vocabularies of most models and is ten times and more as
fast as `tokenizers`, which stays the measure of every id. It is used where it is installed, takes
the vocabulary and gives the same ids for `PROBES`; and while it runs, one text in `SAMPLE`, chosen
by its own content, is encoded by both. A difference there stops the run: going on with the other
one would make ids depend on when it was found, in which task, before or after which restart.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from raytune_ft.errors import ModelError

SWITCH = "RAYTUNE_FAST_TOKENIZER"
"""Environment variable: 0 leaves every text to `tokenizers`."""
SAMPLE = 256
"""One text in so many is encoded by both."""
MOST_MARKERS = 400
"""Of a vocabulary's added tokens, so many are probed; some have thousands that no text names."""

_WORDS = (
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "it's we'll I'd they've DON'T 'S",
    "Über Straße, naïve façade; Ελληνικά и русский текст, עברית, العربية, हिन्दी भाषा, ไทย, 한국어",
    "天空是蓝色的，石头是红色的。天空，天空！日本語のテキスト、ひらがなとカタカナ。",
    "繁體中文𠮷野家",
    "0 1 12 123 1234 12345 3.14159 1,000,000 2023-11-16 ١٢٣ Ⅷ ½ x² 1e-9",
    "½¾²³①⑳",
    "🙂👩\u200d🚀👍🏽🇩🇪 ❤\ufe0f",
    "e\u0301 \u00e9 ﬁ ｅ Å \u212b A\u030a \u1e9b\u0323 \u0f71\u0f72\u0344",
    "def f(x):\n    return x  +  1\n\n\tif x:\n        pass\r\n\r\n",
    "a\tb\t\tc \t d",
    "    four\n\n\n\n  two\n one\n",
    "word   three    four     five      six       seven",
    "trailing \n \n  \t\n",
    "\n",
    "\r\n\r\n",
    " \n\n ",
    "\u00a0a\u00a0 \u3000b\u2003c\u2028d\u2029e",
    "\ufeffbom",
    "\x00\x01\x02\x04\x07\x08\x0b\x0c\x1b\x7f\x80\x85\x9f",
    "a\x00b",
    "\u200b\u200d\u00ad",
    '{\'k\': [1, 2, {"v": null}], "e": "\\u00e9"}',
    '<div class="x">&amp;</div> <br/>\n<!-- c -->',
    "https://example.org/a/b?q=1&r=%20#top user@example.com #tag @name C:\\dir\\file.txt",
    "$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$ a_{ij} ~ ^ ` | \\",
    "== === ==== ----- ..... !!!!! ???!? ***",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "lkjhgfdsaqwertyuiopzxcvbnm1234567890" * 4,
    " leading",
    "\u2581under \u2581\u2581 line",
    "ĠaĊb ĉ",
    "<|im_start|>user\nhi<|im_end|>\n<s>[INST] x [/INST]</s><unk><pad><eoh><0x0A>",
    "<|im_",
    "_end|>",
    "\uffff\ufffd\ue000\U000f0000\U0010ffff",
    "SELECT * FROM t WHERE a>=1;--x",
    "ALLCAPS camelCaseWord",
    "snake_case_name kebab-case-name",
    "don’t “quote” — dash… ‘x’",
    "а\u0301б\u0306 \u0e01\u0e33",
)
SEED = 20231116


class FastBackend(Protocol):
    """What is used of gigatoken's tokenizers."""

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the ids of a text; special tokens in it count as such, nothing is added."""
        ...


class FastTokenizer:
    """Encodes texts by the fast library, some of them by both."""

    def __init__(self, fast: FastBackend, exact: Tokenizer) -> None:
        self._fast = fast
        self._exact = exact

    def encode_all(self, texts: Iterable[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text, int32 (n,).

        Raises:
            ModelError: the two libraries differ on a text of the sample.
        """
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> npt.NDArray[np.int32]:
        ids = self._fast.encode(text).view(np.int32)
        if zlib.crc32(text.encode()) % SAMPLE == 0:
            known: list[int] = self._exact.encode(text, add_special_tokens=False).ids
            if ids.tolist() != known:
                raise ModelError(
                    f"gigatoken and tokenizers give different ids for a text of {len(text)} "
                    f"characters, {text[:60]!r}; start the run again with {SWITCH}=0"
                )
        return ids


def fast_tokenizer(tokenizer_json: str, exact: Tokenizer) -> FastTokenizer | None:
    """Return the fast tokenizer of a vocabulary; None where there is none that agrees.

    Args:
        tokenizer_json: everything that decides ids.
        exact: the same, as `tokenizers` reads it.
    """
    if os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "no", "off"):
        return None
    backend = _loaded(tokenizer_json)
    return None if backend is None else FastTokenizer(backend, exact)


@lru_cache(maxsize=4)
def _loaded(tokenizer_json: str) -> FastBackend | None:
    try:
        from gigatoken.gigatoken_rs import load_hf_json
    except ImportError:
        return None
    try:
        backend: FastBackend = load_hf_json(tokenizer_json)
        exact = Tokenizer.from_str(tokenizer_json)
        return backend if agrees(backend, exact, probes(exact)) else None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # it refuses a vocabulary by any error, or by a panic of its Rust code
        return None


def agrees(fast: FastBackend, exact: Tokenizer, texts: Sequence[str]) -> bool:
    """Tell whether both give the same ids for every text."""
    known = exact.encode_batch_fast(texts, add_special_tokens=False)
    return all(
        fast.encode(text).tolist() == encoding.ids
        for text, encoding in zip(texts, known, strict=True)
    )


def probes(exact: Tokenizer) -> list[str]:
    """Make the texts on which both must agree: scripts, blanks, code, added tokens, mixtures."""
    added = exact.get_added_tokens_decoder()
    markers = [token.content for _, token in sorted(added.items())][:MOST_MARKERS]
    texts = [*_WORDS, "\n".join(_WORDS), "".join(_WORDS)]
    for marker in markers:
        texts += [marker, f"a{marker}b", f" {marker} ", f"a  {marker}\n\n{marker} b", marker[:-1]]
    parts = [*_WORDS[1:], *markers[:40]]
    random = np.random.default_rng(SEED)
    for _ in range(600):
        chosen = random.integers(len(parts), size=int(random.integers(2, 6)))
        cut = [parts[number] for number in chosen]
        ends = random.integers(1, 24, size=len(cut))
        texts.append("".join(part[-end:] for part, end in zip(cut, ends.tolist(), strict=True)))
    return texts
