"""Claims about mechanics: on a tiny base, and verdicts from measurements that are made up to go each way."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lorasmith.claims import Holds, Setting, choose, run_claims
from lorasmith.claims.mechanics import algebra, disk, gpt3, latency, memory, prefix, start, steps, switching
from lorasmith.claims.mechanics.adapters import SHARE, random_adapter
from lorasmith.claims.timing import interleaved, ratio
from lorasmith.lora import LoRAConfig, delta
from tests.support.base import write_tiny_base
from tests.support.models import tiny_causal_lm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@dataclass(frozen=True)
class Given(Setting):
    """Measurements that were made before: what `cached` gives, by the key's claim."""

    results: Any = None

    def cached(self, key, compute):
        return self.results[key["claim"]]


def given(tmp_path, **results: Any) -> Given:
    return Given("none", True, tmp_path, results={name.replace("_", " "): r for name, r in results.items()})


UNTIMED = (
    "identity-at-start",
    "frozen-base",
    "generalises-full",
    "only-lora-merges",
    "subtract-and-add",
    "checkpoint-ratio",
    "hundred-tasks",
)


def test_the_untimed_claims_on_a_tiny_base(tiny, tmp_path):
    setting = Setting(str(tiny), True, tmp_path / "out", lambda text: None)
    found = run_claims(choose(UNTIMED), setting, order=UNTIMED)["claims"]
    assert [e["error"] for e in found] == [None] * len(UNTIMED)
    verdicts = {e["id"]: e["holds"] for e in found}
    assert verdicts.pop("subtract-and-add") == "does not hold"  # bf16 rounds
    assert verdicts.pop("checkpoint-ratio") == "not at this scale"
    assert set(verdicts.values()) == {"holds"}
    assert all((setting.out / e["plot"]).is_file() for e in found)


def test_a_random_adapter_has_the_size_that_was_asked():
    model = tiny_causal_lm()
    for path, f in random_adapter(model, LoRAConfig(rank=4, alpha=8)).factors.items():
        weight = model.get_parameter(f"{path}.weight").detach()
        assert float(delta(f).norm() / weight.norm()) == pytest.approx(SHARE, rel=1e-4)


def test_a_change_of_the_base_is_seen(tmp_path):
    rows = [
        {"method": m, "base tensors": 9, "base tensors changed": changed, "base gradients": 0}
        | {"trained bytes": 8, "optimizer bytes": 16}
        for m, changed in (("LoRA", 0), ("full", 9))
    ]
    assert start.measure_frozen(given(tmp_path, frozen=rows)).holds == Holds.YES
    for row, key, value in (
        (0, "base tensors changed", 1),
        (0, "optimizer bytes", 17),
        (1, "base tensors changed", 0),
    ):
        broken = [dict(r) for r in rows]
        broken[row][key] = value
        assert start.measure_frozen(given(tmp_path, frozen=broken)).holds == Holds.NO


def test_checksums_see_one_bit():
    model = tiny_causal_lm()
    names = set(model.state_dict())
    before = start.checksums(model, names)
    with torch.no_grad():
        model.model.norm.weight.view(torch.int32)[0] ^= 1
    after = start.checksums(model, names)
    assert [n for n in names if before[n] != after[n]] == ["model.norm.weight"]


def test_arms_take_turns_and_each_round_begins_with_another():
    seen = []

    def arm(name):
        @contextmanager
        def ready():
            seen.append(name)
            yield lambda: None

        return ready

    times = interleaved({name: arm(name) for name in "abc"}, seconds=0, least=3)
    assert "".join(seen) == "abcbcacab"
    assert {len(t) for t in times.values()} == {3}


def test_a_ratio_s_interval_is_of_the_rounds_ratios():
    noise = np.random.default_rng(1).normal(1, 0.2, 40)  # a slow machine slows both
    r = ratio(1.3 * noise, noise)
    assert (r.low, r.median, r.high) == pytest.approx((1.3, 1.3, 1.3))
    wide = ratio(np.random.default_rng(2).normal(1, 0.1, 40), np.ones(40))
    assert wide.low < 1 < wide.high
    assert (
        ratio(np.random.default_rng(2).normal(1, 0.1, 40), np.ones(40), confidence=0.999).width > wide.width
    )


