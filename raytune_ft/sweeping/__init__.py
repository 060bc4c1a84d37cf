"""Sweeps: what is tried, how trials are chosen, run, stopped and judged, and what is shown of them."""
