"""The engine on a device that is not the CPU: torch's meta device, which checks shapes and computes nothing.

A step that read a number back, or mixed a tensor of the CPU into a product, would fail here.
"""

from __future__ import annotations

import pytest
import torch

from lorasmith.engine.llama import LlamaRunner
from lorasmith.engine.registry import Registry
from lorasmith.engine.runner import Batch
from tests.support.engines import mixed_adapters
from tests.support.models import VOCAB, tiny_causal_lm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [False, True])
def test_no_tensor_of_a_step_is_left_on_the_cpu(dtype, exact, monkeypatch):
    adapters = mixed_adapters(tiny_causal_lm("qwen3"))
    registry = Registry(lambda _: None)
    for name, adapter in adapters.items():
        registry.add(name, adapter)
    owners = [None, *(registry.lease(name) for name in adapters)]
    # Whether bits are equal is a question that a tensor without numbers cannot answer.
    monkeypatch.setattr(LlamaRunner, "_gives_rows_their_own_bits", lambda self: True)
    model = tiny_causal_lm("qwen3", dtype=dtype).to("meta")
    runner = LlamaRunner(model, max_rows=len(owners), exact=exact)
    assert runner.cache.keys[0].device.type == "meta"
    for order in (owners, owners[::-1], [owners[1]] * len(owners), [None] * len(owners)):
        rows = list(range(len(order)))
        with torch.inference_mode():
            runner.slots.hold(order)
            for lengths, starts in (
                ([9, 3, 5, 9, 1, 2], [0] * 6),
                ([4] * 6, [9, 3, 5, 9, 1, 2]),
                ([1] * 6, [13] * 6),
            ):
                batch = Batch(
                    tokens=torch.zeros(len(order), max(lengths), dtype=torch.long, device="meta"),
                    rows=rows,
                    starts=starts,
                    lengths=lengths,
                    routing=runner.slots.route(order, exact=exact),
                )
                logits = runner.forward(batch)
                assert logits.device.type == "meta"
                assert logits.shape == (len(order), VOCAB)
            runner.cache.move(3, 1, 9)
            runner.cache.write(0, 0, runner.cache.read(2, 0, 4))
            runner.cache.clear(2)
    for stack in runner.slots.stacks:
        assert {t.device.type for t in (stack.A, *stack.B)} == {"meta"}
        assert stack.A.dtype == dtype
