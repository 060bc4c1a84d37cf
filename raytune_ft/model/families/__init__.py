"""Model families: a config.json in, the network that reads its weights out. No remote code.

`detect` looks at the values of config.json before any Auto class of transformers does; code
beside the weights (`auto_map`) is never executed. A family's layout says which original tensor is
which native one; loading, merging, export and adapters all follow it.
"""

from raytune_ft.model.families.family import Family
from raytune_ft.model.families.layout import Layout
from raytune_ft.model.families.registry import FAMILIES, detect, translate

__all__ = ["FAMILIES", "Family", "Layout", "detect", "translate"]
