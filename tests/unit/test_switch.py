"""A thousand switches and planted faults: the base stays bit-identical, the model consistent."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.inject import is_merged, merge, merging, switch, unmerge
from lorasmith.lora import Adapter, FileSource, set_file_source
from tests.support.models import TinyMLP, bits, make_adapter, same_bits, tiny_causal_lm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def several(model: torch.nn.Module) -> list[Adapter]:
    return [
        make_adapter(model, seed=0),
        make_adapter(model, seed=1, targets=["up"], rank=1),
        make_adapter(model, seed=2, targets=["down", "head"], bias="all"),
        make_adapter(model, seed=3, targets=["head"], rank=5),
    ]


@pytest.mark.parametrize("keep", ["auto", "file", "cpu", "device"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_random_switches_leave_the_base_bit_identical(tmp_path, dtype, keep):
    model = TinyMLP().to(dtype)
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    set_file_source(model, FileSource({name: (file, name) for name in model.state_dict()}))
    before, fresh, adapters = bits(model), [], several(model)
    for adapter in adapters:
        merge(model, adapter, keep)
        fresh.append(bits(model))
        unmerge(model)
        assert same_bits(model, before)
    merge(model, adapters[0], keep)
    choose = random.Random(0)
    for _ in range(1000):
        k = choose.randrange(len(adapters))
        switch(model, adapters[k])
        assert same_bits(model, fresh[k])
    unmerge(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_random_switches_with_tied_weights(dtype):
    model = tiny_causal_lm("llama", tie_word_embeddings=True, dtype=dtype, num_hidden_layers=1)
    before, fresh = bits(model), []
    adapters = [make_adapter(model, seed=i, targets=t) for i, t in enumerate((["lm_head"], ["q_proj", "lm_head"], ["up_proj"]))]  # fmt: skip
    for adapter in adapters:
        merge(model, adapter)
        fresh.append(bits(model))
        unmerge(model)
    merge(model, adapters[0])
    choose = random.Random(0)
    for _ in range(1000):
        k = choose.randrange(3)
        switch(model, adapters[k])
        assert same_bits(model, fresh[k])
    unmerge(model)
    assert same_bits(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def planted(monkeypatch: pytest.MonkeyPatch, at: int, *, forever: bool = False) -> Callable[[], int]:
    """Make the `at`-th fold fail (and all after it); returns how many were tried."""
    real, tried = merging.add_delta, []

    def fails(*args, **kwargs):
        tried.append(1)
        if len(tried) == at or (forever and len(tried) > at):
            kwargs["out"].fill_(7)  # half done
            raise MemoryError("planted")
        return real(*args, **kwargs)

    monkeypatch.setattr(merging, "add_delta", fails)
    return lambda: len(tried)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("is_first", [True, False])
def test_a_fault_at_any_module_leaves_a_consistent_model(monkeypatch, is_first, at, threads):
    model = TinyMLP()
    before = bits(model)
    a, b = make_adapter(model, seed=1, bias="all"), make_adapter(model, seed=2)
    if not is_first:
        merge(model, a)
    at_start, usual = bits(model), torch.get_num_threads()
    torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        planted(patch, at)
        with pytest.raises(MemoryError):
            (merge if is_first else switch)(model, b)
    torch.set_num_threads(usual)
    assert same_bits(model, at_start)
    assert is_merged(model) != is_first
    merge(model, b) if is_first else switch(model, b)
    assert not same_bits(model, at_start)
    unmerge(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_fault_that_lasts_leaves_the_base_and_says_so(monkeypatch, at):
    model = TinyMLP()
    before = bits(model)
    a, b = make_adapter(model, seed=1), make_adapter(model, seed=2)
    merge(model, a)
    with monkeypatch.context() as patch:
        planted(patch, at, forever=True)
        with pytest.raises(MemoryError) as caught:
            switch(model, b)
    assert "the model is the base" in caught.value.__notes__[0]
    assert not is_merged(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("at", range(1, 4))
def test_a_fault_while_weights_are_tied_ties_them_again(monkeypatch, at):
    model = tiny_causal_lm("llama", tie_word_embeddings=True, num_hidden_layers=1)
    before = bits(model)
    adapter = make_adapter(model, targets=["lm_head", "q_proj", "o_proj"])
    with monkeypatch.context() as patch:
        planted(patch, at)
        with pytest.raises(MemoryError):
            merge(model, adapter)
    assert same_bits(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
