"""Rounding to the formats that weights are stored in."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lorasmith.errors import ConfigError, did_you_mean
from lorasmith.lora import compute_dtype
from lorasmith.quantised import dequantise_int8, dequantise_nf4, quantise_int8, quantise_nf4

StorageName = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
Storage = StorageName | torch.dtype

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def as_stored(weight: Tensor, storage: Storage, *, channel_dim: int = 0) -> Tensor:
    """dequant(quant(weight)), in at least float32.

    Args:
        storage: a floating torch dtype or its short name; `"int8"`: symmetric, one absmax scale per
            output channel; `"nf4"`: blocks of 64 in storage order, one absmax scale each (not rounded itself).
        channel_dim: the dimension of the output channels.

    Raises:
        ConfigError: the format is unknown.
    """
    wide = weight.to(compute_dtype(weight.dtype))
    if storage == "int8":
        return _int8(wide, channel_dim)
    if storage == "nf4":
        return _nf4(wide)
    return wide.to(float_dtype(storage)).to(wide.dtype)


def float_dtype(storage: Storage) -> torch.dtype:
    """The torch dtype of a floating format.

    Raises:
        ConfigError: it is not one.
    """
    dtype = _FLOATS.get(storage) if isinstance(storage, str) else storage
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    names = get_args(StorageName)
    raise ConfigError(
        f"storage format {storage!r} is unknown: use {', '.join(names)} or a floating torch dtype."
        + did_you_mean(str(storage), names)
    )


def _int8(weight: Tensor, channel_dim: int) -> Tensor:
    rows = weight.T if channel_dim else weight
    stored = dequantise_int8(*quantise_int8(rows), torch.float32).to(weight.dtype)
    return stored.T if channel_dim else stored


def _nf4(weight: Tensor) -> Tensor:
    return dequantise_nf4(*quantise_nf4(weight), tuple(weight.shape), torch.float32).to(weight.dtype)
