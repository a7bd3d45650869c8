"""Weighted sum of three rank-16 adapters, truncated to rank 16: ours against PEFT's `svd` combination.

    lorasmith bench algebra --peers

PEFT forms the deltas and takes a full-matrix SVD of their sum, O(d³); ours is O(d·R²) through QR of the
stacked factors. Both start from the same factors; the singular values of the two results are compared.
One row per width, appended to `benchmarks/records/algebra.jsonl`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # however this file was loaded
import record

from lorasmith.analysis import combine, svd
from lorasmith.lora import Adapter, Factors, LoRAConfig

RANK, SEED = 16, 0
WIDTHS = (768, 4096)
WEIGHTS = [0.5, 0.3, 0.2]
NAMES = ["first", "second", "third"]
EXPENSIVE_WIDTH = 2048  # from here PEFT's path takes tens of seconds: one run each
ABOUT = {
    "what": f"weighted sum of {len(NAMES)} rank-{RANK} adapters, truncated to rank {RANK}",
    "peer": "peft add_weighted_adapter(combination_type='svd')",
    "dtype": "float32 factors; ours computes in float64",
    "seed": SEED,
}


def make_adapters(width: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(SEED)
    config = LoRAConfig(rank=RANK, alpha=2 * RANK)
    adapters = []
    for _ in NAMES:
        A = torch.randn(RANK, width, generator=generator) / width**0.5
        B = torch.randn(width, RANK, generator=generator) / width**0.5
        adapters.append(Adapter(config, {"layer": Factors(A, B, 2.0)}))
    return adapters


def make_peft(width: int, adapters: list[Adapter]) -> Any:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["layer"])
    model = nn.Module()
    model.layer = nn.Linear(width, width, bias=False)
    wrapped = peft.get_peft_model(model, config, NAMES[0])
    for name in NAMES[1:]:
        wrapped.add_adapter(name, config)
    layer = wrapped.base_model.model.layer
    for name, adapter in zip(NAMES, adapters, strict=True):
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(adapter.factors["layer"].A)
            layer.lora_B[name].weight.copy_(adapter.factors["layer"].B)
    return wrapped


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(width: int, peers: bool) -> dict[str, Any]:
    adapters = make_adapters(width)
    runs = 1 if width >= EXPENSIVE_WIDTH else 5
    combine(adapters, WEIGHTS, method="svd", rank=RANK)  # first calls load LAPACK's paths
    ours = statistics.median(
        seconds(lambda: combine(adapters, WEIGHTS, method="svd", rank=RANK)) for _ in range(runs)
    )
    mixed = combine(adapters, WEIGHTS, method="svd", rank=RANK)
    row = {"what": f"width {width}, seconds", "runs": runs, "relative_error": mixed.relative_error}
    if not peers:
        return {**row, "ours": ours, "peer": None, "ratio": None}
    theirs, values = measure_peft(width, adapters, runs)
    gap = ((svd(mixed.adapter.factors["layer"])[1] - values).abs() / values).max().item()
    return {
        **row,
        "ours": ours,
        "peer": theirs,
        "ratio": ours / theirs,
        "singular_values_max_relative_gap": gap,
    }


def measure_peft(width: int, adapters: list[Adapter], runs: int) -> tuple[float, Tensor]:
    """Median seconds, and the singular values of what it made."""
    wrapped = make_peft(width, adapters)
    times = [
        seconds(
            lambda i=i: wrapped.add_weighted_adapter(
                NAMES, WEIGHTS, f"mix{i}", combination_type="svd", svd_rank=RANK
            )
        )
        for i in range(runs)
    ]
    layer = wrapped.base_model.model.layer
    made = Factors(
        layer.lora_A["mix0"].weight.detach(), layer.lora_B["mix0"].weight.detach(), layer.scaling["mix0"]
    )
    return statistics.median(times), svd(made)[1]


def run(peers: bool = False, quick: bool = False) -> list[dict[str, Any]]:
    """A row per width; `quick` leaves out those where the full SVD takes tens of seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [measure(width, peers) for width in WIDTHS if not quick or width < EXPENSIVE_WIDTH]


if __name__ == "__main__":
    rows = run(peers=True)
    record.append("algebra", rows, ABOUT)
    print(json.dumps(rows))
