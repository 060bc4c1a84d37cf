"""Rows: one row of a data set in, one conversation out."""
