"""Tokenizers: text in, ids out, read from the files that models came with."""
