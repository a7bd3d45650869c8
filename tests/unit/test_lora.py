"""The mathematics on plain tensors: settings, delta, one rounding, digests."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lorasmith.errors import ConfigError
from lorasmith.lora import Adapter, Factors, LoRAConfig, add_delta, delta, generator_for, init_factors
from tests.support.tolerance import close


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(rank=0), "rank=0: use a whole number of at least 1"),
        (dict(rank=2.5), "rank=2.5"),
        (dict(rank=True), "rank=True"),
        (dict(alpha=-1), "alpha=-1: use a positive number"),
        (dict(alpha=float("nan")), "alpha=nan"),
        (dict(dropout=1.0), "dropout=1.0: use at least 0 and below 1"),
        (dict(targets=[]), "targets is empty"),
        (dict(targets=[3]), "targets=(3,): use a list of module names"),
        (dict(targets="(q_proj"), "is not a regular expression"),
        (dict(init="xavier"), "init='xavier' is unknown: use one of 'normal', 'uniform'"),
        (dict(bias="some"), "bias='some' is unknown"),
        (dict(layers=[-1]), "layers=(-1,): use whole numbers from 0"),
        (dict(layers=[]), "layers is empty"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern['q_proj']=0"),
        (dict(alpha_pattern={"q_proj": "x"}), "alpha_pattern['q_proj']='x'"),
        (dict(rank_pattern=[1]), "use a map from path suffix to number"),
        (dict(rslora="yes"), "rslora='yes': use true or false"),
    ],
)
def test_each_wrong_setting_says_what_to_do(settings, said):
    with pytest.raises(ConfigError) as error:
        LoRAConfig(**settings)
    assert said in str(error.value)


def test_all_faults_come_at_once_and_unknown_keys_get_a_suggestion():
    with pytest.raises(ConfigError) as error:
        LoRAConfig(rank=0, alpha=0, dropout=2)
    assert all(name in str(error.value) for name in ("rank=0", "alpha=0", "dropout=2"))
    with pytest.raises(ConfigError, match=r'"rnak" is not a setting\. Did you mean "rank"'):
        LoRAConfig.from_dict({"rnak": 4})


def test_config_round_trips_through_plain_values():
    config = LoRAConfig(rank=4, targets=["q_proj"], layers=range(3), rank_pattern={"v_proj": 2}, rslora=True)
    assert LoRAConfig.from_dict(config.to_dict()) == config


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoRAConfig(rank=16, alpha=32).scaling_of("any") == 2.0
    assert LoRAConfig(rank=16, alpha=32, rslora=True).scaling_of("any") == 8.0
    patterned = LoRAConfig(
        rank=8, alpha=8, rank_pattern={"q_proj": 4, "proj": 2}, alpha_pattern={r"1\.q_proj": 12}
    )
    assert patterned.scaling_of("layers.0.q_proj") == 2.0
    assert patterned.scaling_of("layers.1.q_proj") == 3.0
    assert patterned.rank_of("layers.0.up_proj") == 8  # a key ends a path at a dot, not inside a name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_delta_and_its_sum_against_a_loop(dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)
    factors = Factors(A, B, 0.7)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        for j in range(5):
            expected[i, j] = 0.7 * sum(B[i, k].item() * A[k, j].item() for k in range(2))
    close(delta(factors, dtype=torch.float64), expected, torch.float64)
    W0 = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype)
    W0, expected = (W0.T.contiguous(), expected.T) if transposed else (W0, expected)
    before = W0.clone()
    close(add_delta(W0, factors, transposed=transposed), W0.double() + expected, dtype)
    assert torch.equal(W0, before)


def test_digest_changes_with_every_part_of_the_function():
    def adapter(**changes):
        factors = init_factors(6, 3, rank=2, scaling=2.0, generator=generator_for(0, "m"))
        return Adapter(LoRAConfig(rank=2), {"m": dataclasses.replace(factors, **changes)})

    base = adapter()
    assert base.digest == adapter().digest
    edited = base.factors["m"].A.clone()
    edited[0, 0] += 1e-6
    others = [adapter(A=edited), adapter(scaling=2.5), adapter(A=base.factors["m"].A.double())]
    renamed = Adapter(base.config, {"n": base.factors["m"]})
    biased = Adapter(base.config, base.factors, {"m": torch.zeros(3)})
    assert len({a.digest for a in (base, *others, renamed, biased)}) == 6
    assert base.num_params == 2 * (6 + 3)
    assert base.num_bytes == 4 * base.num_params


def test_config_of_every_kind_goes_through_json_and_back():
    config = LoRAConfig(
        targets=["a"], parts={"a": [(0, 2), (4, 6)]}, trainable_tokens={"e": [3, 1]}, modules_to_save=["h"],
        target_parameters=["x.w"], lora_bias=True,
    )  # fmt: skip
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (dict(trainable_tokens={"e": [1, 1]}), "a list of different token ids"),
        (dict(trainable_tokens={"e": 5}), "a list of different token ids"),
        (dict(trainable_tokens=[1]), "use a map from path suffix to a list"),
        (dict(modules_to_save=[""]), "use a list of path suffixes"),
        (dict(lora_bias="yes"), "use true or false"),
        (dict(targets=()), "targets is empty"),
    ],
)
def test_settings_of_other_kinds_are_checked(values, reason):
    with pytest.raises(ConfigError, match=reason):
        LoRAConfig(**values)
