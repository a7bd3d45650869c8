"""LoRA on layers that are not linear: against float64 loops, bit-identical at the start, merged and taken off exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorasmith.errors import AdapterFileError, MergeStateError, TargetError
from lorasmith.inject import eject, extract, inject, merge, merged, switch, unmerge
from lorasmith.lora import Adapter, LoRAConfig
from tests.support.layers import Named, TiedLM, correlate
from tests.support.models import tiny_causal_lm
from tests.support.tolerance import close

CONVS = {
    "1d": (nn.Conv1d, dict(kernel_size=3, stride=2, padding=1), (9,)),
    "2d": (nn.Conv2d, dict(kernel_size=(3, 2), stride=(1, 2), padding=(1, 0)), (5, 6)),
    "2d-point": (nn.Conv2d, dict(kernel_size=1, dilation=2), (4, 3)),
    "2d-no-bias": (nn.Conv2d, dict(kernel_size=2, bias=False), (4, 4)),
    "3d": (nn.Conv3d, dict(kernel_size=(2, 3, 1), stride=2, padding=(0, 1, 0)), (4, 5, 3)),
    "1d-groups": (nn.Conv1d, dict(kernel_size=3, padding=1, groups=2), (6,)),
    "2d-groups": (nn.Conv2d, dict(kernel_size=2, groups=2), (3, 4)),
}


def filled(adapter: Adapter, *, seed: int = 0) -> Adapter:
    """Every tensor that starts at zero gets random values, blocks only where blocks are."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype) * 0.3

    for f in adapter.factors.values():
        for t in (f.A, f.B):
            if not t.any():
                t.copy_(noise(t))
    for t in adapter.extras.tensors().values():
        t.add_(noise(t))
    return adapter