def times_of(*, spread: float = 0.002, **factors: float) -> dict[str, Any]:
    """Rounds of every arm: the base's 1 s times the factor, with some noise."""
    dice = np.random.default_rng(0)
    names = (
        latency.BASE,
        latency.AGAIN,
        latency.MERGED,
        latency.APART_QV,
        latency.APART_ALL,
        latency.HOULSBY,
        latency.LIN,
    )
    return {n: list(factors.get(n.split(":")[0], 1.0) * dice.normal(1, spread, 30)) for n in names}


SAME = {"modules": 3, "tensors": 3, "different": 0}


@pytest.mark.parametrize(
    ("factors", "structure", "verdict"),
    [
        ({}, SAME, Holds.YES),
        ({"merged": 1.05}, SAME, Holds.NO),
        ({}, SAME | {"different": 1}, Holds.NO),
        ({"spread": 0.3}, SAME, Holds.NOT_AT_THIS_SCALE),
    ],
)
def test_merged_latency_s_verdict(tmp_path, factors, structure, verdict):
    results = {"latency, merged": {"times": times_of(**factors)}, "merged structure": structure}
    assert latency.measure_merged(given(tmp_path, **results)).holds == verdict


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.2, Holds.YES), (1.0, Holds.NOT_AT_THIS_SCALE), (0.8, Holds.NO)]
)
def test_unmerged_latency_s_verdict(tmp_path, factor, verdict):
    setting = given(tmp_path, latency={"times": times_of(apart=factor)})
    assert latency.measure_apart(setting).holds == verdict


@pytest.mark.parametrize(
    ("small", "large", "verdict"),
    [(1.3, 1.03, Holds.YES), (1.1, 1.1, Holds.NOT_AT_THIS_SCALE), (1.05, 1.3, Holds.NO)],
)
def test_bottleneck_latency_s_verdict(tmp_path, monkeypatch, small, large, verdict):
    cells = {"1 × 16": times_of(Houlsby=small, Lin=small), "8 × 64": times_of(Houlsby=large, Lin=large)}
    monkeypatch.setattr(latency, "grid", lambda setting: cells | {latency.DECODE: times_of()})
    assert latency.measure_bottleneck(given(tmp_path)).holds == verdict


def test_structure_sees_a_module_that_was_added():
    model = tiny_causal_lm()
    before = latency.structure(model)
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    assert latency.structure(model) != before


def test_every_arm_runs_and_leaves_the_base_as_it_was(tiny, tmp_path):
    model = Setting(str(tiny), True, tmp_path).load("fp32").model
    with torch.no_grad():
        runs = [latency._pass(model, cell) for cell in ("2 × 8",)]
        ids = start.random_ids(model, 1, 8)
        before = model(input_ids=ids).logits
        outputs = {}
        for name, arm in (*latency._arms_beside(model).items(), *latency._arms_merged(model).items()):
            with arm():
                [run() for run in runs]
                outputs[name] = model(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, before), name
    assert torch.equal(outputs[latency.AGAIN], before)
    assert all(not torch.equal(outputs[n], before) for n in outputs if not n.startswith("base"))


def test_the_decoding_pass_leaves_the_cache_as_long_as_it_was(tiny, tmp_path):
    model = Setting(str(tiny), True, tmp_path).load("fp32").model
    caches = []
    hook = model.register_forward_hook(
        lambda m, a, kw, out: caches.append(out.past_key_values), with_kwargs=True
    )
    with torch.no_grad():
        step = latency._pass(model, latency.DECODE)
        for _ in range(3):
            step()
            assert caches[-1].get_seq_length() == latency.DECODE_CONTEXT
    hook.remove()


