"""The fast path's forms of modules: each a subclass that stands in for the module's own class.

`model.fast` decides which modules get one. Parameters, names and state dict stay as they are.
"""
