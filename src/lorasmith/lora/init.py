"""Initial factors: A random, B zero, so that delta is exactly zero at the start (paper §4.1)."""

from __future__ import annotations

import hashlib
import math

import torch

from lorasmith.lora.config import InitName
from lorasmith.lora.factors import LINEAR, Factors, Layout


def generator_for(seed: int, path: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the module's path alone.

    So a module starts the same whichever other modules are adapted, and on every device.
    """
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def init_factors(
    in_features: int,
    out_features: int,
    *,
    rank: int,
    scaling: float,
    generator: torch.Generator,
    init: InitName = "normal",
    dtype: torch.dtype = torch.float32,
    layout: Layout = LINEAR,
) -> Factors:
    """A of variance 1/(3·in_features), B = 0. For an embedding A = 0 and B is standard normal.

    A row of an embedding is one column of A, so a random A would move tokens that training never
    saw; starting from A = 0 (as microsoft/LoRA's `Embedding` does) they stay exactly the base's.

    Args:
        init: `"normal"` is the paper's Gaussian; `"uniform"` is U(±1/√in_features), which is
            Kaiming's with a = √5 and has the same variance.
        dtype: of the master weights. The draw is made in float32, so it is the same for all.
    """
    if layout.kind == "embedding":
        B = torch.empty(out_features, rank).normal_(generator=generator)
        return Factors(torch.zeros(rank, in_features, dtype=dtype), B.to(dtype), scaling, layout)
    A = torch.empty(rank, in_features)
    if init == "normal":
        A.normal_(0.0, math.sqrt(1 / (3 * in_features)), generator=generator)
    else:
        bound = math.sqrt(1 / in_features)
        A.uniform_(-bound, bound, generator=generator)
    return Factors(A.to(dtype), torch.zeros(out_features, rank, dtype=dtype), scaling, layout)
