"""Weights in 4 and 8 bits: the codes, the layer, its gradients, and what may not be done to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorasmith.errors import ConfigError, MergeStateError
from lorasmith.inject import eject, group_shared_inputs, inject, merge
from lorasmith.lora import LoRAConfig
from lorasmith.planning import decoder_of
from lorasmith.quantised import (
    NF4_BLOCK,
    NF4_VALUES,
    QuantisedLinear,
    dequantise_int8,
    dequantise_linears,
    dequantise_nf4,
    kernel,
    quantisation_of,
    quantise_int8,
    quantise_linears,
    require_kind,
    stored_bytes,
)
from lorasmith.quantised.codes import float8_values, quantise_nf4
from lorasmith.quantised.layer import Int8Linear, NF4Linear
from lorasmith.train.fast import fast_layers
from tests.support.models import TinyMLP, bits, make_adapter, randomise, same_bits, tiny_causal_lm, tokens
from tests.support.tolerance import close

KINDS = {"nf4": NF4Linear, "int8": Int8Linear}
KIND = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SHAPES = [(24, 64), (7, 33), (300, 130)]  # whole blocks; a part of one; more than 256 blocks


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    made = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made[0, 3] = 0.31  # an outlier: blocks differ in scale
    return made.to(dtype)


def float8_by_hand() -> list[float]:
    """Sign, unary exponent and linear fraction, one value at a time (arXiv 1511.04561)."""
    found = [0.0, 1.0]
    for exponent in range(-6, 1):
        count = 2 ** (exponent + 6)
        for i in range(count):
            middle = 0.1 + 0.9 * (i + 0.5) / count
            found += [middle * 10.0**exponent, -middle * 10.0**exponent]
    return sorted(found)


def nf4_by_hand(W: torch.Tensor) -> list[float]:
    """QLoRA, section 3, in Python's own floats: nearest codes, and scales that are codes themselves."""
    flat = W.double().flatten().tolist()
    blocks = [flat[i : i + NF4_BLOCK] for i in range(0, len(flat), NF4_BLOCK)]
    scales = [max(map(abs, block)) for block in blocks]
    mean = sum(scales) / len(scales)
    eight = float8_by_hand()
    kept = []
    for i in range(0, len(scales), 256):
        off = [s - mean for s in scales[i : i + 256]]
        outer = max(map(abs, off))
        kept += [min(eight, key=lambda v: abs(v - x / outer)) * outer + mean if outer else mean for x in off]
    found = []
    for block, exact, scale in zip(blocks, scales, kept, strict=True):
        found += [scale * min(NF4_VALUES, key=lambda v: abs(v - x / exact)) for x in block]
    return found


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_nf4_is_the_papers(shape):
    W = weight(shape)
    found = NF4Linear(W, None, dtype=torch.float32).weight
    close(found, torch.tensor(nf4_by_hand(W), dtype=torch.float64).view(shape), torch.float32)


def test_scales_are_doubly_quantised_across_many_blocks():
    W = weight(SHAPES[2])
    found = NF4Linear(W, None, dtype=torch.float32).weight.double().flatten()
    wanted = torch.tensor(nf4_by_hand(W), dtype=torch.float64)
    wrong = (found - wanted).abs() > 1e-5 * wanted.abs() + 1e-9
    assert wrong.double().mean() < 0.01  # a scale exactly between two codes may round either way in float32
    assert len(set(found[:64].tolist())) <= 16


