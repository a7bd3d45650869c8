"""The hand-written LoRA forward and backward against plain autograd, and the layers that share an input."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorasmith.inject import LoRALayer, extract, group_shared_inputs, inject, lora_layers, switch, ungroup
from lorasmith.inject.autograd import Spec, dropout_mask, lora_linears
from lorasmith.lora import LoRAConfig
from tests.support.models import randomise, tiny_causal_lm, tokens
from tests.support.tolerance import close

IN, TOKENS = 6, (2, 3)
OUTS, RANKS, SCALINGS = (5, 4, 3), (2, 3, 1), (2.0, 0.5, 1.25)


def group_tensors(
    layers: int, *, bias: bool, transposed: bool, base_trains: bool, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(3)

    def make(*shape: int, trains: bool = True) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(trains)

    tensors: list[Tensor | None] = []
    for out, rank in list(zip(OUTS, RANKS, strict=True))[:layers]:
        shape = (IN, out) if transposed else (out, IN)
        tensors += [make(*shape, trains=base_trains), make(out, trains=base_trains) if bias else None]
        tensors += [make(rank, IN), make(out, rank)]
    return tensors


def input_tensor(dtype: torch.dtype = torch.float64, *, size: tuple[int, ...] = (*TOKENS, IN)) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def spec_for(layers: int, *, transposed: bool, dropout: float = 0.0) -> Spec:
    return Spec(SCALINGS[:layers], (transposed,) * layers, dropout, seed=11)


def reference(x: Tensor, spec: Spec, tensors: list[Tensor | None]) -> tuple[Tensor, ...]:
    """The formula of the module's docstring, left to autograd."""
    xd = x * dropout_mask(x.detach().reshape(-1, x.shape[-1]), spec).view(x.shape) if spec.dropout else x
    outputs = []
    for i, (scaling, transposed) in enumerate(zip(spec.scalings, spec.transposed, strict=True)):
        W, b, A, B = tensors[4 * i : 4 * i + 4]
        y = x @ (W if transposed else W.T) + scaling * (xd @ A.to(x.dtype).T) @ B.to(x.dtype).T
        outputs.append(y if b is None else y + b)
    return tuple(outputs)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in outputs]
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, inputs, allow_unused=True)


KINDS = [
    {"layers": 1, "bias": False, "transposed": False, "base_trains": False, "dropout": 0.0},
    {"layers": 1, "bias": True, "transposed": True, "base_trains": True, "dropout": 0.0},
    {"layers": 1, "bias": True, "transposed": False, "base_trains": True, "dropout": 0.4},
    {"layers": 3, "bias": True, "transposed": False, "base_trains": False, "dropout": 0.0},
    {"layers": 3, "bias": False, "transposed": True, "base_trains": False, "dropout": 0.4},
    {"layers": 3, "bias": True, "transposed": False, "base_trains": True, "dropout": 0.4},
    {"layers": 3, "bias": True, "transposed": True, "base_trains": True, "dropout": 0.0},
]


def kind_id(kind: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in kind.items())


@pytest.fixture(params=KINDS, ids=kind_id)
def kind(request) -> dict:
    return dict(request.param)


