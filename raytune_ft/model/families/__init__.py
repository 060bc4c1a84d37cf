"""Model families: a config.json in, the network that reads its weights out. No remote code.

`detect` looks at the values of config.json before any Auto class of transformers does; code
beside the weights (`auto_map`) is never executed.
"""

from raytune_ft.model.families.family import Family
from raytune_ft.model.families.registry import detect

__all__ = ["Family", "detect"]
