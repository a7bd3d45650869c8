"""The shapes that PEFT gives tensors in a file, to and from the two axes of `Factors`.

| kind | A | B |
| linear | (rank, in) | (out, rank) |
| embedding | (rank, vocabulary) | (width, rank) |
| convolution | (rank, in, *kernel) | (out, rank / groups, 1, …) |
| stacked experts | (experts · rank, in), expert by expert | (out, rank · experts), the expert fastest |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.lora import LINEAR, Factors, Layout, gather, group_spans, spread

Shape = tuple[int, ...]
EXPERTS = Layout("expert")
# The parameter that is registered first is wrapped first, and the file does not name the parameters.
_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def layout_of(A: Shape, B: Shape, *, is_embedding: bool) -> Layout:
    """The layout that the shapes in the file mean."""
    if is_embedding:
        return Layout("embedding")
    return Layout("conv", A[2:], max(A[0] // max(B[1], 1), 1)) if len(A) > 2 else LINEAR


def pair_faults(A: Shape, B: Shape, *, max_rank: int, is_stack: bool) -> Iterable[str]:
    """Why two shapes are no pair of factors."""
    shapes = f"A {A} and B {B}"
    if 0 in A + B:
        yield f"{shapes} hold nothing; sharded training must gather before it saves"
    elif len(A) != len(B) or not 2 <= len(A) <= 5 or any(size != 1 for size in B[2:]):
        yield f"{shapes} must be (rank, in_features) and (out_features, rank), or those of a convolution"
    elif A[0] != B[1] and (len(A) == 2 or A[0] % B[1] or B[0] % (A[0] // B[1])):
        yield f"{shapes} disagree on the rank"
    elif not is_stack and A[0] > max_rank:
        yield f"{shapes} have rank {A[0]:,}; at most {max_rank:,} is allowed"


def flat_shapes(A: Shape, B: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B as `Factors` holds them."""
    return (A[0], math.prod(A[1:])), (B[0], A[0])


def from_file(A: Tensor, B: Tensor, scaling: float, layout: Layout) -> Factors:
    """Factors of one layer from the tensors in a file."""
    B = B.flatten(1)
    if layout.groups > 1:
        B = spread(B, group_spans(B.shape[0], layout.groups), B.shape[0])
    return Factors(A.flatten(1), B, scaling, layout)


def to_file(factors: Factors) -> tuple[Tensor, Tensor]:
    """A and B in the shapes of the file.

    Raises:
        ValueError: B has numbers where a convolution with groups has none.
    """
    A, B, layout = factors.A, factors.B, factors.layout
    if layout.kind != "conv":
        return A, B
    if layout.groups > 1:
        B = gather(B, group_spans(B.shape[0], layout.groups))
    ones = (1,) * len(layout.kernel)
    return A.reshape(A.shape[0], -1, *layout.kernel), B.reshape(*B.shape, *ones)


def experts_from_file(A: Tensor, B: Tensor, *, rank: int, scaling: float) -> list[Factors]:
    """The factors of each expert of a stacked parameter."""
    by_expert = B.view(B.shape[0], rank, -1)
    return [
        Factors(a.clone(), by_expert[:, :, e].contiguous(), scaling, EXPERTS)
        for e, a in enumerate(A.view(-1, rank, A.shape[1]))
    ]


def experts_to_file(experts: list[Factors]) -> tuple[Tensor, Tensor]:
    """A and B of a stacked parameter; experts of a lower rank end in zeros."""
    rank = max(f.rank for f in experts)
    A = torch.cat([F.pad(f.A, (0, 0, 0, rank - f.rank)) for f in experts])
    B = torch.stack([F.pad(f.B, (0, rank - f.rank)) for f in experts], dim=-1)
    return A, B.flatten(1)


def stacks_of(factors: Mapping[str, Factors]) -> dict[str, list[Factors]]:
    """Path of each stacked parameter → the factors of its experts, in their order."""
    found: dict[str, dict[int, Factors]] = {}
    for path, pair in factors.items():
        if pair.layout.kind == "expert":
            stack, _, number = path.rpartition(".")
            found.setdefault(stack, {})[int(number)] = pair
    return {stack: [pairs[e] for e in sorted(pairs)] for stack, pairs in found.items()}


def in_wrapping_order(parameters: Iterable[str]) -> list[str]:
    """Names of the stacked parameters of one module, the first wrapped (innermost) first.

    PEFT wraps them as the module registered them. A file lists them in no order at all, so this is
    the order that transformers' mixtures of experts register them in; others stay as they are given.
    """
    known = {name: i for i, name in enumerate(_REGISTERED)}
    given = list(parameters)
    return sorted(given, key=lambda name: (known.get(name, len(known)), given.index(name)))