def test_the_eight_bit_values_are_those_of_the_paper():
    wanted = torch.tensor(float8_by_hand(), dtype=torch.float64)
    assert len(wanted) == 256
    close(float8_values(torch.device("cpu")), wanted, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_absmax_by_row(shape):
    W = weight(shape)
    wanted = []
    for row in W.double():
        step = row.abs().max() / 127
        wanted.append(torch.round(row / step) * step)
    close(Int8Linear(W, None, dtype=torch.float32).weight, torch.stack(wanted), torch.float32)


@KIND
def test_a_zero_weight_stays_zero(kind):
    layer = KINDS[kind](torch.zeros(4, 64), None, dtype=torch.bfloat16)
    assert layer.weight.isfinite().all()
    assert not layer.weight.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_plain_torch_give_the_same_bits(shape, dtype, monkeypatch):
    W = weight(shape, dtype)
    layers = [make(W, None, dtype=dtype) for make in KINDS.values()]
    compiled = [layer.weight for layer in layers]
    monkeypatch.setenv("LORASMITH_NATIVE", "0")
    assert all(torch.equal(layer.weight, c) for layer, c in zip(layers, compiled, strict=True))
    assert all(c.dtype == dtype and c.shape == shape for c in compiled)


def test_kernels_mean_what_their_docstrings_say():
    if kernel._library() is None:
        pytest.skip("no C compiler here")
    codes, absmax = quantise_nf4(weight((6, 64)))
    out = torch.empty(6, 64)
    assert kernel.unpack_nf4(codes, absmax, torch.tensor(NF4_VALUES), out)
    both = torch.stack([codes >> 4, codes & 15], 1).view(-1, 64)
    assert torch.equal(out, torch.tensor(NF4_VALUES)[both.int()] * absmax[:, None])


@KIND
def test_bits_are_as_planned(kind):
    rows, columns = 256, 512
    layer = KINDS[kind](weight((rows, columns)), None, dtype=torch.bfloat16)
    assert layer.stored_bytes == stored_bytes(kind, rows, columns)
    per_weight = 8 * layer.stored_bytes / (rows * columns)
    # QLoRA, section 3: 8/64 + 32/(64·256) bits for the scales of a block; the mean of all is one number.
    wanted = {"nf4": 4 + 8 / 64 + 32 / (64 * 256) + 32 / (rows * columns), "int8": 8 + 32 / columns}[kind]
    assert per_weight == pytest.approx(wanted, rel=1e-9)


@KIND
def test_changing_the_models_dtype_leaves_the_codes_alone(kind):
    layer = KINDS[kind](weight((24, 64)), None, dtype=torch.float32)
    before = layer.dequantise(torch.float32)
    layer.to(torch.bfloat16).to(torch.float64)
    assert torch.equal(layer.dequantise(torch.float32), before)


def pair(kind: str, family: str = "llama", dtype: torch.dtype = torch.float32):
    """A quantised model, and a plain one that holds its dequantised weights."""
    quantised = tiny_causal_lm(family, dtype=dtype)
    quantise_linears(quantised, kind, dtype=dtype)
    plain = tiny_causal_lm(family, dtype=dtype)
    quantise_linears(plain, kind, dtype=dtype)
    dequantise_linears(plain)
    assert quantisation_of(plain) is None
    return quantised, plain


def gradients(model: nn.Module, adapter, *, train_dropout: bool = False) -> dict[str, torch.Tensor]:
    inject(model, adapter)
    if train_dropout:
        torch.manual_seed(1)
        for layer in model.modules():
            if hasattr(layer, "lora_dropout"):
                layer.training = True
    model.zero_grad()
    model(tokens()).logits.float().log_softmax(-1)[..., 3].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    eject(model)
    return found


@KIND
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"dropout": 0.2}),
        ("qwen2", {"bias": "all"}),
        ("llama", {"targets": ["q_proj"]}),
    ],
)
def test_gradients_are_bitwise_those_of_the_dequantised_model(kind, family, config):
    quantised, plain = pair(kind, family)
    adapter = make_adapter(plain, **config)
    found, wanted = (gradients(m, adapter, train_dropout="dropout" in config) for m in (quantised, plain))
    assert any("lora_A" in name for name in wanted)
    assert same_bits_like(found, wanted)


def same_bits_like(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@KIND
def test_dora_computes_on_the_dequantised_weight(kind):
    quantised, plain = pair(kind)
    adapter = make_adapter(plain)
    for path, f in adapter.factors.items():
        adapter.extras.magnitudes[path] = torch.rand(
            f.out_features, generator=torch.Generator().manual_seed(4)
        )
    assert same_bits_like(gradients(quantised, adapter), gradients(plain, adapter))


@KIND
@pytest.mark.parametrize("keep", ["all", "no-mlp", "input"])
def test_the_fast_layers_take_quantised_ones(kind, keep):
    quantised, plain = pair(kind)
    adapter = make_adapter(plain)
    found = []
    for model in (quantised, plain):
        inject(model, adapter)
        with fast_layers(model, keep=keep) as count:
            assert count == 2
            model(tokens()).logits.sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert same_bits_like(*found)


@KIND
def test_layers_that_share_an_input_are_computed_once(kind):
    quantised, plain = pair(kind)
    adapter = make_adapter(plain)
    alone = gradients(quantised, adapter)
    inject(quantised, adapter)
    groups = group_shared_inputs(quantised, lambda: quantised(tokens()))
    assert sorted(map(len, groups)) == [2, 2, 3, 3]
    calls = []
    layer = quantised.model.layers[0].self_attn.q_proj
    own = type(layer).dequantise
    layer.dequantise = lambda dtype, **place: (calls.append(dtype), own(layer, dtype, **place))[1]
    quantised.zero_grad()
    quantised(tokens()).logits.float().log_softmax(-1)[..., 3].sum().backward()
    assert len(calls) == 1  # forward only: the first layer's input needs no gradient
    found = {n: p.grad for n, p in quantised.named_parameters() if p.grad is not None}
    for name, value in alone.items():
        close(found[name], value, torch.float32)


@KIND
def test_no_whole_weight_is_kept_for_the_backward_pass(kind):
    model = pair(kind)[0]
    inject(model, make_adapter(model))
    shapes = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, QuantisedLinear)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        model(tokens(rows=1, length=5)).logits.sum().backward()
    assert kept
    assert not shapes & set(kept)


