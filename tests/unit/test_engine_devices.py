"""The engine on a device that is not the CPU: torch's meta device, which checks shapes and computes nothing.

A step that read a number back, or mixed a tensor of the CPU into an operation, would fail here.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasmith.engine.generic import GenericRunner
from lorasmith.engine.llama import LlamaRunner
from lorasmith.engine.registry import Registry
from lorasmith.engine.runner import Batch
from tests.support.engines import mixed_adapters
from tests.support.models import VOCAB, tiny_causal_lm


class OneDevice(TorchDispatchMode):
    """Refuses operations over tensors of two devices, as CUDA does; copies may cross, and single numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        if func not in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            assert len({t.device for t in tensors}) <= 1, f"{func} over {[t.device for t in tensors]}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", [LlamaRunner, GenericRunner])
def test_no_tensor_of_a_step_is_left_on_the_cpu(dtype, exact, kind, monkeypatch):
    adapters = mixed_adapters(tiny_causal_lm("qwen3"))
    registry = Registry(lambda _: None)
    for name, adapter in adapters.items():
        registry.add(name, adapter)
    owners = [None, *(registry.lease(name) for name in adapters)]
    # Whether bits are equal is a question that a tensor without numbers cannot answer.
    monkeypatch.setattr(LlamaRunner, "_gives_rows_their_own_bits", lambda self: True)
    monkeypatch.setattr(GenericRunner, "_check_against_plain_forward", lambda self: None)
    model = tiny_causal_lm("qwen3", dtype=dtype).to("meta")
    runner = kind(model, max_rows=len(owners), exact=exact)
    assert runner.cache.keys[0].device.type == "meta"
    for order in (owners, owners[::-1], [owners[1]] * len(owners), [None] * len(owners)):
        rows = list(range(len(order)))
        with torch.inference_mode(), OneDevice():
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
