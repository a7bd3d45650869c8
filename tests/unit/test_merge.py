"""merge, unmerge, switch, merged: one rounding in, the very same bits back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lorasmith.errors import ConfigError, MergeStateError
from lorasmith.inject import eject, inject, is_merged, merge, merged, merging, switch, unmerge
from lorasmith.lora import FileSource, add_delta, set_file_source
from tests.support.models import (
    TinyMLP,
    bits,
    make_adapter,
    same_bits,
    same_bits_of,
    tiny_causal_lm,
    tokens,
)
from tests.support.tolerance import close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


def test_merged_survives_a_body_that_unmerges_or_switches():
    model = TinyMLP()
    before = bits(model)
    a, b = make_adapter(model, seed=1), make_adapter(model, seed=2, targets=["up"])
    with merged(model, a):
        outer = bits(model)
        with merged(model, b):
            unmerge(model)
        assert same_bits(model, outer)
        switch(model, b)
    assert same_bits(model, before)
    with merged(model, a):
        unmerge(model)
        assert same_bits(model, before)
    assert not is_merged(model)


def test_merged_nests_deeply_and_unwinds_through_an_exception():
    model = TinyMLP()
    adapters = [make_adapter(model, seed=i, targets=t) for i, t in enumerate((["up"], ["down"], ["head"]))]
    seen = [bits(model)]

    def descend(depth: int) -> None:
        if depth == 6:
            raise ZeroDivisionError
        with merged(model, adapters[depth % 3]):
            seen.append(bits(model))
            try:
                descend(depth + 1)
            finally:
                assert same_bits(model, seen[depth + 1])

    with pytest.raises(ZeroDivisionError):
        descend(0)
    assert same_bits(model, seen[0])


def test_merging_under_autocast_is_as_exact_as_outside():
    model = TinyMLP()
    adapter = make_adapter(model)
    expected = {p: add_delta(model.get_parameter(f"{p}.weight").data, f) for p, f in adapter.factors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        merge(model, adapter)
    assert all(torch.equal(model.get_parameter(f"{p}.weight"), W) for p, W in expected.items())


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(merging, "SCRATCH_ELEMENTS", 500)  # so that a weight is many pieces
    model = TinyMLP(width=37)
    adapter = make_adapter(model, rank=70)
    outcomes, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with merged(model, adapter):
                outcomes.append(bits(model))
            assert torch.get_num_threads() == count
            with ThreadPoolExecutor(1) as others:
                assert others.submit(torch.get_num_threads).result() == count
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits_of(outcome, outcomes[0]) for outcome in outcomes)
    assert not same_bits_of(outcomes[0], bits(model))


def test_weights_that_are_not_floating_point_are_refused():
    model = TinyMLP()
    adapter = make_adapter(model)
    model.head.weight = nn.Parameter(model.head.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(MergeStateError, match=r"head\.weight \(torch\.int8\)"):
        merge(model, adapter)
    assert not is_merged(model)