@KIND
def test_a_plain_call_and_autocast(kind):
    W, x = weight((24, 64)), torch.randn(3, 64, requires_grad=True)
    bias = nn.Parameter(torch.randn(24))
    layer = KINDS[kind](W, bias, dtype=torch.float32)
    y = layer(x)
    wanted = F.linear(x, layer.weight, bias)
    assert torch.equal(y, wanted)
    for found, other in zip(
        torch.autograd.grad(y.sum(), (x, bias)), torch.autograd.grad(wanted.sum(), (x, bias)), strict=True
    ):
        close(found, other, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    close(low, wanted, torch.bfloat16)
    low.float().sum().backward()
    assert x.grad.dtype == torch.float32


@KIND
def test_merging_into_codes_is_refused_and_into_the_dequantised_weights_is_exact(kind):
    quantised, plain = pair(kind)
    adapter = make_adapter(plain)
    before = bits(quantised)
    with pytest.raises(
        MergeStateError, match=rf"14 of 14 adapted layers hold {kind} codes(?s:.*)dequantise_linears"
    ):
        merge(quantised, adapter)
    assert same_bits(quantised, before)
    inject(quantised, adapter)
    wanted = quantised(tokens()).logits
    eject(quantised)
    dequantise_linears(quantised)
    merge(quantised, adapter)
    close(quantised(tokens()).logits, wanted, torch.float32)


@KIND
def test_what_is_quantised_and_what_not(kind):
    model = tiny_causal_lm()
    found = quantise_linears(model, kind, dtype=torch.float32)
    assert (found.kind, found.layers) == (kind, 14)
    assert type(model.lm_head) is nn.Linear
    assert not any("proj" in name for name, _ in model.named_parameters())
    report = inject(model, LoRAConfig(rank=2))
    plain = tiny_causal_lm()
    assert report.total_params == inject(plain, LoRAConfig(rank=2)).total_params
    assert report.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_planning_counts_what_is_held():
    model = tiny_causal_lm(dtype=torch.bfloat16)
    plain = decoder_of(model)
    predicted = decoder_of(model, quantize="nf4")
    found = quantise_linears(model, "nf4", dtype=torch.bfloat16)
    actual = decoder_of(model)
    assert actual == predicted
    assert plain.params == actual.params
    held = sum(p.nbytes for p in model.parameters()) + found.stored_bytes
    assert actual.weights_bytes == held < plain.weights_bytes


def test_formats_and_models_that_cannot_be():
    with pytest.raises(ConfigError, match=r'quantize="nf5" is unknown: use nf4 or int8.*Did you mean "nf4"'):
        require_kind("nf5")
    with pytest.raises(ConfigError, match="no plain linear layer"):
        quantise_linears(tiny_causal_lm("gpt2"), "nf4", dtype=torch.float32)  # its layers are Conv1D


@KIND
def test_any_module_can_be_quantised(kind):
    model = TinyMLP()
    model.requires_grad_(False)
    x = torch.randn(4, 12)
    quantise_linears(model, kind, dtype=torch.float32)
    inject(model, LoRAConfig(rank=2))
    base = model(x)
    randomise_lora(model)
    assert (model(x) - base).abs().max() > 1e-3


def randomise_lora(model: nn.Module) -> None:
    from lorasmith.inject import extract, switch

    switch(model, randomise(extract(model)))


def test_bitsandbytes_makes_the_same_codes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in SHAPES:
        for dtype in DTYPES[:2]:
            W = weight(shape, dtype)
            codes, state = functional.quantize_4bit(
                W, blocksize=64, quant_type="nf4", compress_statistics=False
            )
            ours, absmax = quantise_nf4(W)
            assert torch.equal(absmax, state.absmax)
            assert torch.equal(ours[: codes.numel()], codes.view(-1))
            theirs = functional.dequantize_4bit(codes, state)
            assert torch.equal(dequantise_nf4(ours, absmax, shape, dtype), theirs)


def test_bitsandbytes_scales_differ_by_a_neighbour_at_most():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = weight((512, 512))
    _, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    layer = NF4Linear(W, None, dtype=torch.float32)
    assert torch.equal(state.state2.code, float8_values(W.device))
    assert torch.equal(state.offset, layer._float("mean")[0])
    assert torch.equal(state.state2.absmax, layer._float("outer"))
    apart = (layer.scales.int() - state.absmax.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


def test_int8_of_very_small_and_very_large_rows():
    W = torch.tensor([[1e-30, -3e-30, 2e-30], [1e30, -2e30, 0.0]])
    found, largest = dequantise_int8(*quantise_int8(W), torch.float32), W.abs().amax(1, keepdim=True)
    close(found / largest, W / largest, torch.bfloat16)
