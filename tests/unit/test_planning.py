"""FLOPs against torch's own counter, limits of containers, settings that fit a budget, devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, mm_flop

from lorasmith.cli.planned import seconds_of_run
from lorasmith.errors import BudgetError, ConfigError
from lorasmith.inject import inject, lora_layers
from lorasmith.lora import LoRAConfig
from lorasmith.planning import (
    DEVICES,
    Computing,
    Decoder,
    Job,
    Machine,
    Pass,
    Trained,
    cgroup_limits,
    decoder_of,
    estimate,
    fit,
    known_device,
    this_machine,
    work_of,
)
from lorasmith.train import Forward
from lorasmith.train.batch import Batch
from tests.support.models import tiny_causal_lm

GIB = 2**30
PLAIN = Computing()
MACHINE = Machine("test", 8 * GIB, 1e12, 1e11, "made up")


def seven_billion() -> Job:
    """A decoder of Llama 2 7B's sizes with every linear layer adapted at rank 16."""
    shapes = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (4096, 4096),
        "self_attn.v_proj": (4096, 4096),
    }
    shapes |= {"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096)}
    shapes |= {"mlp.down_proj": (4096, 11008)}
    linears = {f"layers.{i}.{name}": shape for i in range(32) for name, shape in shapes.items()}
    decoder = Decoder(6_738_415_616, 2, linears, 32, 4096, 32, 32, 128, 11008, 32000)
    return Job(decoder, Trained(dict.fromkeys(linears, 16)), [[Pass(2, 1024, 1024)]], steps=10)


class Products(TorchDispatchMode):
    """Counts the operations of every matrix product that is really run, by torch's own formulas."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten.mm:
            self.flops += mm_flop(args[0].shape, args[1].shape)
        elif packet in (torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.flops += addmm_flop(args[0].shape, args[1].shape, args[2].shape)
        return out


@pytest.mark.parametrize("method", ["lora", "full"])
def test_flops_are_what_torch_counts(method):
    model = tiny_causal_lm("llama", num_hidden_layers=3)
    trained = Trained(None)
    if method == "lora":
        inject(model, LoRAConfig(rank=4))
        trained = Trained({path: layer.factors.rank for path, layer in lora_layers(model).items()})
    else:
        model.requires_grad_(True)
    forward = Forward(model)
    ids = torch.arange(96).view(4, 24) % 60
    sources = torch.arange(0, 96, 3)
    with Products() as counted:
        forward.loss_sum(Batch(ids, None, None, sources, sources % 60)).backward()
    work = work_of(decoder_of(model), trained, Pass(4, 24, 32), Computing())
    # With LoRA nothing below the first adapter needs a gradient, so the count has a few products less.
    assert counted.flops == pytest.approx(work.flops - work.attention, rel=0.06)


def test_limits_of_containers_old_and_new(tmp_path: Path):
    group = tmp_path / "v2/a/b"
    group.mkdir(parents=True)
    for place, limit in ((group, "max"), (group.parent, str(3 * GIB))):
        (place / "memory.max").write_text(limit)
        (place / "memory.current").write_text(str(GIB))
        (place / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")
    table = tmp_path / "table"
    table.write_text("0::/a/b\n")
    assert cgroup_limits(tmp_path / "v2", table) == [(3 * GIB, 3 * GIB // 4)]

    old = tmp_path / "v1/memory/job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (old / "memory.usage_in_bytes").write_text("100")
    (old / "memory.stat").write_text("total_inactive_file 40\n")
    table.write_text("7:cpu:/x\n5:memory:/job\n")
    assert cgroup_limits(tmp_path / "v1", table) == [(2 * GIB, 60)]
    assert cgroup_limits(tmp_path / "none", tmp_path / "absent") == []


def fitted(memory: float, *, computing: Computing = PLAIN, **asked: Any):
    settings = {"rank": 16, "batch_tokens": 8192, "max_length": 1024, "recomputes": ("none", "mlp", "layers")}
    job = replace(seven_billion(), computing=computing)

    def passes_of(tokens: int):
        rows = max(1, tokens // 1024)
        return [[Pass(rows, 1024, rows * 512)] * (8 // rows)], []

    within = replace(MACHINE, memory_bytes=int(memory * GIB))
    return fit(job, within, passes_of, runtime_bytes=GIB // 2, **settings | asked)


@pytest.mark.parametrize("is_block", [True, False])
def test_a_budget_is_met_by_the_cheapest_sacrifice(is_block):
    how = Computing(is_block=is_block, is_tiled=True)
    free = fitted(200, computing=how)
    assert (free.rank, free.batch_tokens, free.recompute) == (16, 8192, "none")
    assert free.reason == "everything fits as asked"
    seen = {}
    for memory in range(120, 10, -1):
        try:
            found = fitted(memory / 2, computing=how, least_rank=1)
        except BudgetError:
            break
        assert found.peak_bytes <= memory / 2 * GIB
        seen[found.rank, found.recompute, found.batch_tokens] = found.train_s
    exact = [s for (rank, *_), s in seen.items() if rank == 16]
    assert exact == sorted(exact)  # each slower than the one before, by the plan's own reckoning
    assert list(seen)[-1][1] == "layers"
    assert list(seen)[-1][0] < 16
    assert any(recompute == "mlp" for _, recompute, _ in seen) == is_block


def test_the_rank_is_kept_unless_it_may_be_lowered():
    lowered = []
    for memory in range(340, 260, -1):
        try:
            found = fitted(memory / 20, least_rank=1)
        except BudgetError:
            break
        if found.rank < 16:
            assert "rank" in found.reason
            lowered.append(memory / 20)
    assert lowered
    with pytest.raises(BudgetError):
        fitted(lowered[0])


def test_a_budget_below_the_weights_says_so():
    with pytest.raises(BudgetError, match=r"12\.55 GiB for the base's weights"):
        fitted(8)


def test_each_part_of_the_peak_grows_with_what_causes_it():
    job = seven_billion()
    base = estimate(job, MACHINE, runtime_bytes=0)
    wider = estimate(replace(job, passes=[[Pass(4, 1024, 1024)]]), MACHINE, runtime_bytes=0)
    recomputed = estimate(replace(job, computing=Computing(recompute="layers")), MACHINE, runtime_bytes=0)
    full = estimate(replace(job, trained=Trained(None)), MACHINE, runtime_bytes=0)
    assert wider.activation_bytes > 1.8 * base.activation_bytes
    assert recomputed.activation_bytes < 0.3 * base.activation_bytes
    assert recomputed.train_s > base.train_s
    assert full.optimizer_bytes == 2 * 2 * job.decoder.params
    assert full.flops / base.flops == pytest.approx(1.5, rel=0.1)  # 6 against 4 per weight and token
    assert not full.fits
    assert base.weights_bytes + base.adapter_bytes + base.activation_bytes < base.peak_bytes


def test_devices():
    assert known_device("h100").memory_bytes == 80 * GIB
    assert known_device("RTX4090").flops < DEVICES["RTX4090"][1] * 1e12
    with pytest.raises(ConfigError, match='Did you mean "RTX4090"'):
        known_device("RTX-4090")


def test_this_machine_is_measured_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    machine = this_machine(torch.float32)
    assert torch.equal(before, torch.get_rng_state())
    assert machine.flops > 1e8
    assert 1e8 < machine.memory_bytes < 1e14
    assert "measured" in machine.note


def test_seconds_of_a_run_count_its_first_step_s_surplus_once():
    rows = [{"step_s": s, "tokens": t} for s, t in ((5.0, 100), (1.0, 100), (2.0, 200), (9.0, 300))]
    assert seconds_of_run(rows, 1000) == pytest.approx(1000 * 0.02 + 3.0)  # 12 s for 600 tokens
    assert seconds_of_run(rows[:1], 1000) == pytest.approx(50.0)


def test_memory_that_goes_back_leaves_no_holes():
    job = seven_billion()
    kept, back = (
        estimate(replace(job, gives_back=gives_back), MACHINE, runtime_bytes=0)
        for gives_back in (False, True)
    )
    assert kept.activation_bytes == back.activation_bytes
    assert kept.peak_bytes - back.peak_bytes == kept.allocator_bytes - back.allocator_bytes > GIB // 10
