"""merge, unmerge, switch, merged: one rounding in, the very same bits back."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lorasmith.errors import ConfigError, MergeStateError
from lorasmith.inject import eject, extract, folding, inject, is_merged, merge, merged, switch, unmerge
from lorasmith.lora import Adapter, FileSource, LoRAConfig, set_file_source
from tests.support.models import TinyMLP, randomise, tiny_causal_lm, tokens
from tests.support.tolerance import close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_adapter(model: nn.Module, *, seed: int = 0, **config) -> Adapter:
    inject(model, LoRAConfig(**{"rank": 3, "alpha": 6, **config}), seed=seed)
    adapter = randomise(extract(model), seed=seed)
    eject(model)
    return adapter


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == expected.keys() and all(torch.equal(now[n], expected[n]) for n in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weight_is_the_correctly_rounded_sum(dtype):
    model = TinyMLP().to(dtype)
    adapter = make_adapter(model)
    before = bits(model)
    merge(model, adapter)
    for path, f in adapter.factors.items():
        W0, A, B = before[f"{path}.weight"].double(), f.A.double(), f.B.double()
        exact = W0 + f.scaling * (B @ A)
        error = (model.get_parameter(f"{path}.weight").double() - exact).abs()
        # One rounding to dtype (half a unit in the last place), on top of a float32 sum of rank + 1 terms.
        terms = W0.abs() + f.scaling * (B.abs() @ A.abs())
        in_float32 = (f.rank + 1) * torch.finfo(torch.float32).eps * terms
        assert (
            error <= torch.finfo(dtype).eps / 2 * exact.abs() + in_float32 + torch.finfo(dtype).tiny
        ).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_merged_equals_unmerged_to_rounding(family):
    model = tiny_causal_lm(family, dtype=torch.float64)
    adapter = make_adapter(model)
    inject(model, adapter)
    expected = model(tokens()).logits
    eject(model)
    merge(model, adapter)
    close(model(tokens()).logits, expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_random_switches_leave_the_base_bit_identical(dtype):
    model = TinyMLP().to(dtype)
    before = bits(model)
    adapters = [
        make_adapter(model, seed=0),
        make_adapter(model, seed=1, targets=["up"]),
        make_adapter(model, seed=2, targets=["down", "head"], bias="all"),
    ]
    fresh = []
    for adapter in adapters:
        merge(model, adapter)
        fresh.append(bits(model))
        unmerge(model)
    merge(model, adapters[0])
    choose = random.Random(0)
    for _ in range(100):
        k = choose.randrange(3)
        switch(model, adapters[k])
        assert same_bits(model, fresh[k])
    unmerge(model)
    assert same_bits(model, before)


def test_merged_works_on_an_injected_model_and_counts_nothing_twice():
    model = TinyMLP()
    before = bits(model)
    adapter = make_adapter(model)
    x = torch.randn(4, 12)
    inject(model, adapter)
    unmerged = model(x)
    with merged(model, adapter):
        assert is_merged(model)
        close(model(x), unmerged, torch.float32)
    assert torch.equal(model(x), unmerged)
    eject(model)
    assert same_bits(model, before)


def test_merged_nests():
    model = TinyMLP()
    before = bits(model)
    a, b = make_adapter(model, seed=1), make_adapter(model, seed=2, targets=["up"])
    with merged(model, a):
        outer = bits(model)
        with merged(model, b):
            assert not same_bits(model, outer)
        assert same_bits(model, outer)
    assert same_bits(model, before)
    assert not is_merged(model)


def test_merged_restores_when_the_body_raises():
    model = TinyMLP()
    before = bits(model)
    with pytest.raises(ZeroDivisionError), merged(model, make_adapter(model)):
        raise ZeroDivisionError
    assert same_bits(model, before)


@pytest.mark.parametrize("already", [False, True])
def test_an_exception_in_the_middle_leaves_a_consistent_model(monkeypatch, already):
    model = TinyMLP()
    before = bits(model)
    a, b = make_adapter(model, seed=1), make_adapter(model, seed=2)
    if already:
        merge(model, a)
    at_start = bits(model)
    real, calls = folding.add_delta, []

    def fails_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("planted")
        return real(*args, **kwargs)

    monkeypatch.setattr(folding, "add_delta", fails_at_the_third)
    with pytest.raises(MemoryError):
        (switch if already else merge)(model, b)
    assert same_bits(model, at_start)
    assert is_merged(model) == already
    if already:
        unmerge(model)
    assert same_bits(model, before)


def test_shared_weights_are_refused_rather_than_changed_twice():
    model = tiny_causal_lm("llama", tie_word_embeddings=True)
    adapter = make_adapter(model, targets=["lm_head"])
    before = bits(model)
    with pytest.raises(MergeStateError, match=r"lm_head\.weight shares its memory with model\.embed_tokens"):
        merge(model, adapter)
    assert same_bits(model, before)
    assert not is_merged(model)


def test_wrong_states():
    model = TinyMLP()
    adapter = make_adapter(model)
    with pytest.raises(MergeStateError, match="no adapter is merged"):
        unmerge(model)
    with pytest.raises(MergeStateError, match="carries no adapter"):
        switch(model, adapter)
    with pytest.raises(ConfigError, match="keep='disk'"):
        merge(model, adapter, "disk")
    with pytest.raises(MergeStateError, match='keep="file"'):
        merge(model, adapter, "file")
    merge(model, adapter)
    with pytest.raises(MergeStateError, match="merged already"):
        merge(model, adapter)


@pytest.mark.parametrize("keep", ["auto", "file", "cpu", "device"])
def test_pristine_weights_are_kept_where_asked(tmp_path, keep):
    model = TinyMLP().to(torch.bfloat16)
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    set_file_source(model, FileSource({name: (file, name) for name in model.state_dict()}))
    before = bits(model)
    merge(model, make_adapter(model), keep)
    file.unlink()  # the memory map outlives the name
    unmerge(model)
    assert same_bits(model, before)


def test_a_file_that_differs_from_the_live_weights_is_not_trusted(tmp_path):
    model = TinyMLP()
    file = tmp_path / "model.safetensors"
    save_file({n: v + 1 for n, v in model.state_dict().items()}, file)
    set_file_source(model, FileSource({name: (file, name) for name in model.state_dict()}))
    before = bits(model)
    adapter = make_adapter(model)
    with pytest.raises(MergeStateError, match="no equal tensor"):
        merge(model, adapter, "file")
    merge(model, adapter)
    unmerge(model)
    assert same_bits(model, before)