@pytest.mark.parametrize(
    ("longest", "first", "verdict"),
    [(1.5, 256, Holds.YES), (1.5, 255, Holds.NO), (1.0, 256, Holds.NOT_AT_THIS_SCALE), (0.8, 256, Holds.NO)],
)
def test_prefix_s_verdict(tmp_path, longest, first, verdict):
    noise = np.random.default_rng(0)
    times = {prefix.BASE: [1.0] * 20}
    times |= {str(n): list(f * noise.normal(1, 0.01, 20)) for n, f in ((16, 1.0), (64, 1.0), (256, longest))}
    found = {"times": times, "context": 1024, "cache": 128, "first": {"16": 16, "64": 64, "256": first}}
    assert prefix.measure(given(tmp_path, prefix=found)).holds == verdict


def test_a_prefix_moves_the_text_by_its_length(tiny, tmp_path):
    model = Setting(str(tiny), True, tmp_path).load("fp32").model
    with torch.no_grad():
        assert [prefix._first_position(model, prefix._prefix(model, n)) for n in (3, 7)] == [3, 7]


def test_switching_on_a_tiny_base(tiny, tmp_path):
    setting = Setting(str(tiny), True, tmp_path, lambda text: None)
    row = switching._switches(setting, "bf16", 6)
    assert row["tensors unlike a fresh merge"] == row["tensors unlike the base after unmerge"] == 0
    assert row["tensors that a merge changes"] == 14  # seven linear layers in each of two


def test_drift_is_zero_where_nothing_rounds():
    weights = [torch.full((2, 2), 4.0)]
    deltas = [[torch.full((2, 2), value)] for value in (1.0, 2.0, 0.5)]
    assert max(switching._drift(weights, deltas, torch.float32)) == 0
    dice = torch.Generator().manual_seed(0)
    rounding = [[0.1 * torch.randn(8, 8, generator=dice)] for _ in range(3)]
    assert list(switching._drift([torch.randn(8, 8, generator=dice)], rounding, torch.bfloat16))[-1] > 0.01


def test_gpt3_s_row_is_the_paper_s():
    lora, full = gpt3.memories()
    assert lora.trainable_params == 96 * 2 * 2 * 12288 * 4
    assert memory.held(lora) == 2 * gpt3.PARAMS + 4 * lora.trainable_params * 2
    assert memory.held(full) == 8 * gpt3.PARAMS


def plan(weights: int, trained: int) -> dict[str, int]:
    parts = dict(weights_bytes=weights, adapter_bytes=0, gradient_bytes=trained, optimizer_bytes=2 * trained)
    return parts | {"activation_bytes": 10, "peak_bytes": weights + 3 * trained + 10}


@pytest.mark.parametrize(
    ("lora_peak", "full_peak", "verdict"),
    [(125, 420, Holds.YES), (330, 420, Holds.NOT_AT_THIS_SCALE), (430, 420, Holds.NO)],
)
def test_memory_s_verdict(tmp_path, lora_peak, full_peak, verdict):
    found = {
        "plan": {"lora": plan(100, 1), "full": plan(100, 100)},
        "peak": {"lora": lora_peak, "full": full_peak},
    }
    assert memory.measure(given(tmp_path, memory=found)).holds == verdict


def test_files_agree_with_the_formula_or_not():
    assert disk.agrees(1_030_000, 1_000_000)
    assert not disk.agrees(990_000, 1_000_000)
    assert not disk.agrees(1_200_000, 1_000_000)
    assert disk.agrees(10_000, 200)


@pytest.mark.parametrize(
    ("lora", "flops", "verdict"),
    [
        (0.7, 0.7, Holds.YES),
        (0.9, 0.7, Holds.NOT_AT_THIS_SCALE),
        (1.1, 0.7, Holds.NO),
        (1.1, 1.2, Holds.NOT_AT_THIS_SCALE),
    ],
)
def test_step_time_s_verdict(tmp_path, lora, flops, verdict):
    noise = np.random.default_rng(0).normal(1, 0.005, 20)
    times = {steps.LORA: list(lora * noise), steps.FULL: [1.0] * 20}
    found = {"times": times, "flops": {steps.LORA: flops, steps.FULL: 1.0}, "threads": 2}
    assert steps.measure(given(tmp_path, step_time=found)).holds == verdict


def test_a_map_that_is_affine_is_found_and_another_is_not():
    x = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert algebra._missed(x, x @ x[:8] + 3) < 1e-12
    assert algebra._missed(x, x.relu()) > 0.1
