"""The chunked cross-entropy against torch's own, and the model taken apart into body and head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.inject import extract, inject, switch
from lorasmith.lora import LoRAConfig
from lorasmith.train import Head, cross_entropy, split_model
from lorasmith.train.loss import BYTES_PER_LOGIT, chunk_tokens_for, full_logits_loss
from tests.support.models import randomise, tiny_causal_lm, tokens
from tests.support.tolerance import close

N, WIDTH, VOCABULARY = 23, 8, 31


def make(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hidden_states() -> Tensor:
    return make(N, WIDTH, seed=1).requires_grad_()


def target_tokens() -> Tensor:
    return torch.randint(VOCABULARY, (N,), generator=torch.Generator().manual_seed(2))


class Holder(nn.Module):
    """An embedding and an output head, tied on request."""

    def __init__(self, *, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias, dtype=torch.float64)
        for i, parameter in enumerate(self.parameters()):
            parameter.data.copy_(make(*parameter.shape, seed=10 + i))
        if tied:
            self.lm_head.weight = self.embedding.weight


def head_of(kind: str) -> tuple[Holder, Head]:
    """One head of each kind; `Head` says how the model scales or caps its logits."""
    holder = Holder(bias="bias" in kind, tied="tied" in kind)
    if "trained" not in kind and "tied" not in kind:
        holder.requires_grad_(False)
    if "lora" in kind:
        inject(holder, LoRAConfig(rank=2, alpha=3, targets=["lm_head"]))
        switch(holder, randomise(extract(holder)))
    scale = 0.25 if "scale" in kind else 1.0
    return holder, Head(holder.lm_head, scale, 3.0 if "cap" in kind else None)


KINDS = [
    "frozen",
    "frozen-bias",
    "frozen-scale",
    "frozen-cap",
    "frozen-scale-cap",
    "trained",
    "trained-bias-scale-cap",
    "lora",
    "lora-cap",
    "tied",
    "tied-scale",
]


def truth(holder: Holder, head: Head, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    layer = holder.lm_head
    z = hidden @ layer.weight.T
    if layer.bias is not None:
        z = z + layer.bias
    if hasattr(layer, "lora_A"):
        z = z + 1.5 * (hidden @ layer.lora_A.T) @ layer.lora_B.T
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return F.cross_entropy(z, targets, reduction="sum", label_smoothing=smoothing)


def body_states(holder: Holder, kind: str) -> Tensor:
    """Hidden states; those of a tied head come from the same weights as the head."""
    return holder.embedding(torch.arange(N)) * 0.5 if "tied" in kind else hidden_states()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_torch(kind, smoothing):
    holder, head = head_of(kind)
    targets = target_tokens()
    results = []
    for compute in (
        lambda h: cross_entropy(h, targets, head, label_smoothing=smoothing, chunk_tokens=5),
        lambda h: truth(holder, head, h, targets, smoothing),
    ):
        holder.zero_grad(set_to_none=True)
        hidden = body_states(holder, kind)
        hidden.retain_grad()
        loss = compute(hidden)
        (3.0 * loss).backward()  # the gradient that comes from above is not 1
        gradients = {name: p.grad for name, p in holder.named_parameters() if p.requires_grad}
        results.append((loss.detach(), hidden.grad, gradients))
    (loss, d_hidden, found), (true_loss, true_d_hidden, expected) = results
    assert loss.dtype == torch.float64
    close(loss, true_loss, torch.float64)
    close(d_hidden, true_d_hidden, torch.float64)
    assert d_hidden.any()
    unused = {"embedding.weight"} if kind.startswith("trained") else set()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name in unused:
            assert gradient is None
            assert found[name] is None
        else:
            assert gradient.any()
            close(found[name], gradient, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_loss_is_the_same(kind):
    holder, head = head_of(kind)
    hidden = body_states(holder, kind).detach()
    with torch.no_grad():
        loss = cross_entropy(hidden, target_tokens(), head, chunk_tokens=7)
    assert not loss.requires_grad
    close(loss, truth(holder, head, hidden, target_tokens(), 0.0).detach(), torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["frozen", "frozen-cap", "trained", "lora"])
def test_the_chunk_size_changes_nothing_but_rounding(kind, smoothing):
    results = []
    for chunk in (1, 4, 22, 23, 1000):
        holder, head = head_of(kind)
        hidden = hidden_states()
        cross_entropy(hidden, target_tokens(), head, label_smoothing=smoothing, chunk_tokens=chunk).backward()
        gradients = [p.grad for p in holder.lm_head.parameters() if p.requires_grad]
        results.append([hidden.grad, *gradients])
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            close(mine, first, torch.float64)


def test_frozen_hidden_states_still_train_the_head():
    holder, head = head_of("trained")
    cross_entropy(hidden_states().detach(), target_tokens(), head, chunk_tokens=5).backward()
    found = holder.lm_head.weight.grad.clone()
    holder.zero_grad(set_to_none=True)
    truth(holder, head, hidden_states().detach(), target_tokens(), 0.0).backward()
    close(found, holder.lm_head.weight.grad, torch.float64)


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_bfloat16_adds_up_in_float32(kind):
    holder, head = head_of(kind)
    holder.bfloat16()
    hidden = hidden_states().detach().bfloat16().requires_grad_()
    loss = cross_entropy(hidden, target_tokens(), head, chunk_tokens=5)
    loss.backward()
    wide = hidden.detach().double().requires_grad_()
    holder.double()
    expected = truth(holder, head, wide, target_tokens(), 0.0)
    expected.backward()
    assert (loss.dtype, hidden.grad.dtype) == (torch.float32, torch.bfloat16)
    close(loss.detach(), expected.detach(), torch.bfloat16)
    size = wide.grad.abs().max()
    close(hidden.grad / size, wide.grad / size, torch.bfloat16)


class Counting(nn.Linear):
    """A head that notes how many rows it was given at most."""

    most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.most = max(self.most, x.shape[0])
        return super().forward(x)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_head_never_sees_more_than_a_chunk(trains, gradients):
    module = Counting(WIDTH, VOCABULARY, dtype=torch.float64).requires_grad_(trains)
    with torch.set_grad_enabled(gradients):
        cross_entropy(hidden_states(), target_tokens(), Head(module), chunk_tokens=5)
    assert module.most == 5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_wide_as_the_vocabulary_is_kept_per_token(kind):
    holder, head = head_of(kind)
    hidden = body_states(holder, kind)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = cross_entropy(hidden, target_tokens(), head, chunk_tokens=5)
    outer = saved[-(1 + sum(p.requires_grad for p in holder.lm_head.parameters())) :]
    # The gradient of h, and the finished gradients of what trains in the head; chunks come and go.
    shapes = [tuple(t.shape) for t in outer]
    assert shapes == [(N, WIDTH), *(tuple(p.shape) for p in holder.lm_head.parameters() if p.requires_grad)]
    own = {p.untyped_storage().data_ptr() for p in holder.parameters()}
    logits = [t for t in saved if t.shape[-1:] == (VOCABULARY,) and t.untyped_storage().data_ptr() not in own]
    assert all(t.numel() <= 5 * VOCABULARY for t in logits)
    assert loss.requires_grad


@pytest.mark.parametrize(("vocabulary", "itemsize"), [(50_000, 2), (50_000, 4), (1000, 8), (10**8, 4)])
def test_chunks_fit_the_budget_but_for_the_least_of_sixteen(vocabulary, itemsize):
    budget = 10 * 2**20
    chunk = chunk_tokens_for(vocabulary, itemsize, budget_bytes=budget)
    cost = vocabulary * BYTES_PER_LOGIT[itemsize]
    assert chunk == 16 or chunk * cost <= budget < (chunk + 1) * cost


def test_full_logits_give_the_same_sum():
    holder, head = head_of("frozen")
    hidden, targets = hidden_states(), target_tokens()
    rows = torch.tensor([4, 0, 9])
    loss = full_logits_loss(head.logits(hidden), rows, targets[rows], label_smoothing=0.1)
    close(loss, truth(holder, head, hidden[rows], targets[rows], 0.1), torch.float64)


# ---------------------------------------------------------------- body and head

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gpt2"]


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_reproduce_the_logits(family, injected):
    model = tiny_causal_lm(family)
    if injected:
        targets = ["lm_head", "c_attn" if family == "gpt2" else "q_proj"]
        inject(model, LoRAConfig(rank=2, targets=targets))
        switch(model, randomise(extract(model)))
    parts = split_model(model)
    assert parts is not None
    with torch.no_grad():
        found = parts.head.logits(parts.body(tokens()).flatten(0, 1))
        close(found, model(tokens()).logits.flatten(0, 1), torch.float32)
    assert (parts.head.softcap is None) == (family != "gemma2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_found_in_any_dtype(family, dtype):
    assert split_model(tiny_causal_lm(family, dtype=dtype)) is not None


def test_the_probe_leaves_every_mode_as_it_was():
    model = tiny_causal_lm("llama")
    model.model.layers[0].self_attn.training = True  # one module trains inside a base that does not
    modes = {name: module.training for name, module in model.named_modules()}
    assert split_model(model) is not None
    assert {name: module.training for name, module in model.named_modules()} == modes
    model.train()
    split_model(model)
    assert all(module.training for module in model.modules())


def test_a_head_that_is_not_the_models_own_is_refused():
    model = tiny_causal_lm("llama")
    other = nn.Linear(32, 64, bias=False)
    model.get_output_embeddings = lambda: other
    assert split_model(model) is None


def test_a_model_that_does_something_behind_its_head_is_refused():
    model = tiny_causal_lm("llama")
    inner = model.forward

    def shifted(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = out.logits + 0.01
        return out

    model.forward = shifted
    assert split_model(model) is None


@pytest.mark.parametrize(("key", "value"), [("logit_scale", 0.5), ("logits_scaling", 4.0)])
def test_a_config_that_names_a_scale_the_model_does_not_apply_is_refused(key, value):
    model = tiny_causal_lm("llama")
    setattr(model.config, key, value)
    assert split_model(model) is None


def test_what_is_no_language_model_is_refused():
    assert split_model(nn.Linear(3, 4)) is None
