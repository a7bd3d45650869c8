"""What no batch can hold: adapters with more than factors, and models without keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorasmith.engine import Engine, Request
from lorasmith.errors import BudgetError, ConfigError
from lorasmith.inject import eject, inject, lora_layers, merged
from lorasmith.lora import Adapter
from tests.support.engines import (
    engine_of,
    greedy,
    make_adapter,
    mixed_adapters,
    some_requests,
    tiny_base,
    with_biases,
)
from tests.support.models import VOCAB, tokens


def expected_of(model, adapters, request: Request) -> tuple[int, ...]:
    if request.adapter is None:
        return greedy(model, request)
    with merged(model, adapters[request.adapter]):
        return greedy(model, request)


@pytest.mark.parametrize("runner", ["fast", "generic"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_adapters_with_biases_and_a_head_are_served_beside_the_others(runner, deterministic):
    base = tiny_base("qwen2", dtype=torch.float64)
    adapters = mixed_adapters(base.model) | {
        "biased": with_biases(base.model, 7),
        "all": with_biases(base.model, 8, targets=["down_proj", "lm_head"], bias="all"),
    }
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    engine = engine_of(base, adapters, max_rows=5, runner=runner, deterministic=deterministic)
    assert engine.served_alone.keys() == {"biased", "all"}
    assert "bias" in engine.served_alone["biased"]
    requests = some_requests(adapters, count=24, seed=2)
    results = engine.generate(requests)
    assert not lora_layers(base.model)
    assert all(torch.equal(before[name], p) for name, p in base.model.named_parameters())
    assert all(p.requires_grad for p in base.model.parameters())
    engine.close()
    for request, result in zip(requests, results, strict=True):
        assert result.token_ids == expected_of(base.model, adapters, request)


def beyond_linear(model) -> dict[str, Adapter]:
    """One adapter of each kind that a decoder can carry, every tensor random."""
    configs = {
        "embedding": dict(targets=["embed_tokens", "q_proj"]),
        "shift": dict(targets=["q_proj", "v_proj"], lora_bias=True),
        "saved": dict(targets=["v_proj"], modules_to_save=["norm", "lm_head"]),
        "rows": dict(targets=["v_proj"], trainable_tokens={"embed_tokens": (3, 5)}),
        "dora": dict(targets=["down_proj"]),
    }
    adapters = {
        name: make_adapter(model, seed, rank=2, **c) for seed, (name, c) in enumerate(configs.items())
    }
    generator = torch.Generator().manual_seed(1)
    for path, f in adapters["dora"].factors.items():
        adapters["dora"].extras.magnitudes[path] = torch.rand(
            f.out_features, generator=generator, dtype=f.B.dtype
        )
    for adapter in adapters.values():
        for tensor in adapter.extras.tensors().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3)
    return adapters


@pytest.mark.parametrize("is_tied", [False, True])
def test_every_kind_of_layer_is_served_as_the_model_that_carries_it_answers(is_tied):
    base = tiny_base("qwen2", dtype=torch.float64, tie_word_embeddings=is_tied)
    others = beyond_linear(base.model)
    adapters = mixed_adapters(base.model) | others
    before = dict(base.model.named_parameters(remove_duplicate=False))
    values = {name: p.clone() for name, p in before.items()}
    engine = engine_of(base, adapters, max_rows=5)
    assert engine.served_alone.keys() == others.keys()
    requests = some_requests(adapters, count=33, seed=4)
    results = engine.generate(requests)
    engine.close()
    assert all(p is before[name] for name, p in base.model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(p, values[name]) for name, p in before.items())
    for request, result in zip(requests, results, strict=True):
        assert result.token_ids == expected_attached(base.model, adapters, request)


def test_a_mixture_of_experts_is_served_too():
    base = tiny_base("mixtral", dtype=torch.float32)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapters = {"experts": make_adapter(base.model, 1, rank=2, targets=["q_proj"], target_parameters=names)}
    engine = engine_of(base, adapters)
    assert engine.served_alone.keys() == {"experts"}
    for request, result in zip(
        requests := some_requests(adapters, count=4), engine.generate(requests), strict=True
    ):
        assert result.token_ids == expected_attached(base.model, adapters, request)


def expected_attached(model, adapters, request: Request) -> tuple[int, ...]:
    if request.adapter is None:
        return greedy(model, request)
    inject(model, adapters[request.adapter])
    try:
        return greedy(model, request)
    finally:
        eject(model)


def test_a_head_alone_shares_the_batch():
    base = tiny_base("llama", dtype=torch.float64)
    adapters = {"head": with_biases(base.model, 1, targets=["lm_head", "q_proj"], bias="none")}
    engine = engine_of(base, adapters)
    assert engine.served_alone == {}
    for request, result in zip(
        requests := some_requests(adapters, count=4), engine.generate(requests), strict=True
    ):
        assert result.token_ids == expected_of(base.model, adapters, request)


def test_rows_of_one_adapter_stay_together_and_the_model_changes_rarely():
    base = tiny_base("qwen2", dtype=torch.float64)
    engine = engine_of(base, {"a": with_biases(base.model, 1), "b": with_biases(base.model, 2)}, max_rows=4)
    engine.generate([Request([1, 2], adapter="a", max_tokens=20)] * 4)
    assert engine.scheduler.attached.changes == 2  # on, and off when nothing is left
    engine.generate([Request([1, 2], adapter=name, max_tokens=20) for name in ("a", "b", "a", "b")])
    assert (
        engine.scheduler.attached.changes < 30
    )  # not twice a step, since each step begins where the last ended


def test_an_adapter_that_is_served_alone_can_be_merged_when_it_owns_all_traffic():
    base = tiny_base("qwen2", dtype=torch.float64)
    adapters = {"biased": with_biases(base.model, 1)}
    engine = engine_of(base, adapters, merge_after_steps=2)
    requests = [Request([5, 6, 7], adapter="biased", max_tokens=9)]
    result = engine.generate(requests)[0]
    assert engine.merged.current is not None
    plain = engine.generate([Request([5, 6, 7], max_tokens=9)])[0]
    engine.close()
    assert result.token_ids == expected_of(base.model, adapters, requests[0])
    assert plain.token_ids == greedy(base.model, Request([5, 6, 7], max_tokens=9))


# Models ------------------------------------------------------------------------------------------


def test_a_recurrent_model_is_served_one_row_and_one_adapter_at_a_time():
    base = tiny_base("mamba", dtype=torch.float32)
    adapters = {
        name: with_biases(base.model, seed, targets=["in_proj", "out_proj"], bias="none")
        for seed, name in enumerate("ab")
    }
    with pytest.raises(ConfigError, match="solo"):
        Engine(base, runner="generic")
    engine = engine_of(base, adapters, max_rows=3)
    assert engine.runner.name == "solo"
    assert not engine.runner.recomputes
    assert "Mamba" in (engine.why_not_fast or "")
    assert engine.served_alone.keys() == adapters.keys()
    requests = some_requests(adapters, count=9)
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        engine.step()
    handles[4].cancel()
    while engine.step():
        pass
    for i, (request, handle) in enumerate(zip(requests, handles, strict=True)):
        expected = expected_of(base.model, adapters, request)
        found = handle.result(0).token_ids
        assert found == (expected[: len(found)] if i == 4 else expected)
    assert engine.runner.cache.num_bytes == 0 or not engine.scheduler.rows


class Averager(nn.Module):
    """A model without any cache: the logits are a product of the mean of all embeddings so far."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.embed = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=self.head(x + torch.sin(7 * x)))