def live(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> Adapter:
    """Inject, give every trainable tensor random values in place, and return what the model carries."""
    inject(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
                assert p.any(), name
    return extract(model)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_whole_life(make, config: LoRAConfig, x: torch.Tensor, *, merges: bool = True) -> None:
    """Bit-identical start, effect, extract → inject, eject; merge agrees, and unmerge restores every bit."""
    model = make()
    pristine, types = bits(model), {path: type(m) for path, m in model.named_modules()}
    base = model(x)
    inject(model, config)
    assert torch.equal(model(x), base)
    eject(model)
    adapter = live(model, config)
    expected = model(x).detach()
    assert (expected - base).abs().max() > 1e-3
    eject(model)
    assert {path: type(m) for path, m in model.named_modules()} == types
    assert bits(model).keys() == pristine.keys()
    assert all(torch.equal(v, pristine[n]) for n, v in bits(model).items())
    inject(model, adapter)
    assert torch.equal(model(x), expected)
    assert extract(model).digest == adapter.digest
    switch(model, filled(extract(model), seed=3))
    switch(model, adapter)
    assert torch.equal(model(x), expected)
    if merges:
        with merged(model, adapter):
            close(model(x), expected, x.dtype if x.is_floating_point() else base.dtype)
        assert torch.equal(model(x), expected)
    eject(model)
    if merges:
        merge(model, adapter)
        close(model(x), expected, base.dtype)
        unmerge(model)
    assert all(torch.equal(v, pristine[n]) for n, v in bits(model).items())


def assert_gradients(model: nn.Module, loop, x: torch.Tensor) -> None:
    """d Σ w·y by autograd through the layer equals that through `loop(leaves)`, for every trained tensor."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in trained.items()}
    y = model(x)
    z = loop(leaves)
    close(y, z, torch.float64)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.any(), name
        close(trained[name].grad, leaf.grad, torch.float64)


# --- embedding and head ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_embedding_life(targets, dtype):
    config = LoRAConfig(rank=3, alpha=6, targets=targets)
    assert_whole_life(
        lambda: seeded(lambda: TiedLM(tied=False)).to(dtype), config, torch.arange(8).view(2, 4)
    )


def seeded(make):
    torch.manual_seed(0)
    return make()


def test_embedding_against_a_loop():
    model = Named(nn.Embedding(7, 4, padding_idx=2)).double()
    x = torch.tensor([[1, 2, 6], [1, 0, 3]])
    live(model, LoRAConfig(rank=2, alpha=3, targets=["layer"]))
    W = model.layer.weight.detach()

    def loop(leaf):
        A, B = leaf["layer.lora_A"], leaf["layer.lora_B"]
        rows = [
            W[t] + 1.5 * sum(B[:, k] * (A[k, t] if t != 2 else A[k, t].detach()) for k in range(2))
            for t in x.flatten()
        ]
        return torch.stack(rows).view(2, 3, 4)

    assert_gradients(model, loop, x)


def test_scaled_embedding_scales_its_low_rank_term_too():
    model = tiny_causal_lm("gemma3", dtype=torch.float64)
    embed = model.get_input_embeddings()
    ids = torch.arange(5)
    before, scale = embed(ids), embed.embed_scale.double()
    assert scale > 1.5
    adapter = live(model, LoRAConfig(rank=2, alpha=2, targets=["embed_tokens"]))
    (f,) = adapter.factors.values()
    close(embed(ids), before + scale * (f.A.T @ f.B.T)[ids], torch.float64)


def test_tokens_that_training_never_saw_stay_the_bases():
    model = seeded(lambda: TiedLM(tied=False))
    before = model.embed_tokens.weight.detach().clone()
    inject(model, LoRAConfig(rank=2, targets=["embed_tokens"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([[1, 4, 5]])).square().sum().backward()
        optimizer.step()
    moved = (model.embed_tokens(torch.arange(11)) != before).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 4, 5]


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_tied_layers_are_adapted_one_by_one_and_not_merged(targets):
    model = seeded(lambda: TiedLM(tied=True)).double()
    config = LoRAConfig(rank=2, alpha=2, targets=targets)
    x = torch.arange(6).view(2, 3)
    assert_whole_life(lambda: copy.deepcopy(model), config, x, merges=False)
    adapter = live(model, config)
    deltas = {path: f.B @ f.A for path, f in adapter.factors.items()}
    W = model.embed_tokens.weight.detach()
    embed = W + (deltas["embed_tokens"].T if "embed_tokens" in deltas else 0)
    head = W + deltas.get("lm_head", 0)
    close(model(x), torch.tanh(model.mid(embed[x])) @ head.T, torch.float64)
    eject(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    with pytest.raises(MergeStateError, match="shares its memory"):
        merge(model, adapter)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Embedding(4, 3, max_norm=1.0), "max_norm rewrites the rows"),
        (lambda: nn.Conv1d(2, 2, 3, dilation=2), "never dilated"),
        (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), 'padding_mode="reflect"'),
        (lambda: nn.ConvTranspose1d(2, 2, 3), "transposed convolution"),
        (lambda: nn.Bilinear(2, 2, 2), "stacked parameters; name them in target_parameters"),
    ],
)
def test_layers_without_an_exact_low_rank_term_are_refused(layer, reason):
    with pytest.raises(TargetError, match=reason):
        inject(Named(layer()), LoRAConfig(rank=2, targets=["layer"]))


# --- convolutions ---


@pytest.mark.parametrize("case", CONVS)
def test_convolution_life(case):
    kind, options, size = CONVS[case]
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    make = lambda: seeded(lambda: Named(kind(4, 6, **options))).double()  # noqa: E731
    assert_whole_life(make, LoRAConfig(rank=2, alpha=3, targets=["layer"]), x, merges="groups" not in case)


@pytest.mark.parametrize("case", CONVS)
def test_convolution_against_a_loop(case):
    kind, options, size = CONVS[case]
    model = seeded(lambda: Named(kind(4, 6, **options))).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    base = model(x).detach()
    live(model, LoRAConfig(rank=2, alpha=3, targets=["layer"]))
    stride, padding, groups = model.layer.stride, model.layer.padding, model.layer.groups

    def loop(leaf):
        A, B = leaf["layer.lora_A"], leaf["layer.lora_B"]
        u = correlate(x, A.view(2, 4, *model.layer.kernel_size), stride, padding)
        channels = []
        for o in range(6):
            first = o // (6 // groups) * (2 // groups)
            channels.append(sum(B[o, k] * u[:, first + k] for k in range(2 // groups)))
        return base + 1.5 * torch.stack(channels, 1)

    assert_gradients(model, loop, x)


def test_grouped_convolution_needs_a_rank_that_divides_and_is_not_merged():
    model = Named(nn.Conv1d(4, 6, 3, groups=2))
    with pytest.raises(AdapterFileError, match="rank 3 does not divide into 2 parts"):
        inject(model, LoRAConfig(rank=3, targets=["layer"]))
    adapter = live(model, LoRAConfig(rank=2, targets=["layer"]))
    eject(model)
    with pytest.raises(MergeStateError, match="2 groups; A reads all input channels"):
        merge(model, adapter)
    adapter.factors["layer"].B.fill_(1.0)
    with pytest.raises(AdapterFileError, match="B is not zero outside the blocks"):
        inject(model, adapter)
