"""Rounding to the formats that weights are stored in. Reference code: plain, not fast."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lorasmith.errors import ConfigError, did_you_mean
from lorasmith.lora import compute_dtype

StorageName = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
Storage = StorageName | torch.dtype

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NF4_BLOCK = 64
# QLoRA (arXiv 2305.14314), appendix E: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def as_stored(weight: Tensor, storage: Storage, *, channel_dim: int = 0) -> Tensor:
    """dequant(quant(weight)), in at least float32.

    Args:
        storage: a floating torch dtype or its short name; `"int8"`: symmetric, one absmax scale per
            output channel; `"nf4"`: blocks of 64 in storage order, one absmax scale each (kept exact).
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
    scale = weight.abs().amax(1 - channel_dim, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale).round().clamp(-127, 127) * scale


def _nf4(weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    padding = -flat.numel() % NF4_BLOCK
    blocks = torch.nn.functional.pad(flat, (0, padding)).view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    scale = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    values = torch.tensor(NF4_VALUES, dtype=weight.dtype, device=weight.device)
    nearest = torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2)
    return (values[nearest] * scale).view(-1)[: flat.numel()].view_as(weight)
