"""Lookout: runs seen from outside, here or on an object store: listed, read along, asked to stop.

Nothing here trains, and nothing here trusts what stands in a run: what is shown is cleaned first.
"""
