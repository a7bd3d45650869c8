"""Put a loaded model's linear layers into few bits, without ever holding it whole in the computing dtype."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.native import forget_pages, is_mapped, mapped_files
from lorasmith.quantised import quantise_linears


def quantise_base(model: Any, kind: str, dtype: torch.dtype) -> str:
    """Quantise `model` in place and bring the rest to `dtype`; returns a line that says what was done.

    Args:
        model: in the dtype of its files, whose pages its weights are.

    Raises:
        ConfigError: it has no layer to quantise.
    """
    stored = model.dtype
    mapped = mapped_files()
    found = quantise_linears(model, kind, dtype=dtype, then=lambda weight: _forget(weight, mapped))
    for parameter in model.parameters():
        if parameter.dtype == stored:  # what a model keeps wider on purpose stays so
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # only glibc can give freed memory back
            ctypes.CDLL(None).malloc_trim(0)
    bits = 8 * found.stored_bytes / found.params
    return f"{kind}: {found.layers} linear layers of {found.params:,} weights at {bits:.3f} bits"


def _forget(weight: Tensor, mapped: Sequence[tuple[int, int]]) -> None:
    """Give the pages of a weight that was read from its file back; they can be read again."""
    if is_mapped(weight.data_ptr(), weight.nbytes, mapped):
        forget_pages(weight.data_ptr(), weight.nbytes)