def test_a_model_without_any_cache_computes_the_whole_text_for_every_token():
    torch.manual_seed(0)
    model = Averager().double()
    base = SimpleNamespace(model=model, tokenizer=None, stop_token_ids=())
    engine = Engine(base, max_rows=2, max_context=64)
    assert engine.runner.recomputes
    requests = [Request(tokens(1, n, seed=n)[0].tolist(), max_tokens=5) for n in (1, 4, 9)]
    assert [r.token_ids for r in engine.generate(requests)] == [greedy(model, r) for r in requests]
    with pytest.raises(BudgetError, match="64"):
        engine.generate([Request([1] * 60, max_tokens=9)])


def test_the_budget_holds_whatever_the_batch_looks_like():
    base = tiny_base(dtype=torch.float64)
    token_bytes = Engine(base, max_rows=1).runner.cache.shape.bytes_per_token
    for runner in ("fast", "generic"):
        engine = Engine(base, max_rows=3, runner=runner, kv_cache_bytes=3 * 70 * token_bytes, chunk_tokens=40)
        requests = [Request(tokens(1, n, seed=n)[0].tolist(), max_tokens=70 - n) for n in (61, 3, 50, 33, 69)]
        results = engine.generate(requests)
        assert engine.runner.cache.num_bytes <= 3 * 70 * token_bytes
        assert [r.token_ids for r in results] == [greedy(base.model, r) for r in requests]
        engine.close()
    with pytest.raises(BudgetError, match="kv_cache_bytes"):
        Engine(base, max_rows=3, kv_cache_bytes=5 * token_bytes)
