"""Shapes of tensor code are checked at run time, in tests only. One thread: the models are tiny."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

TENSOR_MODULES = [
    "lorasmith.lora.delta",
    "lorasmith.lora.factors",
    "lorasmith.lora.init",
    "lorasmith.inject.autograd",
]
install_import_hook(TENSOR_MODULES, "beartype.beartype")
