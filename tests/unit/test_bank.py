"""Rows of many adapters in one pass: against a float64 loop over rows, and against each adapter alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasmith.inject import Bank, Tenant, can_join, eject, extract, inject
from lorasmith.lora import Factors, LoRAConfig
from tests.support.models import TinyMLP, bits, randomise, same_bits, tiny_causal_lm, tokens
from tests.support.tolerance import close

CONFIGS = {
    "a": LoRAConfig(rank=2),
    "b": LoRAConfig(rank=5, alpha=7),
    "c": LoRAConfig(rank=1, targets=("q_proj",)),
}
ROWS = {"a": slice(0, 2), "b": slice(2, 5), "c": slice(5, 6)}
SEGMENTS = (("a", 2), ("b", 3), ("c", 1))


def trainable(factors: Factors) -> Factors:
    return Factors(nn.Parameter(factors.A), nn.Parameter(factors.B), factors.scaling)


def adapters(model: nn.Module, configs: dict[str, LoRAConfig] = CONFIGS):
    made = {}
    for seed, (name, config) in enumerate(configs.items()):
        inject(model, config, seed=seed)
        made[name] = randomise(extract(model), seed=seed)
        eject(model)
    return made


def test_layers_against_a_loop_over_rows():
    model = TinyMLP().double()
    config = LoRAConfig(rank=3, alpha=5, targets=("up", "down", "head"))
    made = adapters(model, {"a": config, "b": LoRAConfig(rank=1, targets=("down",))})
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bank = Bank({name: Tenant(a.factors) for name, a in made.items()})
    with bank.attached(model), bank.rows(("a", 2), ("b", 3)):
        found = model(x)
    for i, row in enumerate(x):
        factors = made["a" if i < 2 else "b"].factors

        def through(path: str, h: torch.Tensor, factors: dict[str, Factors] = factors) -> torch.Tensor:
            layer = model.get_submodule(path)
            y = layer.weight @ h + layer.bias
            return (
                y + factors[path].scaling * (factors[path].B @ (factors[path].A @ h))
                if path in factors
                else y
            )

        for k in range(2):
            row = row + through(f"layers.{k}.down", torch.relu(through(f"layers.{k}.up", row)))
        close(found[i], through("head", row), torch.float64)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_are_those_of_each_adapter_alone(family, dtype):
    model = tiny_causal_lm(family, dtype=dtype)
    made, ids = adapters(model), tokens(6, 10)
    tenants = {name: Tenant({p: trainable(f) for p, f in a.factors.items()}) for name, a in made.items()}
    bank = Bank(tenants)
    with bank.attached(model), bank.rows(*SEGMENTS):
        together = model(input_ids=ids).logits
        sum(together[rows].square().mean() for rows in ROWS.values()).backward()
    for name, rows in ROWS.items():
        inject(model, made[name])
        logits = model(input_ids=ids[rows]).logits
        logits.square().mean().backward()
        close(together[rows], logits, dtype)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                path, _, part = key.rpartition(".lora_")
                close(getattr(tenants[name].factors[path], part).grad, parameter.grad, dtype)
        eject(model)


def test_the_wrong_rows_would_be_seen():
    model = tiny_causal_lm("llama", dtype=torch.float64)
    made, ids = adapters(model), tokens(6, 10)
    bank = Bank({name: Tenant(a.factors) for name, a in made.items()})
    with bank.attached(model):
        with bank.rows(*SEGMENTS):
            right = model(input_ids=ids).logits
        with bank.rows(("b", 2), ("a", 3), ("c", 1)):
            wrong = model(input_ids=ids).logits
    assert (right - wrong)[:5].abs().amax((1, 2)).min() > 1e-6
    assert torch.equal(right[5], wrong[5])


def test_outside_the_rows_and_after_the_bank_the_model_is_its_base():
    model = tiny_causal_lm("llama")
    made, ids = adapters(model), tokens(2, 10)
    before, kinds, base = bits(model), [type(m) for m in model.modules()], model(input_ids=ids).logits
    bank = Bank({"a": Tenant(made["a"].factors)})
    with bank.attached(model):
        assert torch.equal(model(input_ids=ids).logits, base)
        with bank.rows(("a", 2)):
            assert not torch.equal(model(input_ids=ids).logits, base)
    assert torch.equal(model(input_ids=ids).logits, base)
    assert same_bits(model, before)
    assert [type(m) for m in model.modules()] == kinds


def test_dropout_masks_are_the_same_when_a_pass_is_computed_again():
    model = tiny_causal_lm("llama")
    ids = tokens(3, 10)
    bank = Bank(
        {"a": Tenant(adapters(model)["a"].factors, 0.5, torch.Generator().manual_seed(0)), "b": Tenant({})}
    )
    with bank.attached(model):
        with bank.rows(("a", 1), ("b", 2)):
            first, again = model(input_ids=ids).logits, model(input_ids=ids).logits
        with bank.rows(("a", 1), ("b", 2)):
            other = model(input_ids=ids).logits
    assert torch.equal(first, again)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1:], other[1:])


def test_what_can_join_a_bank():
    assert can_join(nn.Linear(2, 3))
    assert not can_join(nn.Embedding(2, 3))
    assert not can_join(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 3))
