"""The decoder layer in one node, against the layer's own forward, tensor by tensor."""

from __future__ import annotations

import pytest
import torch

from lorasmith.inject import eject, extract, inject, lora_layers
from lorasmith.lora import LoRAConfig
from lorasmith.train.attention import causal_attention  # noqa: F401  (registers the operator)
from lorasmith.train.block import Rotation, run_block
from lorasmith.train.elementwise import operations
from lorasmith.train.fast import fast_layers, is_block
from tests.support.models import VOCAB, tiny_causal_lm
from tests.support.tolerance import TOLERANCE, close

KEEPS = ["all", "no-mlp", "input"]
WIDTH, INTER, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 4, 2, 8
RANK = 3


@pytest.fixture(autouse=True)
def norms_in_their_own_dtype(monkeypatch):
    """transformers computes norms in float32 even in a float64 model; compare with exact ones there."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for kind in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):

        def forward(self, x, own=kind.forward):
            if x.dtype != torch.float64:
                return own(self, x)
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

        monkeypatch.setattr(kind, "forward", forward)


def adapted(family="llama", *, dtype=torch.float64, targets="all-linear", dropout=0.0):
    model = tiny_causal_lm(family, dtype=dtype)
    inject(model, LoRAConfig(rank=RANK, alpha=6, targets=targets, dropout=dropout), seed=1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(layer.lora_B)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def gradients(model, *, slots=21, mask=None):
    ids = torch.randint(0, VOCAB, (3, slots), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (hidden * weights.to(hidden.dtype)).sum().backward()
    return {"hidden": hidden.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
def test_outputs_and_every_gradient_are_the_layers_own(family, keep, targets):
    model = adapted(family, targets=targets)
    expected = gradients(model)
    with fast_layers(model, keep=keep) as count:
        assert count == 2
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, torch.float64)


@pytest.mark.parametrize(("family", "has"), [("qwen2", "bias"), ("qwen3", "q_norm")])
def test_every_weight_of_full_fine_tuning_gets_its_gradient(family, has):
    model = tiny_causal_lm(family, dtype=torch.float64)
    model.requires_grad_(True)
    expected = gradients(model)
    assert any("layernorm" in name for name in expected)
    assert any(has in name for name in expected)
    with fast_layers(model) as count:
        assert count == 2
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, torch.float64)


def test_a_mask_and_positions_are_respected():
    model = adapted()
    visible = torch.rand(3, 1, 21, 21, generator=torch.Generator().manual_seed(4)) < 0.6
    visible = (visible | torch.eye(21, dtype=torch.bool)).tril()
    expected = gradients(model, mask=visible)
    with fast_layers(model):
        for name, value in gradients(model, mask=visible).items():
            close(value, expected[name], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_near_to_float64_as_the_layers_own(dtype):
    exact = gradients(adapted())
    model = adapted(dtype=dtype)
    own = gradients(model)
    with fast_layers(model) as count:
        assert count == 2
        fast = gradients(model)

    def error(found, name):
        return float((found[name].double() - exact[name]).norm() / exact[name].norm())

    for name in exact:
        assert error(fast, name) <= 1.5 * error(own, name) + TOLERANCE[dtype][0], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_is_kept_changes_no_bit(dtype, family):
    model = adapted(family, dtype=dtype)
    results = []
    for keep in KEEPS:
        with fast_layers(model, keep=keep):
            results.append(gradients(model))
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


def test_dropout_draws_one_mask_for_both_passes():
    model = adapted(dropout=0.5)
    for layer in lora_layers(model).values():
        layer.training = True
    results = []
    for keep in KEEPS:
        with fast_layers(model, keep=keep) as count:
            assert count == 2
            torch.manual_seed(7)
            results.append(gradients(model))
    assert not torch.equal(results[0]["hidden"], gradients(adapted())["hidden"])
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("keep", KEEPS)
def test_saved_numbers_are_those_of_the_formula(keep):
    model = adapted(dtype=torch.float32)
    layer, (batch, slots) = model.model.layers[1], (2, 10)
    x = torch.randn(batch, slots, WIDTH, requires_grad=True) * 1.0
    angles = torch.zeros(1, slots, HEAD_DIM)
    sizes = {}

    def note(t):
        if not t.is_leaf or not t.requires_grad:
            sizes[t.untyped_storage().data_ptr()] = t.numel()
        return t

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()} | {angles.data_ptr()}
    ops = operations(torch.float32, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run_block(layer, x, Rotation(angles, angles, None), keep=keep, operations=ops)
    kept = sum(n for at, n in sizes.items() if at not in weights)
    per_token = {
        "all": 2 * WIDTH + 2 * (HEADS + KV_HEADS) * HEAD_DIM + 2 * INTER + 7 * RANK,
        "no-mlp": 2 * WIDTH + 2 * (HEADS + KV_HEADS) * HEAD_DIM + 7 * RANK,
        "input": WIDTH,
    }[keep]
    assert kept == batch * slots * per_token


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_other_layers_compute_as_ever(family):
    model = tiny_causal_lm(family)
    assert not any(is_block(m) for m in model.modules())
    with fast_layers(model) as count:
        assert count == 0
        assert not any("forward" in vars(m) for m in model.modules())


def test_a_layer_of_the_right_parts_that_computes_something_else_is_not_taken():
    model = tiny_causal_lm()
    layer = model.model.layers[0]
    own = type(layer)

    class Doubling(own):
        def forward(self, hidden_states, **kwargs):
            return 2 * super().forward(hidden_states, **kwargs)

    for layer in model.model.layers:
        layer.__class__ = Doubling
    assert is_block(layer)
    with fast_layers(model) as count:
        assert count == 0


@pytest.mark.parametrize("kind", ["dora", "shift", "parts"])
def test_layers_with_more_than_plain_factors_are_left_alone_and_train_as_ever(kind):
    model = tiny_causal_lm(dtype=torch.float64)
    settings = {
        "dora": {},
        "shift": {"lora_bias": True},
        "parts": {"parts": {"q_proj": [(0, 8), (24, 32)]}},
    }[kind]
    # the first decoder layer gets the other kind, the second plain factors
    inject(model, LoRAConfig(rank=RANK, targets=["q_proj"], layers=(0,), **settings), seed=1)
    adapter = extract(model)
    eject(model)
    inject(model, LoRAConfig(rank=RANK, targets=["v_proj"], layers=(1,)), seed=1)
    adapter.factors |= extract(model).factors
    eject(model)
    generator = torch.Generator().manual_seed(1)
    for path, f in adapter.factors.items():
        if kind != "parts" or ".0." not in path:
            f.B.normal_(0, 0.1, generator=generator)
        if kind == "dora" and ".0." in path:
            adapter.extras.magnitudes[path] = torch.rand(WIDTH, generator=generator, dtype=torch.float64)
    inject(model, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_shift", "lora_B_parts")):
                parameter.normal_(0, 0.1, generator=generator)
    assert [is_block(layer) for layer in model.model.layers] == [False, True]
    expected = gradients(model)
    assert any(
        name.endswith({"dora": "magnitude", "shift": "shift", "parts": "parts"}[kind]) for name in expected
    )
    with fast_layers(model) as count:
        assert count == 1
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        close(found[name], value, torch.float64)


@pytest.mark.parametrize("first", [0, 1])
def test_each_layer_is_proved_by_itself(first):
    """As in SmolLM 3, whose layers look alike while some leave the rotation out."""
    model = adapted()
    odd = model.model.layers[first].self_attn
    own = type(odd)

    class Unrotated(own):
        def forward(self, hidden_states, position_embeddings=None, **kwargs):
            cosine, sine = position_embeddings
            still = torch.ones_like(cosine), torch.zeros_like(sine)
            return super().forward(hidden_states, position_embeddings=still, **kwargs)

    odd.__class__ = Unrotated
    expected = gradients(model)
    assert all(is_block(layer) for layer in model.model.layers)
    with fast_layers(model) as count:
        assert count == 1
        for name, value in gradients(model).items():
            close(value, expected[name], torch.float64)


def test_a_layer_of_several_dtypes_is_not_taken():
    model = adapted(dtype=torch.bfloat16)
    model.model.layers[0].input_layernorm.float()
    assert [is_block(layer) for layer in model.model.layers] == [False, True]


def test_a_hook_anywhere_in_a_layer_keeps_it_as_it_is():
    model = tiny_causal_lm()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert [is_block(layer) for layer in model.model.layers] == [False, True]


def test_calls_with_a_cache_or_under_autocast_go_to_the_layer_itself():
    model = adapted(dtype=torch.float32)
    ids = torch.arange(6)[None]
    expected = model(ids, use_cache=True).logits
    with fast_layers(model), torch.no_grad():
        out = model(ids[:, :5], use_cache=True)
        step = model(ids[:, 5:], past_key_values=out.past_key_values, use_cache=True)
        close(step.logits[:, -1], expected[:, -1], torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(ids, use_cache=False).logits.dtype == torch.bfloat16


def test_afterwards_the_model_is_as_before():
    model = tiny_causal_lm()
    before = [layer.forward for layer in model.model.layers]
    with pytest.raises(KeyError), fast_layers(model):
        raise KeyError("stop")
    assert [layer.forward for layer in model.model.layers] == before
    assert not any("forward" in vars(m) for m in model.modules())
