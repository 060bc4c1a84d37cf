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

Every model goes with every recipe of `raytune-ft list --data`: `qwen3_8b` and `qlora_alpaca_e3`
make `qwen3_8b_qlora_alpaca_e3`. Another model of a network below needs no card: set `model.path`.

* **template**: `tokenizer` is the model's own chat template. Base models of today get `default`,
  XTuner's plain one: its words are ordinary text, and the tokenizer's end token closes every
  answer. Where a base model ships a chat template, `model.template=tokenizer` takes it.
* **original layout**: how the published checkpoint names its tensors. It is read as it is, with no
  remote code, and written back so; `native` is transformers' own.
* **tokenizer**: the file that is read, and what our reading of it was compared with;
  `tokenizer.json` is read by the library that writes it, so there is nothing to compare.
* **QLoRA**: memory predicted for one GPU, rank 64 on every linear layer, packs of 2,048 tokens, one
  at a time, optimizer state paged to the host (recipe `qlora_oasst1_e3`). The formula is
  `config/estimates/peak.py`; for other settings: `raytune-ft plan NAME data.max_length=512`.

The table is made from the cards, `configs/models/` and `configs/families.yaml`; on a terminal it is
`raytune-ft list --models`.
"""

ADDING = """\
## Adding a model card

A card gives a model its names; a model without one trains as well, by its folder or hub name in
`model.path`. A card is one file, `configs/models/<name>.yaml`, here or in your clone:

```yaml
path: Qwen/Qwen3-8B        # hub name; people with a local copy set model.path
template: tokenizer        # the model's own chat template, or a prompt template (docs/recipe.md)
family: qwen3              # a key of configs/families.yaml, where the list groups it
size: 8B                   # as its makers say it
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

Three fields are optional: `eos_token`, the token that ends an answer, where the model's files do
not say so (Qwen 1); `bot_name`, what the model is called in data that names it (MOSS rows);
`network`, for the table above, where it is not plainly the family's.

The name is in lower case, parts joined by `_`, and must not make an existing name ambiguous: the
longest card that fits wins. `config` is read for the memory column and for `raytune-ft plan`
without weights; the real config.json decides when the model is loaded. Then

```
raytune-ft show qwen3_8b_qlora_alpaca_e3
python -m raytune_ft.config.models_page > docs/models.md
pytest tests/config
```

The tests count the card's parameters on transformers' own network and compare. A `model_type`
that the memory formula does not know (`linear_layers` in `config/estimates/footprint.py`) shows
there.

A card does not teach a new network. Model types are those of transformers' causal language models
and the families above; for another original layout a family is added in
`raytune_ft/model/families/`: how its config.json is recognised and translated, and how its
tensors are named. Models that exist only as code beside their weights are refused: that code
would run with your rights.
"""


def facts(model: str) -> dict[str, Any]:
    """Return what the page says about a card."""
    card = catalog.card(model)
    family = catalog.families()[card.family]
    return {
        "model": model,
        "path": card.path,
        "family": card.family,
        "size": card.size,
        "template": card.template,
        "network": card.network or family.network,
        "layout": family.layout,
        "tokenizer": family.tokenizer,
        "checked": family.checked,
        "qlora_memory_bytes": listing.memory(model, listing.SAMPLE_RECIPE),
    }


def page() -> str:
    """Return the whole page in Markdown."""
    rows = [_row(*cells) for cells in _cells()]
    return "\n".join([INTRO, *rows, "", ADDING.rstrip()])


def _cells() -> Iterator[tuple[str, ...]]:
    yield (
        "model", "path", "network", "template", "original layout", "tokenizer", "checked against",
        "QLoRA",
    )  # fmt: skip
    yield ("---",) * 8
    for model in listing.models():
        shown = facts(model)
        yield (
            f"`{model}`",
            shown["path"],
            shown["network"],
            f"`{shown['template']}`",
            shown["layout"],
            shown["tokenizer"],
            shown["checked"],
            f"{shown['qlora_memory_bytes'] / GIB:.1f} GiB",
        )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page())
