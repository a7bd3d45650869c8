"""LoRA on layers that are not linear: against float64 loops, bit-identical at the start, merged and taken off exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorasmith.analysis import combine, dora_to_lora, survival_report, truncate
from lorasmith.errors import AdapterFileError, ConfigError, MergeStateError, TargetError
from lorasmith.inject import base_matrices, eject, extract, inject, merge, merged, switch, unmerge
from lorasmith.lora import Adapter, Extras, LoRAConfig, TokenRows
from tests.support.layers import MixtureBlock, Named, TiedLM, correlate
from tests.support.models import tiny_causal_lm, tokens
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
def test_tied_layers_are_adapted_and_merged_one_by_one(targets):
    model = seeded(lambda: TiedLM(tied=True)).double()
    config = LoRAConfig(rank=2, alpha=2, targets=targets)
    x = torch.arange(6).view(2, 3)
    assert_whole_life(lambda: copy.deepcopy(model), config, x)
    adapter = live(model, config)
    deltas = {path: f.B @ f.A for path, f in adapter.factors.items()}
    W = model.embed_tokens.weight.detach()
    embed = W + (deltas["embed_tokens"].T if "embed_tokens" in deltas else 0)
    head = W + deltas.get("lm_head", 0)
    close(model(x), torch.tanh(model.mid(embed[x])) @ head.T, torch.float64)
    eject(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    merge(model, adapter)
    close(model.embed_tokens.weight, embed, torch.float64)
    close(model.lm_head.weight, head, torch.float64)
    unmerge(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, W)


def test_dora_of_a_tied_head_is_merged_into_a_weight_of_its_own():
    model = seeded(lambda: TiedLM(tied=True)).double()
    adapter = dora_of(model, LoRAConfig(rank=2, targets=["embed_tokens", "lm_head"]))
    same = adapter.factors["embed_tokens"]
    adapter.factors["lm_head"].A, adapter.factors["lm_head"].B = same.B.T.clone(), same.A.T.clone()
    x = torch.arange(6).view(2, 3)
    inject(model, adapter)
    expected = model(x).detach()
    eject(model)
    with merged(model, adapter):
        # The same delta, but one is rescaled by columns and the other by rows.
        assert model.lm_head.weight is not model.embed_tokens.weight
        close(model(x), expected, torch.float64)
    assert model.lm_head.weight is model.embed_tokens.weight


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


# --- stacked experts ---

MOE = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_life(is_transposed):
    make = lambda: seeded(lambda: MixtureBlock(is_transposed=is_transposed)).double()  # noqa: E731
    config = LoRAConfig(rank=2, alpha=3, targets=["proj"], target_parameters=MOE)
    assert_whole_life(make, config, torch.randn(4, 6, dtype=torch.float64))


def test_a_real_mixture_of_experts_lives_too():
    model = tiny_causal_lm("mixtral")  # torch has no grouped product in float64
    config = LoRAConfig(rank=2, alpha=3, targets=(), target_parameters=MOE)
    base = model(tokens()).logits
    inject(model, config)
    assert torch.equal(model(tokens()).logits, base)
    adapter = live_factors(model)
    expected = model(tokens()).logits
    assert (expected - base).abs().max() > 1e-3
    eject(model)
    merge(model, adapter)
    close(model(tokens()).logits, expected, torch.float32)
    unmerge(model)
    assert torch.equal(model(tokens()).logits, base)


def live_factors(model: nn.Module) -> Adapter:
    adapter = filled(extract(model))
    switch(model, adapter)
    return adapter


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_against_a_loop(is_transposed):
    model = seeded(lambda: MixtureBlock(is_transposed=is_transposed)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    live(model, LoRAConfig(rank=2, alpha=3, targets=(), target_parameters=MOE))
    pristine = {n: p.detach() for n, p in model.experts.named_parameters()}

    def adapted(leaf, name: str, e: int):
        A, B = leaf[f"experts.lora_A_{name}"], leaf[f"experts.lora_B_{name}"]
        W = pristine[name][e].T if is_transposed else pristine[name][e]
        return W + 1.5 * sum(torch.outer(B[e][:, k], A[e][k]) for k in range(2))

    def loop(leaf):
        y = x
        for e in range(3):
            y = y + torch.tanh(x @ adapted(leaf, "gate_up_proj", e).T) @ adapted(leaf, "down_proj", e).T
        return y @ model.proj.weight.detach().T + model.proj.bias.detach()

    assert_gradients(model, loop, x)


# --- parts of a fused layer ---

FUSED = LoRAConfig(rank=2, alpha=3, targets=["layer"], parts={"layer": [(0, 4), (6, 9)]})


def test_parts_life():
    make = lambda: seeded(lambda: Named(nn.Linear(5, 10))).double()  # noqa: E731
    assert_whole_life(make, FUSED, torch.randn(4, 5, dtype=torch.float64))


def test_parts_of_a_fused_gpt2_attention_life():
    config = LoRAConfig(rank=2, targets=["c_attn"], parts={"c_attn": [(0, 32), (64, 96)]})
    model = tiny_causal_lm("gpt2", dtype=torch.float64)
    report = inject(model, config)
    # two layers; q and v each have A (2, 32) and B (32, 2)
    assert report.trainable_params == 2 * 2 * (2 * 32 + 32 * 2)
    eject(model)
    adapter = live(model, config)
    for f in adapter.factors.values():
        assert not f.B[32:64].any()
        assert not f.B[:32, 2:].any()
        assert not f.B[64:, :2].any()


def test_parts_against_a_loop():
    model = seeded(lambda: Named(nn.Linear(5, 10))).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    live(model, FUSED)
    W, b = model.layer.weight.detach(), model.layer.bias.detach()

    def loop(leaf):
        A, B = leaf["layer.lora_A"], leaf["layer.lora_B_parts"]
        y = x @ W.T + b
        q = y[:, :4] + 1.5 * (x @ A[:2].T) @ B[:4].T
        v = y[:, 6:9] + 1.5 * (x @ A[2:].T) @ B[4:].T
        return torch.cat([q, y[:, 4:6], v, y[:, 9:]], dim=1)

    assert_gradients(model, loop, x)


@pytest.mark.parametrize(
    ("parts", "error", "reason"),
    [
        ({"layer": [(0, 4), (3, 6)]}, ValueError, "must not overlap"),
        ({"layer": [(4, 4)]}, ValueError, "first row, row after the last"),
        ({"layer": [(0, 11)]}, AdapterFileError, "a part ends at row 11, the layer has 10"),
        ({"laier": [(0, 4)]}, TargetError, 'pattern key "laier" matches no adapted module'),
    ],
)
def test_parts_that_are_none(parts, error, reason):
    with pytest.raises(error, match=reason):
        inject(Named(nn.Linear(5, 10)), LoRAConfig(rank=2, targets=["layer"], parts=parts))


# --- a bias inside the factors ---


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 1)])
def test_shift_life(make):
    model = lambda: seeded(lambda: Named(make())).double()  # noqa: E731
    config = LoRAConfig(rank=2, alpha=3, targets=["layer"], lora_bias=True)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    assert_whole_life(model, config, x)


def test_shift_against_a_loop_and_without_a_place_to_merge_it():
    model = seeded(lambda: Named(nn.Linear(4, 6, bias=False))).double()
    x, W = torch.randn(3, 4, dtype=torch.float64), model.layer.weight.detach()
    adapter = live(model, LoRAConfig(rank=2, alpha=3, targets=["layer"], lora_bias=True))

    def loop(leaf):
        A, B, b = (leaf[f"layer.lora_{n}"] for n in ("A", "B", "shift"))
        return x @ W.T + 1.5 * ((x @ A.T) @ B.T + b)

    assert_gradients(model, loop, x)
    eject(model)
    with pytest.raises(MergeStateError, match="the layer has none to add it to"):
        merge(model, adapter)


# --- whole weights and token rows ---


@pytest.mark.parametrize("tied", [False, True])
def test_saved_modules_life(tied):
    config = LoRAConfig(rank=2, targets=["mid"], modules_to_save=["lm_head"])
    make = lambda: seeded(lambda: TiedLM(tied=tied)).double()  # noqa: E731
    assert_whole_life(make, config, torch.arange(6).view(2, 3))


def test_saved_modules_train_and_leave_what_was_tied_to_them_alone():
    model = seeded(lambda: TiedLM(tied=True))
    before = model.embed_tokens.weight.detach().clone()
    report = inject(model, LoRAConfig(rank=2, targets=["mid"], modules_to_save=["lm_head"]))
    assert report.trainable_params == 2 * (6 + 6) + 11 * 6
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(torch.tensor([[1, 2]])).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.embed_tokens.weight, before)
    adapter = extract(model)
    assert list(adapter.extras.weights) == ["lm_head.weight"]
    assert not torch.equal(adapter.extras.weights["lm_head.weight"], before)
    assert adapter.num_params == report.trainable_params
    eject(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight, before)


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_life(tied):
    config = LoRAConfig(rank=2, targets=["mid"], trainable_tokens={"embed_tokens": [5, 1]})
    make = lambda: seeded(lambda: TiedLM(tied=tied)).double()  # noqa: E731
    assert_whole_life(make, config, torch.arange(6).view(2, 3))


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_against_a_loop(tied):
    model = seeded(lambda: TiedLM(tied=tied)).double()
    ids = torch.tensor([[1, 2, 5], [5, 0, 10]])
    inject(model, LoRAConfig(targets=(), trainable_tokens={"embed_tokens": [5, 1]}))
    with torch.no_grad():
        model.embed_tokens.lora_rows.normal_()
    W, head = model.embed_tokens.weight.detach(), model.lm_head.weight.detach()

    def loop(leaf):
        (rows,) = leaf.values()
        swap = lambda t, W: rows[[5, 1].index(t)] if t in (5, 1) else W[t]  # noqa: E731
        x = torch.stack([swap(int(t), W) for t in ids.flatten()])
        out = torch.stack([swap(t, head) for t in range(11)]) if tied else head
        mid = model.mid
        return (torch.tanh(x @ mid.weight.detach().T + mid.bias.detach()) @ out.T).view(2, 3, 11)

    assert_gradients(model, loop, ids)


@pytest.mark.parametrize(
    ("extras", "reason"),
    [
        (Extras(weights={"lm_head.wait": torch.ones(2)}), "lm_head.wait: no such parameter"),
        (Extras(weights={"lm_head.weight": torch.ones(2, 6)}), r"adapter \(2, 6\), model \(11, 6\)"),
        (
            Extras(rows={"mid": TokenRows((1,), torch.ones(1, 6))}),
            "mid: trained token rows need an embedding",
        ),
        (Extras(rows={"embed_tokens": TokenRows((11,), torch.ones(1, 6))}), "token 11 is beyond its 11 rows"),
        (
            Extras(rows={"embed_tokens": TokenRows((1,), torch.ones(1, 5))}),
            r"shape \(1, 5\), \(1, 6\) are needed",
        ),
        (Extras(shifts={"mid": torch.ones(6)}), r"mid: a shift of shape \(6,\), no factors"),
    ],
)
def test_extras_that_do_not_fit_are_refused_and_nothing_is_attached(extras, reason):
    model = TiedLM(tied=False)
    with pytest.raises(AdapterFileError, match=reason):
        inject(model, Adapter(LoRAConfig(), {}, extras=extras))
    assert type(model.mid) is nn.Linear


def test_tied_token_rows_stay_one_weight_when_merged_but_a_saved_head_keeps_its_own():
    model = seeded(lambda: TiedLM(tied=True))
    W, values = model.embed_tokens.weight.detach().clone(), torch.ones(2, 6)
    rows = Extras(rows={"embed_tokens": TokenRows((5, 1), values)})
    with merged(model, Adapter(LoRAConfig(), {}, extras=rows)):
        assert model.lm_head.weight is model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight[[5, 1]], values)
        assert torch.equal(model.lm_head.weight[[0, 2]], W[[0, 2]])
        head = Extras(weights={"lm_head.weight": 2 * W}, rows=rows.rows)
        with merged(model, Adapter(LoRAConfig(), {}, extras=head)):
            assert torch.equal(model.lm_head.weight, 2 * W)
            assert torch.equal(model.embed_tokens.weight[[5, 1]], values)
        assert model.lm_head.weight is model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight[[5, 1]], values)
    assert torch.equal(model.lm_head.weight, W)


def test_token_rows_beside_factors_on_the_tied_head_are_refused_merged_or_not():
    model = seeded(lambda: TiedLM(tied=True))
    head = live(model, LoRAConfig(rank=2, targets=["lm_head"]))
    eject(model)
    pristine = bits(model)
    rows = {"embed_tokens": TokenRows((1,), torch.ones(1, 6))}
    both = Adapter(head.config, head.factors, extras=Extras(rows=rows))
    with pytest.raises(AdapterFileError, match=r"lm_head\.weight shares its weight"):
        inject(model, both)
    with pytest.raises(AdapterFileError, match=r"lm_head\.weight shares its weight"):
        merge(model, both)
    merge(model, head)  # the head has a weight of its own now
    at_start = bits(model)
    with pytest.raises(MergeStateError, match=r"lm_head\.weight shares its weight"):
        switch(model, both)
    assert all(torch.equal(v, at_start[n]) for n, v in bits(model).items())
    unmerge(model)
    assert all(torch.equal(v, pristine[n]) for n, v in bits(model).items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_files_copy_of_the_base_is_compared_with_the_base_even_while_another_is_merged(tied):
    model = seeded(lambda: TiedLM(tied=tied))
    adapter = live(model, LoRAConfig(rank=2, targets=["embed_tokens"]))
    eject(model)
    W = model.embed_tokens.weight.detach().clone()
    with_copy = Adapter(
        adapter.config, adapter.factors, extras=Extras(weights={"embed_tokens.weight": W.clone()})
    )
    merge(model, adapter)
    expected = bits(model)
    switch(model, with_copy)
    assert all(torch.equal(v, expected[n]) for n, v in bits(model).items())
    with_copy.extras.weights["embed_tokens.weight"][0, 0] += 1
    with pytest.raises(MergeStateError, match="copy of the base weight differs"):
        switch(model, with_copy)
    unmerge(model)
    assert torch.equal(model.embed_tokens.weight, W)


# --- DoRA ---


def dora_of(model: nn.Module, config: LoRAConfig) -> Adapter:
    """A DoRA adapter with random factors, and magnitudes that are not the weight's norms."""
    inject(model, config)
    adapter = filled(extract(model))
    eject(model)
    for path, f in adapter.factors.items():
        adapter.extras.magnitudes[path] = 0.5 + torch.rand(f.out_features, dtype=f.B.dtype)
    return adapter


