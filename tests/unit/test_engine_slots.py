"""The products of a mixed batch against the same sum written out, in torch and in C."""

from __future__ import annotations

import shutil

import pytest
import torch

from lorasmith.engine import native
from lorasmith.engine.registry import Registry
from lorasmith.engine.slots import GroupSpec, Slots, add_lora
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.tolerance import close

CPU = torch.device("cpu")
SPEC = GroupSpec(("q", "k", "v"), 40, (24, 200, 129))
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler on this machine")


def adapter(seed: int, paths: str, rank: int) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    factors = {
        p: Factors(
            torch.randn(rank + i, 40, generator=g), torch.randn(n, rank + i, generator=g), 0.5 + 0.25 * seed
        )
        for i, (p, n) in enumerate(zip("qkv", SPEC.out_features, strict=True))
        if p in paths
    }
    return Adapter(LoRAConfig(), factors)


def generations() -> list:
    registry = Registry(lambda _: None)
    made = [adapter(0, "qkv", 3), adapter(1, "qv", 8), adapter(2, "k", 1), adapter(3, "qkv", 17)]
    for i, a in enumerate(made):
        registry.add(str(i), a)
    return [registry.lease(str(i)) for i in range(len(made))]


def written_out(y, x, owners, tokens: int):
    expected, start = y.double().clone(), 0
    for path, n in zip(SPEC.paths, SPEC.out_features, strict=True):
        for row, owner in enumerate(owners):
            f = owner and owner.adapter.factors.get(path)
            if f:
                own = slice(row * tokens, (row + 1) * tokens)
                product = (x[own].double() @ f.A.double().T) @ f.B.double().T * f.scaling
                expected[own, start : start + n] += product
        start += n
    return expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("pattern", ["0", "000", "0123", "3210", "0-1-", "1133-", "2-", "3333332"])
def test_every_mixture_equals_the_sum_written_out(dtype, tokens, exact, pattern):
    slots, made = Slots([SPEC], dtype, CPU), generations()
    owners = [None if c == "-" else made[int(c)] for c in pattern]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(owners) * tokens, 40, generator=g).to(dtype)
    y = torch.randn(len(owners) * tokens, sum(SPEC.out_features), generator=g).to(dtype)
    expected = written_out(y, x, owners, tokens)
    slots.hold(owners)
    routing = slots.route(owners, exact=exact)
    assert routing is not None
    add_lora(y, x, slots, 0, routing)
    scale = float(expected.abs().max())
    close(y / scale, expected / scale, dtype)


def test_a_slot_that_is_used_again_keeps_nothing_of_the_one_before():
    slots, made = Slots([SPEC], torch.float64, CPU), generations()
    x, y = torch.ones(1, 40, dtype=torch.float64), torch.zeros(1, sum(SPEC.out_features), dtype=torch.float64)
    for owner in (made[3], made[2], made[1], made[2], made[0]):
        slots.hold([owner])
        routing = slots.route([owner])
        assert routing is not None
        got = y.clone()
        add_lora(got, x, slots, 0, routing)
        close(got, written_out(y, x, [owner], 1), torch.float64)


def test_random_sequences_of_batches_stay_right():
    slots, made = Slots([SPEC], torch.float64, CPU), generations()
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        picks = torch.randint(-1, 4, (int(torch.randint(1, 7, (), generator=g)),), generator=g).tolist()
        live = [None if p < 0 else made[p] for p in picks]
        slots.hold(live)
        owners = live[: max(1, len(live) // 2)]
        routing = slots.route(owners)
        x = torch.randn(len(owners), 40, generator=g, dtype=torch.float64)
        y = torch.zeros(len(owners), sum(SPEC.out_features), dtype=torch.float64)
        expected = written_out(y, x, owners, 1)
        if routing is not None:
            add_lora(y, x, slots, 0, routing)
        close(y, expected, torch.float64)


@needs_compiler
def test_the_c_function_gives_a_row_the_same_bits_in_any_company():
    slots, made = Slots([SPEC], torch.bfloat16, CPU), generations()
    assert slots.stacks[0].is_native
    g = torch.Generator().manual_seed(2)
    x = torch.randn(6, 40, generator=g).bfloat16()
    owners = [made[0], made[3], None, made[1], made[0], made[2]]

    def run(rows: list[int]) -> torch.Tensor:
        y = torch.ones(len(rows), sum(SPEC.out_features)).bfloat16()
        chosen = [owners[r] for r in rows]
        slots.hold(chosen)
        routing = slots.route(chosen, exact=True)
        if routing is not None:
            add_lora(y, x[rows], slots, 0, routing)
        return y

    together = run(list(range(6)))
    for rows in ([0], [1], [2], [5, 3], [4, 0, 1], [5, 4, 3, 2, 1, 0]):
        assert torch.equal(run(rows), together[rows])


@needs_compiler
def test_the_c_function_passes_on_nan_and_rounds_as_torch_does():
    slots, made = Slots([SPEC], torch.bfloat16, CPU), generations()
    slots.hold([made[0]])
    routing = slots.route([made[0]])
    assert routing is not None
    y = torch.zeros(1, sum(SPEC.out_features)).bfloat16()
    add_lora(y, torch.full((1, 40), torch.nan).bfloat16(), slots, 0, routing)
    assert y.isnan().all()
    stack = slots.stacks[0]
    x = torch.zeros(1, 40).bfloat16()
    x[0, 0] = 1.0
    y = torch.zeros(1, sum(SPEC.out_features)).bfloat16()
    add_lora(y, x, slots, 0, routing)
    u = stack.A[0].float()[:3, 0]
    terms = u[:, None] * stack.B[0][0, :3].float()
    expected = (terms[0] + terms[1] + terms[2]).bfloat16()  # a sum of three has one order of adding
    assert (y[0, :24].float() - expected.float()).abs().max() <= expected.float().abs().max() * 2**-8


def test_without_a_compiler_torch_computes(monkeypatch):
    native.library.cache_clear()
    monkeypatch.setenv("LORASMITH_NATIVE", "0")
    try:
        assert native.library() is None
        assert not Slots([SPEC], torch.bfloat16, CPU).stacks[0].is_native
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert native.library.__wrapped__() is None