def test_numerical_gradients(kind):
    dropout, layers = kind.pop("dropout"), kind["layers"]
    tensors = group_tensors(**kind)
    spec = spec_for(layers, transposed=kind["transposed"], dropout=dropout)
    assert torch.autograd.gradcheck(
        lambda x, *t: lora_linears(x, spec, t)[:layers], (input_tensor(), *tensors)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_values_and_every_gradient_equal_plain_autograd(kind, dtype):
    dropout, layers = kind.pop("dropout"), kind["layers"]
    spec = spec_for(layers, transposed=kind["transposed"], dropout=dropout)
    tensors = group_tensors(**kind, dtype=dtype)
    x = input_tensor(dtype)
    outputs = lora_linears(x, spec, tensors)[:layers]
    found = gradients(outputs, [x, *(t for t in tensors if t is not None and t.requires_grad)])

    # The truth is in float64, from the same (rounded) inputs and the same mask.
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    x64 = x.detach().double().requires_grad_()
    truth_spec = spec
    if dropout and dtype != torch.float64:
        # The mask is drawn in x's dtype: take it from there.
        mask = dropout_mask(x.detach().reshape(-1, IN), spec).double().view(x.shape)
        expected_outputs = tuple(
            base + low
            for base, low in zip(
                reference(x64, Spec((0.0,) * layers, spec.transposed), wide),
                reference(
                    x64 * mask,
                    Spec(spec.scalings, spec.transposed),
                    [
                        t if i % 4 >= 2 else (None if i % 4 else torch.zeros_like(t))
                        for i, t in enumerate(wide)
                    ],
                ),
                strict=True,
            )
        )
    else:
        expected_outputs = reference(x64, truth_spec, wide)
    expected = gradients(expected_outputs, [x64, *(t for t in wide if t is not None and t.requires_grad)])
    for mine, truth in zip((*outputs, *found), (*expected_outputs, *expected), strict=True):
        assert mine.dtype == dtype
        if dtype == torch.float64:
            close(mine, truth, dtype)
        else:  # rounding is relative to the largest terms of a sum, not to a sum that cancels
            close(mine.double() / truth.abs().max(), truth / truth.abs().max(), dtype)


def test_masters_in_float32_over_bfloat16_get_their_gradient_in_float32():
    tensors = group_tensors(3, bias=True, transposed=False, base_trains=False, dtype=torch.bfloat16)
    for i in (2, 3, 6, 7, 10, 11):
        tensors[i] = tensors[i].detach().float().requires_grad_()
    x, spec = input_tensor(torch.bfloat16), spec_for(3, transposed=False)
    masters = [t for t in tensors if t is not None and t.requires_grad]
    found = gradients(lora_linears(x, spec, tensors)[:3], masters)
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    truth = gradients(
        reference(x.detach().double(), spec, wide), [t for t in wide if t is not None and t.requires_grad]
    )
    for mine, expected in zip(found, truth, strict=True):
        assert mine.dtype == torch.float32
        close(mine / expected.abs().max(), expected / expected.abs().max(), torch.bfloat16)


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_an_output_that_nobody_uses_costs_its_layer_no_gradient(unused):
    tensors = group_tensors(3, bias=True, transposed=False, base_trains=False)
    x, spec = input_tensor(), spec_for(3, transposed=False)
    inputs = [x, *(t for t in tensors if t is not None and t.requires_grad)]
    used = [i for i in range(3) if i != unused]
    found = gradients(tuple(lora_linears(x, spec, tensors)[i] for i in used), inputs)
    expected = gradients(tuple(reference(x, spec, tensors)[i] for i in used), inputs)
    zero = torch.zeros((), dtype=torch.float64)
    for mine, truth in zip(found, expected, strict=True):
        if truth is None:
            assert mine is None or not mine.any()
        else:
            close(mine if mine is not None else zero, truth, torch.float64)


def test_only_the_gradients_that_are_asked_for_are_formed():
    tensors = group_tensors(1, bias=True, transposed=False, base_trains=False)
    x = input_tensor().detach()
    tensors[2].requires_grad_(False)
    y = lora_linears(x, spec_for(1, transposed=False), tensors)[0]
    y.sum().backward()
    assert tensors[3].grad is not None
    assert all(t.grad is None for t in (x, tensors[0], tensors[1], tensors[2]))


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_mask_is_zero_or_the_inverse_of_the_kept_share(p):
    spec = Spec((1.0,), (False,), p, seed=5)
    x = torch.empty(200, 100, dtype=torch.float64)
    mask = dropout_mask(x, spec)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
    # 20,000 coins: the s.d. of the kept share is below 0.0036.
    assert (mask > 0).double().mean().item() == pytest.approx(1 - p, abs=0.018)
    assert torch.equal(mask, dropout_mask(x, spec))
    assert not torch.equal(mask, dropout_mask(x, Spec((1.0,), (False,), p, seed=6)))


# ---------------------------------------------------------------- what is kept for backward


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Attention(nn.Module):
    """q, k and v of one input, and the input goes nowhere else."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.q, self.k, self.v = (nn.Linear(IN, out, bias) for out in OUTS)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


def attention(*, dropout: float = 0.0, dtype: torch.dtype = torch.float64, grouped: bool = True) -> Attention:
    model = Attention().to(dtype)
    config = LoRAConfig(rank=2, targets=["q", "k", "v"], rank_pattern={"k": 3}, dropout=dropout)
    inject(model, config)
    switch(model, randomise(extract(model), size=0.5))
    if grouped:
        found = group_shared_inputs(model, lambda: model(torch.ones(1, IN, dtype=dtype)))
        assert found == [["q", "k", "v"]]
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_keeps_its_input_once_and_one_number_per_token_and_rank(dtype, dropout):
    model = attention(dtype=dtype, dropout=dropout).train()
    x = input_tensor(dtype)
    with saved_tensors() as saved:
        model(x)
    own = {storage(p) for p in model.parameters()}
    beyond = [t for t in saved if storage(t) not in own]
    inputs = [t for t in beyond if storage(t) == storage(x)]
    rest = {storage(t): t for t in beyond if storage(t) != storage(x)}
    assert len(inputs) == 1
    assert sum(t.untyped_storage().nbytes() for t in rest.values()) == 6 * (2 + 3 + 2) * dtype.itemsize
    assert {t.dtype for t in beyond} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_alone_keeps_its_input_without_a_copy(dtype):
    model = attention(dtype=dtype, grouped=False)
    x = input_tensor(dtype)
    with saved_tensors() as saved:
        model(x)
    own = {storage(p) for p in model.parameters()}
    beyond = {storage(t): t for t in saved if storage(t) not in own}
    assert storage(x) in beyond
    beyond.pop(storage(x))
    assert sorted(t.untyped_storage().nbytes() for t in beyond.values()) == [
        6 * rank * dtype.itemsize for rank in (2, 2, 3)
    ]
    assert {t.dtype for t in beyond.values()} == {dtype}


def test_nothing_is_kept_without_gradients():
    model = attention()
    with saved_tensors() as saved, torch.no_grad():
        outputs = model(input_tensor())
    assert not saved
    assert not any(y.requires_grad for y in outputs)


# ---------------------------------------------------------------- groups

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2"]


def adapted(family: str, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0):
    model = tiny_causal_lm(family, dtype=dtype)
    inject(model, LoRAConfig(rank=4, dropout=dropout))
    switch(model, randomise(extract(model)))
    return model


def model_gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    run().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def grouped(model: nn.Module) -> list[list[str]]:
    return group_shared_inputs(model, lambda: model(tokens(1, 4)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_finds_the_layers_that_share_an_input(family):
    model = adapted(family)
    if family == "gpt2":  # one fused c_attn, and every other layer has its own input
        expected = []
    else:
        expected = [
            [f"model.layers.{i}.{part}_proj" for part in parts]
            for i in (0, 1)
            for parts in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up"))
        ]
    assert grouped(model) == expected
    assert {p for p, la in lora_layers(model).items() if la.lora_group} == {p for g in expected for p in g}
    ungroup(model)
    assert not any(layer.lora_group for layer in lora_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_grouping_changes_outputs_and_gradients_by_rounding_only(family, dtype):
    model = adapted(family, dtype=dtype)
    alone = model(tokens()).logits
    alone_gradients = model_gradients(model, lambda: model(tokens()).logits.float())
    grouped(model)
    # One wider product for A: its rows are the same sums, which BLAS may add in another order.
    logits = model(tokens()).logits
    close(logits, alone, dtype)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, logits)
    together = model_gradients(model, lambda: model(tokens()).logits.float())
    assert together.keys() == alone_gradients.keys()
    for name, gradient in together.items():
        size = alone_gradients[name].abs().max()
        assert size > 0
        close(gradient / size, alone_gradients[name] / size, dtype)


def test_only_part_of_the_siblings_are_targets():
    model = tiny_causal_lm("llama")
    inject(model, LoRAConfig(rank=2, targets=["q_proj", "v_proj", "up_proj"]))
    assert grouped(model) == [[f"model.layers.{i}.self_attn.{p}_proj" for p in "qv"] for i in (0, 1)]


@pytest.fixture
def pair() -> tuple[Attention, Attention]:
    """The same layers, grouped and each alone."""
    return attention(), attention(grouped=False)


def test_another_input_gets_its_own_output(pair):
    together, alone = pair
    x, other = input_tensor(), input_tensor() * 2
    for name, value in (("q", x), ("k", other), ("v", x), ("k", x), ("q", other), ("v", other), ("v", x)):
        close(together.get_submodule(name)(value), alone.get_submodule(name)(value), torch.float64)


def test_an_equal_copy_of_the_input_is_not_taken_for_it(pair):
    together, alone = pair
    x = input_tensor()
    together.q(x)
    twin = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(together.k(twin).sum(), twin)
    (expected,) = torch.autograd.grad(alone.k(twin).sum(), twin)
    close(gradient, expected, torch.float64)


def test_an_input_modified_in_place_is_computed_again(pair):
    together, alone = pair
    x = input_tensor().detach()
    close(together.q(x), alone.q(x), torch.float64)
    x.add_(1.0)
    close(together.k(x), alone.k(x), torch.float64)
    close(together.v(x), alone.v(x), torch.float64)


def test_a_sibling_left_out_leaves_nothing_behind(pair):
    together, alone = pair
    x = input_tensor()
    for _ in range(2):  # v is never called, q and k twice
        close(together.q(x), alone.q(x), torch.float64)
        close(together.k(x), alone.k(x), torch.float64)
    y = input_tensor() + 1
    for ours, theirs in zip(together(y), alone(y), strict=True):
        close(ours, theirs, torch.float64)


def test_waiting_outputs_do_not_outlive_the_factors_they_came_from(pair):
    together, alone = pair
    x = input_tensor()
    together.q(x)
    for model in pair:
        switch(model, randomise(extract(model), seed=5, size=0.7))
    close(together.k(x), alone.k(x), torch.float64)
    for model in pair:  # now k has been taken and v waits
        with torch.no_grad():
            model.v.lora_B.mul_(3.0)
    close(together.v(x), alone.v(x), torch.float64)


def test_waiting_outputs_made_without_gradients_are_not_used_with_them(pair):
    together, alone = pair
    x = input_tensor()
    with torch.no_grad():
        together.q(x)
    y = together.k(x)
    assert y.requires_grad
    (gradient,) = torch.autograd.grad(y.sum(), together.k.lora_A)
    (expected,) = torch.autograd.grad(alone.k(x).sum(), alone.k.lora_A)
    close(gradient, expected, torch.float64)


def test_waiting_outputs_do_not_outlive_a_change_of_mode():
    model = attention(dropout=0.5).train()
    x = input_tensor()
    torch.manual_seed(0)
    model.q(x)  # the siblings wait, with dropout
    model.eval()
    close(model.k(x), attention(dropout=0.5, grouped=False).eval().k(x), torch.float64)


def test_inference_mode(pair):
    together, alone = pair
    with torch.inference_mode():
        x = input_tensor().detach() * 1.0
        for ours, theirs in zip(together(x), alone(x), strict=True):
            close(ours, theirs, torch.float64)
        together.q(x)
        x.add_(1.0)
        close(together.k(x), alone.k(x), torch.float64)


def test_a_copied_model_has_groups_of_its_own(pair):
    together, alone = pair
    twin = copy.deepcopy(together)
    switch(together, randomise(extract(together), seed=8))
    for ours, theirs in zip(twin(input_tensor()), alone(input_tensor()), strict=True):
        close(ours, theirs, torch.float64)


def test_siblings_of_a_group_share_one_dropout_mask_and_it_repeats_with_the_seed():
    model = attention(dropout=0.5).train()
    x = input_tensor()
    runs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        runs.append(torch.cat(model(x), -1))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    torch.manual_seed(4)
    spec = Spec(
        tuple(layer.lora_scaling for layer in (model.q, model.k, model.v)),
        (False,) * 3,
        0.5,
        seed=int(torch.randint(2**62, ()).item()),
    )
    tensors = [t for la in (model.q, model.k, model.v) for t in (la.weight, la.bias, la.lora_A, la.lora_B)]
    close(runs[0], torch.cat(reference(x, spec, tensors), -1), torch.float64)


# ---------------------------------------------------------------- other machinery around it


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_layers_get_the_same_gradients(dropout, group):
    model = attention(dropout=dropout, grouped=group).train()
    x = input_tensor()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.manual_seed(2)
    expected = gradients(model(x), inputs)
    torch.manual_seed(2)
    found = gradients(checkpoint(model, x, use_reentrant=False), inputs)
    assert any(g.any() for g in expected)
    for mine, truth in zip(found, expected, strict=True):
        assert torch.equal(mine, truth)


def test_a_checkpointed_model_gets_the_same_gradients():
    model = adapted("llama", dropout=0.3)
    grouped(model)
    for layer in lora_layers(model).values():
        layer.training = True
    results = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
            for layer in model.model.layers:
                layer.training = True
        torch.manual_seed(2)
        with saved_tensors() as saved:
            result = model_gradients(model, lambda: model(tokens()).logits)
        results.append((result, len(saved)))
    (expected, plain_saved), (found, few_saved) = results
    assert few_saved != plain_saved  # the layers really were recomputed
    for name, truth in expected.items():
        assert torch.equal(found[name], truth), name


@pytest.mark.parametrize("group", [False, True])
def test_autocast(group):
    model = attention(dtype=torch.float32, grouped=group)
    x = input_tensor(torch.float32)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    truth = attention(grouped=False)
    x64 = x.detach().double().requires_grad_()
    expected_outputs = truth(x64)
    expected = gradients(expected_outputs, [x64, *(p for p in truth.parameters() if p.requires_grad)])
    with torch.autocast("cpu", torch.bfloat16), saved_tensors() as saved:
        outputs = model(x)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    assert torch.bfloat16 in {t.dtype for t in saved}
    found = gradients(tuple(y.float() for y in outputs), inputs)
    for mine, wide in zip((*outputs, *found), (*expected_outputs, *expected), strict=True):
        close(mine.double() / wide.abs().max(), wide / wide.abs().max(), torch.bfloat16)
    assert {g.dtype for g in found} == {torch.float32}


@pytest.fixture
def without_shape_checks(monkeypatch):
    """The tests' run-time shape checks cannot be traced, so the layers use the module as users load it."""
    found = importlib.util.spec_from_file_location("lorasmith_autograd_as_shipped", inspect.getfile(Spec))
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, found.name, module)
    found.loader.exec_module(module)
    for name in ("Spec", "lora_linears"):
        monkeypatch.setattr(sys.modules[LoRALayer.__module__], name, getattr(module, name))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch's own, while tracing
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("group", [False, True])
def test_compiled_whole(backend, group):
    model = attention(grouped=group)
    x = input_tensor()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected_outputs = model(x)
    expected = gradients(expected_outputs, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    outputs = compiled(x)
    found = gradients(outputs, inputs)
    for mine, truth in zip((*outputs, *found), (*expected_outputs, *expected), strict=True):
        close(mine, truth, torch.float64)
    with torch.no_grad():
        for mine, truth in zip(compiled(x), expected_outputs, strict=True):
            close(mine, truth, torch.float64)
    torch._dynamo.reset()


def test_a_linear_subclass_with_its_own_forward_is_added_to():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(IN, 4, dtype=torch.float64))
    inject(model, LoRAConfig(rank=2, alpha=3, targets=["0"]))
    switch(model, randomise(extract(model)))
    layer, x = model[0], input_tensor()
    expected = 2 * F.linear(x, layer.weight, layer.bias) + 1.5 * (x @ layer.lora_A.T) @ layer.lora_B.T
    close(model(x), expected, torch.float64)
