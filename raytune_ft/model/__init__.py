"""Models: loading, adapters, loss, generation, memory. Knows nothing of Ray and of data."""

import logging

# at its import bitsandbytes warns that an optional hub kernel is missing; ours does without
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
