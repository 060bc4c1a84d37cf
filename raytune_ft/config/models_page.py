"""docs/models.md, made from the model cards: `python -m raytune_ft.config.models_page > FILE`.

tests/config/test_models_page.py fails when the committed page is not what this module prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raytune_ft.config import catalog, listing

GIB = 2**30

INTRO = """\
# Models

This page is made from the cards in `configs/models/` by `python -m raytune_ft.config.models_page >
docs/models.md`; do not edit it. On a terminal: `raytune-ft list --models`.

Every model goes with every recipe of `raytune-ft list --data`: `qwen3_8b` and `qlora_alpaca_e3` make
`qwen3_8b_qlora_alpaca_e3`. Another model of a network in the list below needs no card: set `model.path`.

## Cards

Memory is predicted for QLoRA on one GPU, rank 64 on every linear layer, packs of 2,048 tokens, one at a
time, optimizer state paged to the host (the recipe `qlora_oasst1_e3`); the formula is
`raytune_ft/config/footprint.py`. For other settings: `raytune-ft plan NAME data.max_length=512`.
`tokenizer` is the model's own chat template. Base models of today get `default`, XTuner's plain
template: its words are ordinary text, and the tokenizer's end token closes every answer. Some base
models ship a chat template too, but their end-of-turn tokens were not trained; to use it all the same,
set `model.template: tokenizer`.
"""

FAMILIES = """\
## Families

Weights are read from the original layout, with no remote code, and written back in it. `native` means
that transformers' own layout is the original one.
"""

ADDING = """\
## Adding a model card

A card gives a model its names; a model without one trains as well, by its folder or hub name in
`model.path`. A card is one file, `configs/models/<name>.yaml`, here or in your clone:

```yaml
path: Qwen/Qwen3-8B        # hub name; people with a local copy set model.path
template: tokenizer        # the model's own chat template, or one of raytune_ft/data/templates.py
family: qwen3              # a key of configs/families.yaml, where the list groups it
size: 8B                   # as its makers say it
bot_name: Qwen             # optional: what it is called in data that names it (MOSS rows)
config:                    # shape of the network, as in the model's config.json
  model_type: qwen3
  hidden_size: 4096
  num_hidden_layers: 36
  num_attention_heads: 32
  num_key_value_heads: 8
  head_dim: 128            # where it is not hidden_size / num_attention_heads
  intermediate_size: 12288
  vocab_size: 151936
  max_position_embeddings: 40960
  tie_word_embeddings: false
```

The name is in lower case, parts joined by `_`, and must not make an existing name ambiguous: the longest
card that fits wins. `config` is read for the memory column and for `raytune-ft plan` without weights; the
real config.json decides when the model is loaded. Then

```
raytune-ft show qwen3_8b_qlora_alpaca_e3
python -m raytune_ft.config.models_page > docs/models.md
pytest tests/config
```

The tests count the card's parameters on transformers' own network and compare. A `model_type` that the
memory formula does not know (`linear_layers` in `raytune_ft/config/footprint.py`) shows there.

A card does not teach a new network. Model types are those of transformers' causal language models and
the families above; for another original layout a family is added in `raytune_ft/model/families/`: how
its config.json is recognised and translated, and how its tensors are named. Models that exist only as
code beside their weights are refused: that code would run with your rights.
"""


def facts(model: str) -> dict[str, Any]:
    """Return what the page says about a card."""
    card = catalog.card(model)
    return {
        "model": model,
        "path": card.path,
        "family": card.family,
        "size": card.size,
        "template": card.template,
        "network": catalog.families()[card.family].network,
        "qlora_memory_bytes": listing.memory(model, listing.SAMPLE_RECIPE),
    }


def page() -> str:
    """Return the whole page in Markdown."""
    return "\n".join([INTRO, *_cards(), "", FAMILIES, *_families(), "", ADDING.rstrip()])


def _cards() -> Iterator[str]:
    yield from _head("model", "path", "family", "size", "template", "tokens", "QLoRA")
    for model in listing.models():
        own, shown = catalog.card(model), facts(model)
        tokens = f"{own.config['max_position_embeddings']:,}"
        need = f"{shown['qlora_memory_bytes'] / GIB:.1f} GiB"
        title = catalog.families()[own.family].title
        yield _row(f"`{model}`", own.path, title, own.size, f"`{own.template}`", tokens, need)


def _families() -> Iterator[str]:
    yield from _head("family", "network", "original layout", "tokenizer file", "checked against")
    for family in catalog.families().values():
        yield _row(
            family.title, family.network, family.layout, f"`{family.tokenizer}`", family.checked
        )


def _head(*columns: str) -> Iterator[str]:
    yield _row(*columns)
    yield _row(*("---" for _ in columns))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page())
