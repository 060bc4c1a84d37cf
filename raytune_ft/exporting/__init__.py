"""What an export is beside its weights: cards, tokenizers, reports, other tools' formats."""
