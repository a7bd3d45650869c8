"""inject, extract, eject: what is adapted, what is refused, and that nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorasmith.errors import AdapterFileError, MergeStateError, TargetError
from lorasmith.inject import eject, extract, inject, lora_layers, switch
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.models import TinyMLP, randomise, tiny_causal_lm, tokens
from tests.support.tolerance import close

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gpt2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_leaves_every_output_bit_identical(family, dtype):
    model = tiny_causal_lm(family, dtype=dtype)
    before = model(tokens()).logits
    inject(model, LoRAConfig(rank=4))
    assert torch.equal(model(tokens()).logits, before)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_factors_change_the_output_and_eject_restores_it(family):
    model = tiny_causal_lm(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    types = {path: type(module) for path, module in model.named_modules()}
    before = model(tokens()).logits
    inject(model, LoRAConfig(rank=4))
    switch(model, randomise(extract(model)))
    assert (model(tokens()).logits - before).abs().max() > 1e-3
    eject(model)
    assert torch.equal(model(tokens()).logits, before)
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_output_is_base_plus_scaled_low_rank_product():
    model = TinyMLP().double()
    x = torch.randn(7, 12, dtype=torch.float64)
    inject(model, LoRAConfig(rank=3, alpha=5, targets=["head"]))
    adapter = randomise(extract(model))
    switch(model, adapter)
    factors, head = adapter.factors["head"], model.head
    hidden = x
    for layer in model.layers:
        hidden = hidden + layer["down"](torch.relu(layer["up"](hidden)))
    expected = hidden @ head.weight.T + head.bias + (5 / 3) * (hidden @ factors.A.T) @ factors.B.T
    close(model(x), expected, torch.float64)


def test_trainable_count_equals_the_formula():
    model = tiny_causal_lm("llama")
    report = inject(model, LoRAConfig(rank=4, targets=["q_proj", "v_proj"]))
    # q: 32 -> 32, v: 32 -> 16; rank * (in + out), two layers
    assert report.trainable_params == 2 * 4 * ((32 + 32) + (32 + 16))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.self_attn.{t}_proj.lora_{f}" for i in (0, 1) for t in "qv" for f in "AB"
    }
    assert report.coverage == {"q_proj": {0: 4, 1: 4}, "v_proj": {0: 4, 1: 4}}
    assert "lm_head" in report.not_matched
    assert "q_proj" in str(report)
    assert "layers 0-1" in str(report)


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (dict(targets=["up"]), ["layers.0.up", "layers.1.up"]),
        (dict(targets=["0.up", "head"]), ["layers.0.up", "head"]),
        (
            dict(targets=r"layers\.\d\.(up|down)"),
            ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"],
        ),
        (dict(targets="all-linear", exclude=["down"]), ["layers.0.up", "layers.1.up", "head"]),
        (dict(targets="all-linear", layers=range(1, 2)), ["layers.1.up", "layers.1.down"]),
    ],
)
def test_target_forms(config, paths):
    model = TinyMLP()
    report = inject(model, LoRAConfig(rank=2, **config))
    assert list(report.ranks) == paths
    assert list(lora_layers(model)) == paths


def test_all_linear_leaves_the_output_head_alone_where_the_model_names_it():
    model = tiny_causal_lm("llama")
    inject(model, LoRAConfig(rank=2))
    assert not any("lm_head" in path for path in lora_layers(model))


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            dict(targets=["q_porj"]),
            ['targets=["q_porj"] matched no module in LlamaForCausalLM', 'mean "q_proj" (2 modules)?'],
        ),
        (dict(targets=["q_proj", "nope"]), ['"nope"', "linear layers here end in: down_proj gate_proj"]),
        (dict(targets=r".*\.q_prj"), ["matched no module"]),
        (dict(targets=["input_layernorm"]), ["LlamaRMSNorm is not a linear, embedding or convolution layer"]),
        (dict(modules_to_save=["nrom"]), ['modules_to_save: "nrom" matches no module']),
        (dict(modules_to_save=["q_proj"]), ["layers.0.self_attn.q_proj, which also gets factors"]),
        (dict(trainable_tokens={"embed": [1]}), ['trainable_tokens: "embed" matches no embedding']),
        (dict(trainable_tokens={"embed_tokens": [1, 64]}), ["token 64 is beyond the 64 rows"]),
        (dict(target_parameters=["gate_up"]), ['target_parameters: "gate_up" matches no stacked parameter']),
        (dict(exclude=["nope"]), ['exclude=["nope"] matched no module']),
        (dict(targets=["q_proj"], exclude=["q_proj"]), ["leaves nothing"]),
        (dict(layers=[0, 7]), ["layers [7] match no adapted module; layers here: 0 to 1"]),
        (dict(rank_pattern={"o_prj": 8}), ['pattern key "o_prj" matches no adapted module']),
    ],
)
def test_a_target_that_finds_nothing_is_an_error_that_helps(config, parts):
    model = tiny_causal_lm("llama")
    names = list(model.state_dict())
    with pytest.raises(TargetError) as error:
        inject(model, LoRAConfig(rank=2, **config))
    for part in parts:
        assert part.replace('["', "['").replace('"]', "']") in str(error.value).replace('["', "['").replace(
            '"]', "']"
        )
    assert list(model.state_dict()) == names


def test_attention_that_bypasses_its_linear_layer_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TargetError, match="MultiheadAttention uses its weight without calling it"):
        inject(model, LoRAConfig(rank=2, targets=["out_proj"]))


def test_patterns_give_each_module_its_rank_and_scaling():
    model = TinyMLP()
    config = LoRAConfig(rank=4, alpha=8, rank_pattern={r"0\.up": 2}, alpha_pattern={"head": 32})
    inject(model, config)
    layers = lora_layers(model)
    assert layers["layers.0.up"].lora_A.shape == (2, 12)
    assert layers["layers.0.up"].lora_scaling == 4.0
    assert layers["head"].lora_scaling == 8.0
    assert layers["layers.1.up"].lora_scaling == 2.0


def test_start_depends_on_seed_and_path_only():
    first, second, third = TinyMLP(), TinyMLP(), TinyMLP()
    inject(first, LoRAConfig(rank=2), seed=7)
    inject(second, LoRAConfig(rank=2, targets=["head"]), seed=7)
    inject(third, LoRAConfig(rank=2, targets=["head"]), seed=8)
    assert torch.equal(first.head.lora_A, second.head.lora_A)
    assert not torch.equal(first.head.lora_A, third.head.lora_A)


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_initial_variance_is_one_over_three_in_features(init):
    model = nn.Sequential(nn.Linear(300, 10))
    inject(model, LoRAConfig(rank=256, targets=["0"], init=init))
    A = model[0].lora_A
    # Σ of 76,800 squares: the estimate of the variance has a relative s.d. below 1 %.
    assert A.var().item() == pytest.approx(1 / 900, rel=0.04)
    assert not model[0].lora_B.any()
    assert (A.abs().max() <= 1 / 300**0.5) == (init == "uniform")


def test_an_adapter_that_does_not_fit_is_refused_whole_and_every_fault_is_named():
    model = TinyMLP()
    good = Factors(torch.zeros(2, 12), torch.zeros(5, 2), 1.0)
    adapter = Adapter(
        LoRAConfig(rank=2),
        {"head": good, "nope": good, "layers.0.up": good},
        biases={"head": torch.zeros(6)},
    )
    with pytest.raises(AdapterFileError) as error:
        inject(model, adapter)
    text = str(error.value)
    assert "nope: no such module" in text
    assert "layers.0.up: adapter A (2, 12), B (5, 2); model in_features 12, out_features 24" in text
    assert "head.bias: adapter (6,), model (5,)" in text
    assert not lora_layers(model)


def test_wrong_states_say_what_to_do():
    model = TinyMLP()
    for verb in (extract, eject):
        with pytest.raises(MergeStateError, match="carries no LoRA"):
            verb(model)
    inject(model, LoRAConfig(rank=2))
    with pytest.raises(MergeStateError, match="already carries LoRA"):
        inject(model, LoRAConfig(rank=2))


@pytest.mark.parametrize("mode", ["none", "lora_only", "all"])
def test_bias_training(mode):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inject(model, LoRAConfig(rank=1, targets=["0"], bias=mode))
    expected = {"none": set(), "lora_only": {"0.bias"}, "all": {"0.bias", "1.bias", "2.bias"}}[mode]
    assert {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")} == expected
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(torch.randn(9, 4)).square().sum().backward()
    optimizer.step()
    adapter = extract(model)
    assert {f"{path}.bias" for path in adapter.biases} == expected
    trained = model(torch.ones(1, 4))
    eject(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inject(model, adapter)
    assert torch.equal(model(torch.ones(1, 4)), trained)


def test_dropout_is_reproducible_and_only_in_training():
    model = tiny_causal_lm("llama")
    inject(model, LoRAConfig(rank=4, dropout=0.5))
    switch(model, randomise(extract(model)))
    quiet = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, quiet)
    model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(tokens()).logits)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], quiet)


def test_switch_exchanges_factors_also_between_different_targets():
    model = TinyMLP()
    x = torch.randn(3, 12)
    inject(model, LoRAConfig(rank=2, targets=["up"]))
    up = randomise(extract(model), seed=1)
    eject(model)
    inject(model, LoRAConfig(rank=3, targets=["down", "head"]))
    down = randomise(extract(model), seed=2)
    outputs = {}
    for name, adapter in (("up", up), ("down", down)):
        other = copy.deepcopy(TinyMLP())
        other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
        inject(other, adapter)
        outputs[name] = other(x)
    for name, adapter in (("up", up), ("down", down), ("up", up), ("up", up)):
        switch(model, adapter)
        assert torch.equal(model(x), outputs[name])
        assert extract(model).digest == adapter.digest


def test_extract_is_an_independent_copy():
    model = TinyMLP()
    inject(model, LoRAConfig(rank=2))
    adapter = extract(model)
    adapter.factors["head"].B.fill_(1.0)
    assert not model.head.lora_B.any()


def test_a_deep_copy_of_an_injected_model_is_independent():
    model = TinyMLP()
    inject(model, LoRAConfig(rank=2))
    twin = copy.deepcopy(model)
    switch(twin, randomise(extract(twin)))
    assert not model.head.lora_B.any()
    assert twin.head.lora_B.any()
