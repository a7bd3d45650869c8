"""Weights that several modules share: merged for the modules that the adapter names, and for no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasmith.engine import Engine, Request
from lorasmith.inject import eject, inject, merge, merged, switch, unmerge
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.engines import tiny_base
from tests.support.models import bits, make_adapter, same_bits, tiny_causal_lm, tokens
from tests.support.tolerance import close


def unmerged_logits(model: nn.Module, adapter: Adapter) -> torch.Tensor:
    inject(model, adapter)
    logits = model(tokens()).logits
    eject(model)
    return logits


def test_an_adapted_tied_head_is_merged_without_touching_the_embedding():
    model = tiny_causal_lm("llama", tie_word_embeddings=True, dtype=torch.float64)
    adapter = make_adapter(model, targets=["lm_head", "q_proj"])
    expected, before, shared = unmerged_logits(model, adapter), bits(model), model.lm_head.weight
    with merged(model, adapter):
        close(model(tokens()).logits, expected, torch.float64)
        assert model.model.embed_tokens.weight is shared
        assert torch.equal(shared, before["model.embed_tokens.weight"])
        assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is shared
    assert model.model.embed_tokens.weight is shared
    assert model.config.tie_word_embeddings
    assert same_bits(model, before)


def test_a_merged_model_with_a_tied_head_computes_the_same_after_saving_and_loading(tmp_path):
    import transformers

    model = tiny_causal_lm("llama", tie_word_embeddings=True)
    with merged(model, make_adapter(model, targets=["lm_head", "q_proj"])):
        expected = model(tokens()).logits
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, expected)


class Tied(nn.Module):
    """Two layers over one weight."""

    def __init__(self, second: nn.Parameter | None = None) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight if second is None else second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def factors(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(2, 6, generator=generator), torch.randn(6, 2, generator=generator), 0.5)


def adapter_of(**by_path: Factors) -> Adapter:
    return Adapter(LoRAConfig(rank=2, alpha=1, targets=tuple(by_path)), by_path)


def check_merged(model: nn.Module, adapter: Adapter) -> None:
    """Merged equals unmerged, and afterwards the model is what it was."""
    x, before, parameters = torch.randn(3, 6), bits(model), list(model.named_parameters())
    inject(model, adapter)
    expected = model(x)
    eject(model)
    with merged(model, adapter):
        close(model(x), expected, torch.float32)
    assert same_bits(model, before)
    assert all(p is q for (_, p), (_, q) in zip(model.named_parameters(), parameters, strict=True))


def test_the_same_delta_for_every_owner_keeps_the_weight_shared():
    model = Tied()
    both = adapter_of(one=factors(0), two=factors(0))
    with merged(model, both):
        assert model.one.weight is model.two.weight
    check_merged(model, both)


@pytest.mark.parametrize("paths", [("one",), ("two",), ("one", "two")])
def test_different_deltas_get_weights_of_their_own(paths):
    model = Tied()
    check_merged(model, adapter_of(**{path: factors(i) for i, path in enumerate(paths)}))


def test_a_transposed_view_of_another_weight():
    model = Tied()
    model.two.weight = nn.Parameter(model.one.weight.data.T)
    check_merged(model, adapter_of(one=factors(0), two=factors(0)))
    check_merged(model, adapter_of(two=factors(1)))


def test_a_module_under_two_paths_is_one_owner():
    model = Tied()
    model.again = model.one
    with merged(model, adapter_of(one=factors(0))):
        assert model.again.weight is model.one.weight
        assert model.one.weight is not model.two.weight
    check_merged(model, adapter_of(one=factors(0)))


def test_switching_between_shared_and_separate():
    model = Tied()
    before, shared = bits(model), model.one.weight
    both, one, differ = adapter_of(one=factors(0), two=factors(0)), adapter_of(one=factors(1)), adapter_of(one=factors(2), two=factors(3))  # fmt: skip
    fresh = {}
    for name, adapter in (("both", both), ("one", one), ("differ", differ)):
        merge(model, adapter)
        fresh[name] = bits(model)
        unmerge(model)
    merge(model, both)
    for name in ("one", "both", "differ", "one", "differ", "both"):
        switch(model, {"both": both, "one": one, "differ": differ}[name])
        assert same_bits(model, fresh[name])
        assert (model.one.weight is model.two.weight) == (name == "both")
    unmerge(model)
    assert same_bits(model, before)
    assert model.one.weight is shared is model.two.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_engine_merges_an_adapter_of_a_tied_head(dtype):
    base = tiny_base(tie_word_embeddings=True, dtype=dtype)
    adapter, shared = make_adapter(base.model, targets=["lm_head", "q_proj"]), base.model.lm_head.weight
    engine = Engine(base, merge_after_steps=2)
    engine.add_adapter("a", adapter)
    engine.generate([Request([1, 2, 3], adapter="a", max_tokens=8, ignore_eos=True)])
    assert engine.merged.current is not None
    assert base.model.lm_head.weight is not shared
    plain = engine.generate([Request([1, 2, 3], max_tokens=8, ignore_eos=True)])[0]
    assert base.model.lm_head.weight is shared
    fresh = Engine(tiny_base(tie_word_embeddings=True, dtype=dtype))
    expected = fresh.generate([Request([1, 2, 3], max_tokens=8, ignore_eos=True)])[0]
    assert plain.token_ids == expected.token_ids


def test_the_engine_answers_the_same_merged_and_unmerged_with_a_tied_head():
    tokens_of = []
    for after in (None, 1):
        base = tiny_base(tie_word_embeddings=True, dtype=torch.float32)
        engine = Engine(base, merge_after_steps=after)
        engine.add_adapter("a", make_adapter(base.model, targets=["lm_head", "q_proj"]))
        answer = engine.generate([Request([1, 2, 3], adapter="a", max_tokens=12, ignore_eos=True)])[0]
        assert (engine.merged.current is not None) == (after == 1)
        tokens_of.append(answer.token_ids)
    assert tokens_of[0] == tokens_of[1]
