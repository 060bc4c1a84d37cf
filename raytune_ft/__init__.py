"""raytune_ft: teach a language model your own data on Ray, then talk to it."""

__version__ = "0.1.0"
