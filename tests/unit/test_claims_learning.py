"""The learning claims: rules on made-up results in every direction, mathematics against known answers, one small run of all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasmith.analysis import extract_from_full, relative_error, truncate
from lorasmith.claims import Holds, Setting
from lorasmith.claims.learning import (
    LEARNING,
    amplifying,
    approach,
    dimension,
    low_data,
    matrices,
    prefix,
    rank,
    subspaces,
)
from lorasmith.claims.learning import sizes as sizes_module
from lorasmith.claims.learning.runs import Arm, Outcome, Tuned, run, tune
from lorasmith.claims.learning.sizes import QUICK
from lorasmith.claims.learning.spread import (
    Interval,
    all_of,
    below,
    difference,
    mean_interval,
    pooled,
    t_quantile,
)
from lorasmith.lora import Adapter, Factors, LoRAConfig
from lorasmith.train import train
from tests.support.base import write_tiny_base

YES, NO, UNTOLD = Holds.YES, Holds.NO, Holds.NOT_AT_THIS_SCALE
BASE_LOSS = 2.0


def tuned(*losses: float) -> Tuned:
    runs = tuple(Outcome(loss, BASE_LOSS, 10, Path("nowhere")) for loss in losses)
    return Tuned(1e-3, losses, {1e-3: losses[0]}, runs)


def near(loss: float, width: float = 0.001) -> Tuned:
    return tuned(loss - width, loss + width)


# Student's t at 97.5 %: the figures of any printed table.
@pytest.mark.parametrize(
    ("freedom", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042)]
)
def test_t_is_that_of_the_tables(freedom, printed):
    assert t_quantile(freedom) == pytest.approx(printed, rel=0.006)


def test_spread_pools_what_is_within_arms_and_not_between_them():
    spread = pooled([(1.0, 3.0), (11.0, 13.0), (5.0,), (math.inf, 7.0)])
    assert (spread.sd, spread.freedom) == (pytest.approx(math.sqrt(2)), 2)
    found = difference((1.0, 3.0), (11.0, 13.0), spread)
    assert found.mean == -10
    assert found.half == pytest.approx(
        math.sqrt(2) * t_quantile(2)
    )  # both halves have two runs: sd · √(1/2 + 1/2)
    assert difference((1.0,), (2.0,), pooled([(1.0,), (2.0,)])).half == math.inf


def test_a_verdict_needs_the_whole_interval_on_one_side():
    assert [below(Interval(m, 1.0), 0.0) for m in (-2, 0.5, 2)] == [YES, UNTOLD, NO]
    assert [all_of(YES, v) for v in (YES, UNTOLD, NO)] == [YES, UNTOLD, NO]
    assert all_of(UNTOLD, NO) is NO
    assert mean_interval([1.0, 1.0, 1.0]) == Interval(1.0, 0.0)


def test_rank_rule_in_all_directions():
    def holds(one: Tuned) -> Holds:
        curve = {1: one, 8: near(1.0), 64: near(1.001)}
        return rank.judge({"q, v": curve, "all linear": {1: near(1.0), 64: near(1.0)}}).holds

    assert holds(near(1.01)) is YES
    assert holds(near(1.3)) is NO
    assert holds(tuned(0.8, 1.3)) is UNTOLD


def test_matrices_rule_in_all_directions():
    def holds(**changed: Tuned) -> Holds:
        found = {n: near(1.0) for n in (*matrices.ATTENTION, *matrices.BEYOND)} | {"q": near(1.2)}
        return matrices.judge(found | changed, dict.fromkeys(found, 4)).holds

    assert holds() is YES
    assert holds(**{"q, v": near(1.3)}) is NO
    assert holds(**{"q, v": tuned(0.9, 1.5)}) is UNTOLD


def test_budget_is_exact_where_it_can_be_and_nearest_elsewhere():
    q, v, all_four, mlp = 34560, 23040, 115200, 190080  # SmolLM2-135M: Σ (in + out) of 30 layers
    costs = {"q": q, "v": v, "all": all_four, "mlp": mlp}
    budget, ranks = matrices.budget_ranks(costs, ["q", "v", "all"])
    assert all(ranks[name] * costs[name] == budget for name in ("q", "v", "all"))
    assert abs(ranks["mlp"] * mlp - budget) <= mlp / 2


def test_ranks_of_a_budget_come_from_the_shapes(tmp_path):
    base = write_tiny_base(tmp_path / "base")  # two layers of width 32, 4 heads, 2 of keys and values
    assert matrices.params_per_rank(str(base), ("q_proj",)) == 2 * (32 + 32)
    assert matrices.params_per_rank(str(base), ("q_proj", "v_proj")) == 2 * (32 + 32 + 32 + 16)


def test_approach_rule_in_all_directions():
    falling, rising = {1: 1.5, 16: 1.2, 256: 1.0}, {1: 1.0, 16: 1.2, 256: 1.0}

    def holds(top: Tuned, cut: dict[int, float] = falling) -> Holds:
        return approach.judge({1: near(1.2), 64: top}, near(1.0), cut, {}).holds

    assert holds(near(1.01)) is YES
    assert holds(near(1.01), rising) is NO
    assert holds(near(1.4)) is NO
    assert holds(tuned(0.8, 1.3)) is UNTOLD
    assert approach.judge({1: near(1.01), 64: near(1.02)}, near(1.0), falling, {}).holds is UNTOLD


def test_prefix_rule_in_all_directions():
    flat = {1: near(1.0), 64: near(1.001)}
    assert prefix.judge({1: near(1.5), 16: near(1.4), 64: near(1.6)}, flat).holds is YES
    assert (
        prefix.judge({1: near(1.6), 16: near(1.5), 64: near(1.4)}, flat).holds is NO
    )  # longer is always better
    assert prefix.judge({1: tuned(1.2, 1.6), 64: tuned(1.3, 1.7)}, flat).holds is UNTOLD
    assert prefix.judge({1: near(1.4), 64: near(1.6)}, {1: near(1.0), 64: near(1.5)}).holds is NO


def test_low_data_rule_in_all_directions():
    def holds(lora: Tuned) -> Holds:
        return low_data.judge({"LoRA": {16: lora, 64: near(1.0)}, "full": {16: near(1.4), 64: near(1.0)},
                               "prefix": {16: near(1.8), 64: near(1.5)}}).holds  # fmt: skip

    assert [holds(t) for t in (near(1.2), near(1.6), tuned(1.1, 1.7))] == [YES, NO, UNTOLD]


def adapter(*, rows: int, columns: int, rank: int, seed: int, layers: int = 8) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    factors = {
        f"layers.{k}.{kind}": Factors(torch.randn(rank, columns, generator=random), torch.randn(rows, rank, generator=random), 1.0)
        for k in range(layers) for kind in ("q_proj", "v_proj")
    }  # fmt: skip
    return Adapter(LoRAConfig(rank=rank, targets=("q_proj", "v_proj")), factors)


def test_the_same_adapter_shares_all_directions_and_random_ones_share_none():
    a, b, c = (adapter(rows=200, columns=100, rank=r, seed=s) for r, s in ((8, 0), (64, 1), (64, 2)))
    same = subspaces.overlaps(a, a, a)
    assert same["q_proj"]["first"] == pytest.approx([1.0] * 8)
    assert same["q_proj"]["first_of_A"] == pytest.approx([1.0] * 8)
    assert subspaces.judge(same).holds is YES
    random = subspaces.overlaps(a, b, c)
    assert random["v_proj"]["chance"] == 1 / 200
    assert random["v_proj"]["map"][0][15] == pytest.approx(
        16 / 200, abs=0.05
    )  # 16 of 200 directions hold their share
    assert random["v_proj"]["map_by_chance"][0][15] == pytest.approx(16 / 200, abs=0.05)
    assert subspaces.judge(random).holds is NO
    half = {kind: values | {"first": [0.2 + 0.01 * k for k in range(8)]} for kind, values in random.items()}
    assert subspaces.judge(half).holds is UNTOLD


def test_amplification_rule_in_all_directions():
    layer = {
        "delta_norm": 2.0,
        "weight_norm": 60.0,
        "on_delta": 0.5,
        "on_weight": 20.0,
        "on_random": 0.1,
        "factor": 4.0,
    }
    fine = {8: [layer] * 10, 64: [layer | {"factor": 2.0}] * 10}
    assert amplifying.judge(fine).holds is YES
    assert amplifying.judge(fine | {64: [layer | {"factor": 5.0}] * 10}).holds is NO
    assert amplifying.judge(fine | {8: [layer] * 8 + [layer | {"on_random": 0.9}] * 2}).holds is UNTOLD
    assert amplifying.judge(fine | {8: [layer] * 4 + [layer | {"on_random": 0.9}] * 6}).holds is NO


def dimension_result(lora: int | None, scratch: int | None, known: int | None) -> Holds:
    def space(d90: int | None, params: int, most: int) -> dict:
        return {"d90": d90, "params": params, "gains": {}, "most_tried": most}

    return dimension.judge({
        "lora": space(lora, 10_000, 512), "scratch": space(scratch, 5000, 4096), "pretrained": space(known, 5000, 4096),
    }).holds  # fmt: skip


def test_dimension_rule_in_all_directions():
    assert dimension_result(256, 2048, 512) is YES
    assert dimension_result(256, None, 512) is YES
    assert dimension_result(4096, 2048, 512) is NO
    assert dimension_result(256, 512, 2048) is NO
    assert dimension_result(256, 512, 512) is UNTOLD
    assert dimension_result(None, 2048, 512) is UNTOLD  # fewer numbers were tried than a tenth


def test_leading_directions_are_the_truncation():
    random = torch.Generator().manual_seed(0)
    before = {"a.weight": torch.randn(24, 16, generator=random)}
    after = {"a.weight": before["a.weight"] + torch.randn(24, 16, generator=random)}
    whole = extract_from_full(before, after, rank=16).adapter
    assert relative_error(truncate(whole, rank=3), approach.leading(whole, 3)).overall < 1e-6
    D = after["a.weight"] - before["a.weight"]
    f = approach.leading(whole, 16).factors["a"]
    assert torch.allclose(f.B @ f.A * f.scaling, D, atol=1e-5)


TINY = replace(
    QUICK, steps=2, held_out=4, rates=(1e-3, 1e-2), full_rates=(1e-3,), prefix_rates=(1e-2,), ranks=(1, 4), few=(8,),
    lengths=(1, 16), dimensions=(4, 64), projections=1, byte_steps=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    overrides = {
        "max_position_embeddings": 1024,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
    }
    base = write_tiny_base(folder / "base", **overrides)
    return Setting(str(base), quick=True, out=folder / "out", say=lambda line: None)


def test_an_arm_is_trained_once_and_as_train_does_it(setting, monkeypatch, tmp_path):
    monkeypatch.setattr(sizes_module, "QUICK", TINY)
    arm = Arm("lora", 16, 2, 4, rank=4)
    found = tune(setting, [arm], TINY.rates, (0, 1))[arm]
    assert found.lr == min(found.by_rate, key=found.by_rate.__getitem__)
    assert found.losses[0] == found.by_rate[found.lr]
    assert found.losses[0] != found.losses[1]
    chosen = replace(arm, lr=found.lr, seed=1)
    alone = train(
        setting.load(), sizes_module.training_records(16), chosen.lora, chosen.train, out=tmp_path / "alone",
        eval_data=sizes_module.held_out_records(4), quiet=True,
    )  # fmt: skip
    assert alone.eval_loss == pytest.approx(found.losses[1], rel=1e-5)
    assert alone.trainable_params == found.runs[1].params
    kept = (found.runs[1].folder / "outcome.json").stat().st_mtime_ns
    run(setting, [chosen])
    assert (found.runs[1].folder / "outcome.json").stat().st_mtime_ns == kept


def test_every_claim_measures_and_draws_on_a_tiny_base(setting, monkeypatch):
    monkeypatch.setattr(sizes_module, "QUICK", replace(TINY, rates=TINY.rates[:1]))
    monkeypatch.setattr(dimension, "TINY_DIMENSIONS", (4, 1024))
    assert len({claim.id for claim in LEARNING}) == len(LEARNING)
    for claim in LEARNING:
        measured = claim.measure(setting)
        assert measured.holds in Holds
        assert measured.said.endswith(".")
        json.dumps([dict(measured.figures), list(measured.rows)], allow_nan=False)
        plot = setting.out / f"{claim.id}.png"
        claim.draw(measured, plot)
        assert plot.read_bytes()[:4] == b"\x89PNG"