DORA = {
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "no-bias": (lambda: nn.Linear(4, 6, bias=False), (2, 3, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("case", DORA)
def test_dora_is_the_rescaled_sum_and_merges_to_it(case):
    make, size = DORA[case]
    model = seeded(lambda: Named(make())).double()
    x = torch.randn(size, dtype=torch.float64)
    pristine = bits(model)
    adapter = dora_of(model, LoRAConfig(rank=2, alpha=3, targets=["layer"]))
    f, m = adapter.factors["layer"], adapter.extras.magnitudes["layer"]
    twin = copy.deepcopy(model)
    for row in range(6):
        v = model.layer.weight[row].detach() + 1.5 * sum(
            f.B[row, k] * f.A[k].view_as(model.layer.weight[row]) for k in range(2)
        )
        twin.layer.weight.data[row] = m[row] * v / v.square().sum().sqrt()
    expected = twin(x)
    inject(model, adapter)
    close(model(x), expected, torch.float64)
    assert extract(model).digest == adapter.digest
    eject(model)
    merge(model, adapter)
    close(model.layer.weight, twin.layer.weight, torch.float64)
    unmerge(model)
    assert all(torch.equal(v, pristine[n]) for n, v in bits(model).items())


def test_dora_gradients_hold_the_norm_constant():
    model = seeded(lambda: Named(nn.Linear(4, 6))).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    W, b = model.layer.weight.detach(), model.layer.bias.detach()
    inject(model, dora_of(model, LoRAConfig(rank=2, alpha=3, targets=["layer"])))

    def loop(leaf):
        A, B, m = (leaf[f"layer.lora_{n}"] for n in ("A", "B", "magnitude"))
        V = W + 1.5 * B @ A
        norm = torch.stack([row.square().sum().sqrt() for row in V]).detach()
        return x @ (V * (m / norm)[:, None]).T + b

    assert_gradients(model, loop, x)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_dora_becomes_plain_lora_with_a_true_residual(kind):
    model = seeded(lambda: Named(nn.Linear(12, 9) if kind == "linear" else nn.Embedding(12, 9))).double()
    adapter = dora_of(model, LoRAConfig(rank=2, alpha=3, targets=["layer"]))
    W0 = model.layer.weight.detach().clone()
    weights, transposed = {"layer": W0}, ["layer"] if kind == "embedding" else []
    with merged(model, adapter):
        update = model.layer.weight.detach() - W0
    for rank in (1, 4, 9):
        converted = dora_to_lora(adapter, weights, rank=rank, transposed=transposed)
        with merged(model, converted.adapter):
            left = (W0 + update - model.layer.weight.detach()).norm() / update.norm()
        assert converted.relative_error == pytest.approx(left.item(), rel=1e-9, abs=1e-12)
        best = torch.linalg.svdvals(update)[rank:].norm() / update.norm()
        assert converted.relative_error == pytest.approx(best.item(), rel=1e-9, abs=1e-12)
    assert converted.relative_error < 1e-12
    assert not converted.adapter.extras


def test_survival_of_dora_is_that_of_its_whole_update():
    model = seeded(lambda: Named(nn.Linear(12, 9)))
    adapter = dora_of(model, LoRAConfig(rank=2, alpha=3, targets=["layer"]))
    W0 = model.layer.weight.detach().bfloat16().float()
    model.layer.weight.data.copy_(W0)
    with merged(model, adapter):
        exact = model.layer.weight.detach() - W0
    model.bfloat16()
    with merged(model, adapter):
        realised = model.layer.weight.detach().float() - W0
    report = survival_report(base_matrices(model, adapter), adapter, torch.bfloat16)
    assert report.relative_error == pytest.approx(((realised - exact).norm() / exact.norm()).item(), rel=1e-4)
    assert 0 < report.relative_error < 0.1


def test_algebra_refuses_what_is_more_than_a_sum():
    model = Named(nn.Linear(4, 6))
    adapter = dora_of(model, LoRAConfig(rank=2, targets=["layer"]))
    with pytest.raises(ConfigError, match="Convert DoRA to plain LoRA first"):
        truncate(adapter, rank=1)
    with pytest.raises(ConfigError, match="convert DoRA with dora_to_lora"):
        combine([adapter, adapter])
    with pytest.raises(ConfigError, match="plain LoRA already"):
        dora_to_lora(Adapter(LoRAConfig(), dict(adapter.factors)), {"layer": model.layer.weight})


def test_algebra_keeps_the_kind_of_a_layer():
    model = seeded(lambda: TiedLM(tied=False))
    inject(model, LoRAConfig(rank=3, targets=["embed_tokens", "mid"]))
    adapter = filled(extract(model))
    for made in (truncate(adapter, rank=2), combine([adapter, adapter], [0.5, 0.5]).adapter):
        assert {p: f.layout for p, f in made.factors.items()} == {
            p: f.layout for p, f in adapter.factors.items()
        }


def test_an_adapter_says_what_it_holds_beyond_linear_layers():
    model = seeded(lambda: TiedLM(tied=False))
    inject(model, LoRAConfig(targets=["mid", "embed_tokens"], modules_to_save=["lm_head"]))
    assert extract(model).beyond_linear == "1 embedding modules, 1 whole trained weights"
    eject(model)
    inject(model, LoRAConfig(targets=["mid"]))
    assert extract(model).beyond_linear == ""
