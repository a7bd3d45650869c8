"""Frozen linear layers for any number of rows: packed where that is faster, plain elsewhere.

On x86 a bfloat16 product with few rows is bound by reading the weight. oneDNN reads a prepacked weight
at memory speed, and a plain one at half of that or less, so the weights of a group are packed once.
The packed weight is a second copy (`packed_bytes`); it also holds the group as one product.
From how many rows on the plain product is the faster one is timed once for each shape (`calibrate`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACK_ROWS_HINT = 16
CALIBRATION_ROWS = (1024, 256, 64, 16)
CALIBRATION_GROUPS = 4  # of one shape, in turn, so that no weight is in the caches already
CALIBRATION_REPEATS = 3
CLEAR_GAIN = 0.95  # noise must not decide

_plain_from: dict[tuple[object, ...], int | None] = {}


class LinearGroup:
    """y_i = x @ W_iᵀ + b_i for modules that share x, as one wide output where they are packed."""

    def __init__(self, modules: Sequence[nn.Linear], *, pack: bool) -> None:
        self.modules = tuple(modules)
        self.sizes = [m.out_features for m in modules]
        self.packed: Tensor | None = None
        self.bias: Tensor | None = None
        self.plain_from: int | None = None
        if pack:
            self.repack()

    @property
    def packed_bytes(self) -> int:
        """Memory of the second copy."""
        return (
            0
            if self.packed is None
            else sum(m.weight.numel() * m.weight.element_size() for m in self.modules)
        )

    def repack(self) -> None:
        """Take over the modules' present weights."""
        weights = [m.weight.detach() for m in self.modules]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS_HINT)
        if any(m.bias is not None for m in self.modules):
            biases = [_bias(m) for m in self.modules]
            self.bias = torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs side by side, (n, Σ out)."""
        if self.packed is not None and (self.plain_from is None or x.shape[0] < self.plain_from):
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """The same from the modules' own weights."""
        outputs = [F.linear(x, m.weight, m.bias) for m in self.modules]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def calibrate(groups: Sequence[LinearGroup]) -> None:
    """Time packed against plain for each shape, and note from how many rows on plain is clearly faster.

    The decision is made once per process, so that two engines compute alike.
    """
    by_shape: dict[tuple[object, ...], list[LinearGroup]] = {}
    for group in groups:
        if group.packed is not None:
            first = group.modules[0]
            shape = (first.in_features, *group.sizes, first.weight.dtype, torch.get_num_threads())
            by_shape.setdefault(shape, []).append(group)
    for shape, alike in by_shape.items():
        if shape not in _plain_from:
            _plain_from[shape] = _rows_for_plain(alike[:CALIBRATION_GROUPS])
        for group in alike:
            group.plain_from = _plain_from[shape]


@torch.inference_mode()
def _rows_for_plain(groups: Sequence[LinearGroup]) -> int | None:
    weight = groups[0].modules[0].weight
    found = None
    for rows in CALIBRATION_ROWS:
        x = weight.new_ones(rows, weight.shape[1])
        packed, plain = (_seconds(call, groups, x) for call in (LinearGroup.__call__, LinearGroup.plain))
        if plain > CLEAR_GAIN * packed:
            break
        found = rows
    return found


def _seconds(
    call: Callable[[LinearGroup, Tensor], Tensor], groups: Sequence[LinearGroup], x: Tensor
) -> float:
    """The fastest of some passes over the groups."""
    times = []
    for _ in range(CALIBRATION_REPEATS):
        start = time.perf_counter()
        for group in groups:
            call(group, x)
        times.append(time.perf_counter() - start)
    return min(times)


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch packs such weights, tried on a small one."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    try:
        small = torch.eye(32, dtype=weight.dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(small, PACK_ROWS_HINT)
        got = torch.ops.mkldnn._linear_pointwise(small, packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(got, small)


def _bias(module: nn.Linear) -> Tensor:
    bias: Tensor | None = module.bias
    return module.weight.new_zeros(module.out_features) if bias is None else bias.detach()
