"""Sweeps: what is tried, how trials are chosen, run, stopped and judged, what is shown of them."""
