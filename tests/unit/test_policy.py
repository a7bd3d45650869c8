"""How a run computes: what is chosen, why, and that the model is as before afterwards."""

from __future__ import annotations

import importlib
import time

import pytest
import torch

from lorasmith.inject import inject
from lorasmith.lora import LoRAConfig
from lorasmith.train.policy import LONG_RUN_FLOPS, computing
from tests.support.models import VOCAB, tiny_causal_lm
from tests.support.tolerance import close

room = importlib.import_module("lorasmith.train.policy")
IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def adapted(family, *, dropout=0.0):
    model = tiny_causal_lm(family)
    inject(model, LoRAConfig(rank=2, dropout=dropout), seed=0)
    return model


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def choose(model, **options):
    given = {
        "kernels": "auto",
        "recompute": "none",
        "flops": 0.0,
        "warm_up": lambda: loss_of(model).backward(),
    }
    return computing(model, **(given | options))


def gradients(model):
    model.zero_grad()
    loss_of(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "kernels", "chosen", "line"),
    [
        ("llama", "auto", "block", "2 of 2 layers"),
        ("llama", "block", "block", "2 of 2 layers"),
        ("llama", "plain", "plain", "by tiles"),
        ("qwen3", "auto", "block", "2 of 2 layers"),
        ("gpt2", "block", "plain", "by tiles"),
        ("gemma2", "auto", "plain", "run is short"),
        ("gpt2", "auto", "plain", "by tiles"),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_the_choice_and_what_it_computes(family, kernels, chosen, line, recompute):
    model = adapted(family)
    expected = gradients(model)
    modes = {n: m.training for n, m in model.named_modules()}
    with choose(model, kernels=kernels, recompute=recompute) as policy:
        assert policy.kernels == chosen
        assert any(line in said for said in policy.lines), policy.lines
        assert policy.identity["kernels"] == chosen
        assert policy.identity["recompute"] == recompute
        assert policy.identity["operations"] in ("C", "torch")
        for name, value in gradients(model).items():
            close(value, expected[name], torch.float32)
    assert not any("forward" in vars(m) for m in model.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert {n: m.training for n, m in model.named_modules()} == modes
    after = gradients(model)
    assert all(torch.equal(after[name], value) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_layers_compute_the_same_for_every_shape_and_are_given_back():
    model = adapted("qwen3")
    expected = gradients(model)
    with choose(model, kernels="inductor") as policy:
        assert policy.kernels == "inductor", policy.lines
        for name, value in gradients(model).items():
            close(value, expected[name], torch.float32)
        longer = torch.randint(0, VOCAB, (3, 14), generator=torch.Generator().manual_seed(1))
        model(input_ids=longer, labels=longer, use_cache=False).loss.backward()
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_long_runs_are_compiled_and_short_ones_are_not(monkeypatch):
    tried = []
    monkeypatch.setattr(room, "_has_compiler", lambda device: tried.append(device) or False)
    for flops in (LONG_RUN_FLOPS / 2, LONG_RUN_FLOPS):
        with choose(adapted("gpt2"), flops=flops) as policy:
            assert policy.kernels == "plain"
    assert len(tried) == 1
    assert any("no compiler" in line for line in policy.lines)


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_that_fails_is_reported_and_the_run_goes_on():
    model = adapted("qwen3")

    def fail():
        raise RuntimeError("no such instruction")

    with choose(model, kernels="inductor", warm_up=fail) as policy:
        assert policy.kernels == "plain"
        assert any("no such instruction" in line for line in policy.lines)
        gradients(model)


def test_dropout_is_not_compiled():
    with choose(adapted("qwen3", dropout=0.1), kernels="inductor") as policy:
        assert policy.kernels == "plain"
        assert any("dropout" in line for line in policy.lines)


def test_compiling_has_a_limit():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="1 s"), room._limited(1):
        time.sleep(30)
    assert time.monotonic() - start < 10


def test_an_error_inside_leaves_the_model_as_it_was():
    model = adapted("qwen3")
    with pytest.raises(KeyError), choose(model, recompute="layers"):
        raise KeyError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
