"""SentencePiece: a `tokenizer.model` in, a `tokenizers` pipeline with the same ids out.

The pipeline gives sentencepiece's own ids for every text (but see `build`), is plain JSON and
needs no sentencepiece afterwards. transformers builds another one, which differs from the file at
leading spaces, and for InternLM nearly everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from raytune_ft.errors import ModelError

SPACE = "\u2581"
BPE = 2
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
NUL = "\x00"
MANY = 1000
SPARED = r"\A(?!(?:"
"""How the pattern of a `prefix` step begins that spares some texts."""


def read_model(content: bytes, file: Path) -> Any:
    """Parse a model file.

    Returns:
        sentencepiece's ModelProto.

    Raises:
        ModelError: `file` is damaged, or of a kind that no model family here uses.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(content)
    except Exception:  # protobuf's implementations raise classes of their own
        model.Clear()
    if not model.pieces:
        raise ModelError(f"{file}: not a sentencepiece model; copy the file again")
    if model.trainer_spec.model_type != BPE:
        raise ModelError(f"{file}: no BPE model; put the model's tokenizer.json beside it")
    if (
        model.trainer_spec.treat_whitespace_as_suffix
        or not model.normalizer_spec.escape_whitespaces
    ):
        raise ModelError(f"{file}: writes spaces in a rare way; put a tokenizer.json beside it")
    return model


def named_tokens(model: Any) -> dict[str, str]:
    """Return the `bos_token` and so on that the file itself names."""
    trainer = model.trainer_spec
    named = {}
    for name in ("unk", "bos", "eos", "pad"):
        id_ = getattr(trainer, f"{name}_id")
        if 0 <= id_ < len(model.pieces):
            named[f"{name}_token"] = model.pieces[id_].piece
    return named


def build(model: Any, appended: Sequence[str] = ()) -> Tokenizer:
    """Build the pipeline of a model.

    Control pieces in a text count as such, as they did for the models' own tokenizers in 2023;
    sentencepiece itself never reads them. Pieces that the model's makers defined (`<eoh>`) are
    cut out of the normalised text, as sentencepiece does.

    A file may bring a map of characters (none of the families' files does). The library applies
    it to a letter and its combining marks together, sentencepiece to each alone; ids may differ
    there.

    Args:
        model: what `read_model` returned.
        appended: tokens behind the file's pieces that text never becomes, by their ids' order.

    Memory: all pairs of pieces that make a piece, about 0.5 GB for 100,000 pieces.
    """
    vocab = _vocab(model)
    for text in appended:
        vocab[text] = len(vocab)
    tokenizer = Tokenizer(_bpe(model, vocab))
    defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    tokenizer.normalizer = _normalizer(model.normalizer_spec, defined)
    tokenizer.decoder = _decoder(model.normalizer_spec)
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    control = [piece.piece for piece in model.pieces if piece.type == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in (unknown, *control)]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in defined])
    return tokenizer


def _vocab(model: Any) -> dict[str, int]:
    vocab = {piece.piece: id_ for id_, piece in enumerate(model.pieces)}
    if model.trainer_spec.byte_fallback and NUL in vocab:
        # sentencepiece never uses this piece: it writes the byte <0x00> instead
        vocab[NUL * 2] = vocab.pop(NUL)
    return vocab


def _bpe(model: Any, vocab: Mapping[str, int]) -> models.BPE:
    """Rank merges by the score of what they make; sentencepiece has no merges, only scores.

    Of equal scores it takes the leftmost in the text. In a run of spaces, whose pieces have equal
    scores in Llama and Mistral, that is the pair whose left part has grown longest.
    """
    scores = {
        piece.piece: piece.score
        for piece in model.pieces
        if piece.type == NORMAL and piece.piece in vocab
    }
    ranked = []
    for whole, score in scores.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in scores and right in scores:
                ranked.append((-score, -cut, vocab[left], vocab[right], left, right))
    ranked.sort()
    trainer = model.trainer_spec
    return models.BPE(
        vocab=dict(vocab),
        merges=[(left, right) for *_, left, right in ranked],
        unk_token=model.pieces[trainer.unk_id].piece,
        byte_fallback=trainer.byte_fallback,
        fuse_unk=True,
    )


def _normalizer(spec: Any, defined: Sequence[str]) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        for pattern, text in ((rf"\A +|[ {SPACE}]+\z", ""), (" {2,}", " ")):
            steps.append(normalizers.Replace(Regex(pattern), text))
    if spec.add_dummy_prefix:
        before = normalizers.Sequence(list(steps))
        steps.append(prefix(before.normalize_str(text) for text in defined))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def prefix(alone: Iterable[str]) -> normalizers.Normalizer:
    """Put sentencepiece's leading space before a text, unless the text is one of `alone`.

    The library normalises added tokens as well as texts, and must find them without that space.
    """
    texts = sorted(set(alone))
    if not texts:
        return normalizers.Prepend(SPACE)
    pattern = rf"{SPARED}{'|'.join(map(re.escape, texts))})\z)(?=[\s\S])"
    return normalizers.Replace(Regex(pattern), SPACE)


def spare_from_prefix(tokenizer_json: dict[str, Any], alone: Iterable[str]) -> None:
    """Exchange the texts that the `prefix` step spares, in a parsed tokenizer.json."""
    steps = (tokenizer_json.get("normalizer") or {}).get("normalizers") or []
    for place, step in enumerate(steps):
        pattern = step.get("pattern") or {}
        if pattern.get("Regex", "").startswith(SPARED):
            steps[place] = json.loads(prefix(alone).__getstate__())


def _decoder(spec: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
    ]  # fmt: skip
    if spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", MANY, 0))
    elif spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
