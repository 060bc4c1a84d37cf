"""DeepSpeed on the device that is here: the other tests take it for a CPU's."""

from __future__ import annotations

import os

import torch

if torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cuda"
