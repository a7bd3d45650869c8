"""Many devices: what each holds and waits for, against sums done by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lorasmith.errors import ConfigError
from lorasmith.planning import (
    Computing,
    Job,
    Network,
    Pass,
    Trained,
    decoder_of,
    estimate,
    everywhere,
    known_device,
    llama_like,
    smallest_shard,
    spread,
)
from tests.support.models import tiny_causal_lm

BASE = llama_like(width=1024, mlp_width=2816, layers=4, heads=16, kv_heads=4, vocabulary=1000)
JOB = Job(BASE, everywhere(BASE, 8), [[Pass(2, 128, 200)]], steps=1, computing=Computing(recompute="layers"))
H100, NET = known_device("H100"), Network()


def test_published_sizes_give_what_the_model_itself_gives():
    model = tiny_causal_lm()
    c = model.config
    made = llama_like(
        width=c.hidden_size, mlp_width=c.intermediate_size, layers=c.num_hidden_layers, heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads, vocabulary=c.vocab_size, is_tied=c.tie_word_embeddings,
    )  # fmt: skip
    assert made == decoder_of(model, itemsize=2)


def test_the_paper_s_sizes():
    billions = [
        llama_like(
            width=w, mlp_width=m, layers=n, heads=h, kv_heads=k, vocabulary=v
        ).params / 1e9
        for w, m, n, h, k, v in (
            (4096, 11_008, 32, 32, 32, 32_000), (8192, 28_672, 80, 64, 8, 128_256), (16_384, 53_248, 126, 128, 8, 128_256),
        )
    ]  # fmt: skip
    assert [round(b, 1) for b in billions] == [6.7, 70.6, 405.9]


def test_one_device_is_the_plan():
    alone = spread(JOB, H100, NET, devices=1, shard=1)
    planned = estimate(JOB, H100, runtime_bytes=0)
    assert alone.memory_bytes == planned.peak_bytes
    assert alone.gather_s == alone.reduce_s == 0
    assert alone.efficiency == 1
    assert alone.tokens_per_s == pytest.approx(256 / alone.compute_s)


def test_a_shard_holds_what_the_plan_of_one_process_says():
    planned = estimate(replace(JOB, sharded_over=4), H100, runtime_bytes=0)
    assert spread(JOB, H100, NET, devices=8, shard=4).memory_bytes == planned.peak_bytes
    whole = spread(JOB, H100, NET, devices=8, shard=1).memory_bytes
    spared = BASE.layer_params + BASE.untied_embeddings
    assert whole - planned.peak_bytes == 2 * (
        spared - spared / 4 - 3 * BASE.layer_params / 4
    )  # 3 layers of 4


def test_seconds_of_the_network_by_hand():
    found = spread(JOB, H100, Network(latency_s=1e-3), devices=8, shard=8)
    received = 2 * 2 * BASE.linear_params * 7 / 8 / (450e9 * 0.7)
    assert found.gather_s == pytest.approx(received + 2 * 4 * 3e-3)
    gradients = 4 * JOB.trained.params(BASE)
    assert found.reduce_s == pytest.approx(2 * gradients * 7 / 8 / (450e9 * 0.7) + 3e-3)
    assert found.step_s == pytest.approx(max(found.compute_s, found.gather_s) + found.reduce_s)


def test_across_machines_all_adapters_carry_a_gather():
    assert Network().rate(8) == pytest.approx(450e9 * 0.7)
    assert Network().rate(16) == pytest.approx(400e9 * 0.7)
    assert Network(net_bytes_per_s=1e12).rate(16) == pytest.approx(450e9 * 0.7)


def test_full_fine_tuning_shards_its_state_too():
    full = replace(JOB, trained=Trained(None))
    whole, parts = (spread(full, H100, NET, devices=8, shard=s) for s in (1, 8))
    state, spread_out = 3 * 2 * BASE.params, 2 * (BASE.layer_params + BASE.untied_embeddings)
    spared = state * 7 / 8 + spread_out * 7 / 8 - 2 * 3 * BASE.layer_params / 4
    assert whole.memory_bytes - parts.memory_bytes == pytest.approx(spared, abs=2)


def test_four_bits_a_weight():
    whole, small = (spread(JOB, H100, NET, devices=2, shard=1, base_bits=bits) for bits in (None, 4.0))
    largest = 2 * 1024 * 2816  # is unpacked while it is multiplied with
    assert whole.memory_bytes - small.memory_bytes == BASE.linear_params * 1.5 - largest
    whole, small = (spread(JOB, H100, NET, devices=2, shard=2, base_bits=bits) for bits in (None, 4.0))
    held = BASE.linear_params * (1 / 2 + 3 / 4)
    assert whole.memory_bytes - small.memory_bytes == held * 1.5 - largest
    with pytest.raises(ConfigError, match="quantised"):
        spread(replace(JOB, trained=Trained(None)), H100, NET, devices=2, shard=1, base_bits=4.0)


def test_the_fewest_devices_per_copy_that_fit():
    weights = 2 * BASE.params
    tight = replace(H100, memory_bytes=int(1.1 * spread(JOB, H100, NET, devices=8, shard=4).memory_bytes) + 1)
    assert smallest_shard(JOB, tight, NET, devices=8).shard == 4
    assert smallest_shard(JOB, H100, NET, devices=8).shard == 1
    nowhere = smallest_shard(JOB, replace(H100, memory_bytes=weights // 8), NET, devices=6)
    assert (nowhere.shard, nowhere.fits) == (6, False)


def test_a_copy_on_a_part_of_the_devices_is_refused():
    with pytest.raises(ConfigError, match="divisor"):
        spread(JOB, H100, NET, devices=8, shard=3)


def test_latency_grows_with_the_logarithm():
    assert [round(NET.wait(n) / NET.latency_s) for n in (1, 2, 8, 9, 1024)] == [0, 1, 3, 4, 10]
    assert math.isclose(NET.wait(1), 0)
