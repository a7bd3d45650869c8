"""From numbers to codes and back, on plain tensors.

The four-bit codes are bit for bit those of bitsandbytes. Of the eight-bit codes of the scales its CPU
kernel takes the neighbour of the nearest in about one of 600; here it is always the nearest.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from lorasmith.quantised.kernel import unpack_int8, unpack_nf4

NF4_BLOCK = 64
SCALES_BLOCK = 256
"""Scales that share a scale of their own (QLoRA, section 3, double quantisation)."""

# QLoRA, appendix E: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero.
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
TINY = 1e-38
PIECE = 1 << 20
"""Numbers that are quantised at once: what is formed of them in float32 stays small. A multiple of every block."""


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two to a byte with the earlier one in the upper half, and the scale of each block of 64.

    Blocks run along storage. The last one is filled up with zeros.

    Returns:
        uint8 (blocks · 32,) and float32 (blocks,).
    """
    pieces = torch.split(weight.detach().reshape(-1), PIECE)
    codes, absmax = zip(*map(_nf4_piece, pieces), strict=True)
    return torch.cat(codes), torch.cat(absmax)


def _nf4_piece(flat: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _blocks(flat.float(), NF4_BLOCK)
    absmax = blocks.abs().amax(1)
    nearest = _nearest(blocks, absmax, nf4_values(flat.device)).view(-1, 2)
    return (nearest[:, 0] << 4) | nearest[:, 1], absmax


def dequantise_nf4(
    codes: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """value(code) · absmax of its block, formed in float32 and rounded once.

    Args:
        out: where the numbers go, (blocks · 64,) of `dtype`; by default into a new tensor.
    """
    out = torch.empty(len(absmax) * NF4_BLOCK, dtype=dtype, device=codes.device) if out is None else out
    blocks = out.view(-1, NF4_BLOCK)
    if not unpack_nf4(codes, absmax, nf4_values(codes.device), blocks):
        _unpack_in_pieces(codes, absmax, blocks)
    return out[: torch.Size(shape).numel()].view(shape)


def quantise_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales in eight bits: codes of their distance from the mean, one scale for each 256, and the mean.

    Returns:
        uint8 (blocks,), float32 (blocks / 256, rounded up), float32 ().
    """
    mean = absmax.mean()
    blocks = _blocks(absmax - mean, SCALES_BLOCK)
    outer = blocks.abs().amax(1)
    return _nearest(blocks, outer, float8_values(absmax.device)).view(-1)[: len(absmax)], outer, mean


def dequantise_scales(codes: Tensor, outer: Tensor, mean: Tensor) -> Tensor:
    """The scales, float32 (blocks,)."""
    values = _blocks(float8_values(codes.device)[codes.int()], SCALES_BLOCK)
    return (values * outer[:, None]).view(-1)[: len(codes)] + mean


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, (out, in), and the scale of each row: its largest magnitude / 127."""
    pieces = torch.split(weight.detach(), max(1, PIECE // weight.shape[1]))
    codes, scale = zip(*map(_int8_piece, pieces), strict=True)
    return torch.cat(codes), torch.cat(scale)


def _int8_piece(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows.float()
    scale = wide.abs().amax(1) / 127
    steps = wide / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def dequantise_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """code · scale of its row, formed in float32 and rounded once.

    Args:
        out: where the numbers go, (rows · width,) of `dtype`; by default into a new tensor.
    """
    out = torch.empty(codes.numel(), dtype=dtype, device=codes.device) if out is None else out
    rows = out.view(codes.shape)
    if not unpack_int8(codes, scale, rows):
        rows.copy_(codes * scale[:, None])
    return rows


def nf4_values(device: torch.device) -> Tensor:
    """`NF4_VALUES` as float32."""
    return _values("nf4", str(device))


def float8_values(device: torch.device) -> Tensor:
    """The 256 values of an 8-bit code with a sign, an exponent in unary and a fraction of what is left.

    "8-bit Approximations for Parallelism in Deep Learning" (arXiv 1511.04561): between 10^(i-7) and
    10^(i-6) lie 2^i values of either sign, the middles of equal parts; besides them 0 and 1.
    """
    return _values("float8", str(device))


@functools.cache
def _values(name: str, device: str) -> Tensor:
    if name == "nf4":
        return torch.tensor(NF4_VALUES, device=device)
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), device=device)


def _blocks(flat: Tensor, size: int) -> Tensor:
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _nearest(blocks: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """Number of the value that is nearest to each element over its block's `absmax`."""
    relative = (blocks * (1.0 / absmax.clamp(min=TINY))[:, None]).clamp(-1, 1)
    return torch.bucketize(relative, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)


def _unpack_in_pieces(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    """In plain torch: both values of a byte from a table of 256, in pieces that stay in the cache."""
    values = nf4_values(codes.device)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)
    rows = 4096 if codes.device.type == "cpu" else 1 << 19
    per_block = NF4_BLOCK // 2
    for start in range(0, len(absmax), rows):
        part = slice(start, start + rows)
        bytes_ = codes[start * per_block : (start + rows) * per_block].int()
        out[part] = F.embedding(bytes_, pairs).view(-1, NF4_BLOCK) * absmax[part, None]
