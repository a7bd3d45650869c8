"""Weighted sum of three rank-16 adapters, truncated to rank 16: ours against PEFT's `svd` combination.

    python benchmarks/bench_algebra.py [--widths 768 4096]

PEFT forms the deltas and takes a full-matrix SVD of their sum, O(d³); ours is O(d·R²) through QR of the
stacked factors. Both start from the same factors; the singular values of the two results are compared.
Prints one JSON row and appends it to `benchmarks/records/algebra.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from lorasmith.analysis import combine, svd
from lorasmith.lora import Adapter, Factors, LoRAConfig

RECORDS = Path(__file__).parent / "records" / "algebra.jsonl"
RANK, SEED = 16, 0
WEIGHTS = [0.5, 0.3, 0.2]
NAMES = ["first", "second", "third"]
EXPENSIVE_WIDTH = 2048  # from here PEFT's path takes tens of seconds: one run each


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


def measure(width: int) -> dict[str, Any]:
    adapters = make_adapters(width)
    wrapped = make_peft(width, adapters)
    runs = 1 if width >= EXPENSIVE_WIDTH else 5
    theirs = [
        seconds(
            lambda i=i: wrapped.add_weighted_adapter(
                NAMES, WEIGHTS, f"mix{i}", combination_type="svd", svd_rank=RANK
            )
        )
        for i in range(runs)
    ]
    combine(adapters, WEIGHTS, method="svd", rank=RANK)  # first calls load LAPACK's paths
    ours = [seconds(lambda: combine(adapters, WEIGHTS, method="svd", rank=RANK)) for _ in range(runs)]
    mixed = combine(adapters, WEIGHTS, method="svd", rank=RANK)
    layer = wrapped.base_model.model.layer
    peft_factors = Factors(
        layer.lora_A["mix0"].weight.detach(), layer.lora_B["mix0"].weight.detach(), layer.scaling["mix0"]
    )
    expected, found = svd(peft_factors)[1], svd(mixed.adapter.factors["layer"])[1]
    return {
        "width": width,
        "ours_s": statistics.median(ours),
        "peer_s": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "runs": runs,
        "relative_error": mixed.relative_error,
        "singular_values_max_relative_gap": ((found - expected).abs() / expected).max().item(),
    }


def commit() -> str:
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RECORDS.parent
    )
    return result.stdout.strip() if result.returncode == 0 else "uncommitted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 4096])
    widths = parser.parse_args().widths
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [measure(width) for width in widths]
    record = {
        "what": f"weighted sum of {len(NAMES)} rank-{RANK} adapters, truncated to rank {RANK}",
        "peer": "peft add_weighted_adapter(combination_type='svd')",
        "rows": rows,
        "device": f"cpu {platform.processor() or platform.machine()}",
        "threads": torch.get_num_threads(),
        "dtype": "float32 factors; ours computes in float64",
        "versions": {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
        "commit": commit(),
        "seed": SEED,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    line = json.dumps(record)
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
