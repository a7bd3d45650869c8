"""One variant of a training step, ready in a process of its own; it steps when told to.

    python -m train.worker VARIANT DTYPE        (ours, full, lean-memory, peft)

Prints "ready", then answers each line on standard input: "step" with the seconds of one optimizer step on
the same 8 x 256 random tokens, all supervised; "gemm" with the GFLOP/s of a product of the model's shape;
"peak" with the largest resident memory in bytes so far.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from lorasmith.bases import load_base

ROWS, SLOTS, RANK, LR = 8, 256, 16, 1e-4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def token_ids() -> torch.Tensor:
    return torch.randint(0, 40000, (ROWS, SLOTS + 1), generator=torch.Generator().manual_seed(0))


@contextmanager
def lorasmith_step(model: Any, *, method: str, recompute: str) -> Iterator[Callable[[], float]]:
    from lorasmith.inject import group_shared_inputs, inject
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import Forward
    from lorasmith.train.batch import Batch
    from lorasmith.train.policy import computing

    model.eval()
    if method == "lora":
        inject(model, LoRAConfig(rank=RANK, alpha=2 * RANK), seed=0)
    else:
        model.requires_grad_(True)
    forward = Forward(model)
    if method == "lora":
        group_shared_inputs(model, forward.probe)
    ids = token_ids()
    batch = Batch(
        ids[:, :-1].contiguous(), None, None, torch.arange(ROWS * SLOTS), ids[:, 1:].reshape(-1).contiguous()
    )
    parameters, optimizer = trained(model)

    def step() -> float:
        loss = forward.loss_sum(batch) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    with computing(model, kernels="auto", recompute=recompute, flops=0, warm_up=step) as policy:  # type: ignore[arg-type]
        print("; ".join(policy.lines), file=sys.stderr)
        yield step


@contextmanager
def peft_step(model: Any) -> Iterator[Callable[[], float]]:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    adapted.train()
    ids = token_ids()
    parameters, optimizer = trained(adapted)

    def step() -> float:
        loss = adapted(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    yield step


def trained(model: Any) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return parameters, torch.optim.AdamW(parameters, lr=LR, fused=True)


def gemm_gflops(dtype: torch.dtype, *, repeats: int = 60) -> float:
    """Of (2048, 576) @ (576, 1536): the product that the base makes most of."""
    x, W = torch.randn(ROWS * SLOTS, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(x, W)
        best = min(best, time.perf_counter() - start)
    return 2 * x.shape[0] * W.numel() * repeats / best / 1e9


def main() -> None:
    variant, dtype = sys.argv[1], DTYPES[sys.argv[2]]
    model = load_base("smollm2-135m", dtype=dtype).model
    recompute = {"lean-memory": "mlp", "least-memory": "layers"}.get(variant, "none")
    method = "full" if variant == "full" else "lora"
    made = (
        peft_step(model) if variant == "peft" else lorasmith_step(model, method=method, recompute=recompute)
    )
    with made as step:
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "step":
                start = time.perf_counter()
                step()
                print(time.perf_counter() - start, flush=True)
            elif line.strip() == "gemm":
                print(gemm_gflops(dtype), flush=True)
            else:
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


if __name__ == "__main__":
    main()
