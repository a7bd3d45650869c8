"""Sums without cross terms, merges by element, each against dense float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.analysis import combine, relative_error, subtract
from lorasmith.analysis.elementwise import dare, ties, trim
from lorasmith.errors import BaseMismatchError, ConfigError
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.tolerance import close

SHAPES = {"layers.0.q": (20, 14), "layers.0.v": (9, 14), "layers.1.q": (20, 14)}


def make_adapter(
    seed: int, *, rank: int = 3, dtype=torch.float64, scaling: float = 1.5, skip: tuple[str, ...] = ()
) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for path, (out, inn) in SHAPES.items():
        A = torch.randn(rank, inn, generator=g, dtype=torch.float64)
        B = torch.randn(out, rank, generator=g, dtype=torch.float64)
        if path not in skip:
            factors[path] = Factors(A.to(dtype), B.to(dtype), scaling)
    return Adapter(
        LoRAConfig(rank=rank, alpha=rank * scaling), factors, provenance={"base": "x", "seed": seed}
    )


def dense(f: Factors) -> torch.Tensor:
    return f.scaling * (f.B.double() @ f.A.double())


def dense_sum(adapters: list[Adapter], weights: list[float], path: str) -> torch.Tensor:
    total = torch.zeros(SHAPES[path], dtype=torch.float64)
    for adapter, weight in zip(adapters, weights, strict=True):
        if path in adapter.factors:
            total += weight * dense(adapter.factors[path])
    return total


def config_agrees(adapter: Adapter) -> bool:
    return all(
        adapter.config.rank_of(p) == f.rank and adapter.config.scaling_of(p) == f.scaling == 1.0
        for p, f in adapter.factors.items()
    )


@pytest.mark.parametrize("method", ["sum", "concat"])
def test_the_exact_methods_have_no_cross_terms(method):
    adapters, weights = [make_adapter(0), make_adapter(1, rank=2, scaling=0.25)], [0.7, -1.3]
    result = combine(adapters, weights, method=method)
    assert result.relative_error < 1e-14
    assert result.rank == 5
    assert config_agrees(result.adapter)
    for path, f in result.adapter.factors.items():
        close(dense(f), dense_sum(adapters, weights, path), torch.float64)


@given(
    weights=st.lists(st.floats(-2, 2, allow_nan=False, width=32), min_size=3, max_size=3),
    ranks=st.lists(st.integers(1, 8), min_size=3, max_size=3),
    method=st.sampled_from(["sum", "concat"]),
)
@settings(max_examples=25, deadline=None)
def test_any_weights_and_ranks_sum_exactly(weights, ranks, method):
    adapters = [make_adapter(i, rank=r) for i, r in enumerate(ranks)]
    result = combine(adapters, weights, method=method)
    for path, f in result.adapter.factors.items():
        close(dense(f) / 100, dense_sum(adapters, weights, path) / 100, torch.float64)
    assert config_agrees(result.adapter)


def test_peft_linear_has_cross_terms_and_ours_has_none():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(14, 20))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), "one")
    wrapped.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    adapters = []
    for i, name in enumerate(["one", "two"]):
        f = make_adapter(i, dtype=torch.float32, scaling=2.0).factors["layers.0.q"]
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(f.A)
            layer.lora_B[name].weight.copy_(f.B)
        adapters.append(Adapter(LoRAConfig(rank=3, alpha=6), {"0": f}))
    wrapped.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", combination_type="linear")
    theirs = layer.get_delta_weight("mix").detach().double()
    expected = sum(0.5 * dense(a.factors["0"]) for a in adapters)
    ours = combine(adapters, [0.5, 0.5]).adapter.factors["0"]
    close(dense(ours), expected, torch.float32)
    (A1, B1), (A2, B2) = [(a.factors["0"].A.double(), a.factors["0"].B.double()) for a in adapters]
    cross = 0.5 * 2.0 * (B1 @ A2 + B2 @ A1)
    close(theirs, expected + cross, torch.float32)
    assert torch.linalg.matrix_norm(cross) > 0.5 * torch.linalg.matrix_norm(expected)


def test_sum_recompresses_what_concat_stacks():
    a = make_adapter(0)
    assert combine([a, a, a], [1, 1, 1], method="concat").rank == 9
    result = combine([a, a, a], [1, 1, 1], method="sum")
    assert result.rank == 3
    assert result.relative_error < 1e-14
    for path, f in result.adapter.factors.items():
        close(dense(f), 3 * dense(a.factors[path]), torch.float64)


def test_the_sum_is_never_wider_than_the_module():
    result = combine([make_adapter(i, rank=8) for i in range(3)])
    assert result.adapter.factors["layers.0.v"].rank == 9
    assert result.adapter.factors["layers.0.q"].rank == 14
    assert config_agrees(result.adapter)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_best_approximation_of_the_sum(rank):
    adapters, weights = [make_adapter(i) for i in range(3)], [0.5, 0.3, -0.2]
    result = combine(adapters, weights, method="svd", rank=rank)
    tails, norms = [], []
    for path, f in result.adapter.factors.items():
        total = dense_sum(adapters, weights, path)
        S = torch.linalg.svdvals(total)
        close(torch.linalg.matrix_norm(total - dense(f)), S[rank:].norm(), torch.float64)
        tails.append(S[rank:].norm() ** 2)
        norms.append(S.norm() ** 2)
    assert result.rank == rank
    assert result.relative_error == pytest.approx((sum(tails) / sum(norms)).sqrt().item(), rel=1e-12)


def test_svd_rank_defaults_to_the_largest():
    assert combine([make_adapter(0, rank=2), make_adapter(1, rank=4)], method="svd").rank == 4


def test_missing_modules_count_as_zero():
    adapters = [make_adapter(0, skip=("layers.1.q",)), make_adapter(1, skip=("layers.0.q", "layers.0.v"))]
    for method in ("sum", "concat", "svd", "ties", "dare"):
        result = combine(adapters, [2.0, 1.0], method=method, rank=None, density=None)
        assert set(result.adapter.factors) == set(SHAPES)
        assert config_agrees(result.adapter)
        if method in ("sum", "concat", "svd"):
            for path, f in result.adapter.factors.items():
                close(dense(f), dense_sum(adapters, [2.0, 1.0], path), torch.float64)


def test_configs_that_chose_other_modules_become_a_list_of_paths():
    a, b = make_adapter(0), make_adapter(1)
    assert combine([a, b]).adapter.config.targets == "all-linear"
    b = Adapter(LoRAConfig(rank=3, targets=["q"]), b.factors)
    assert combine([a, b]).adapter.config.targets == tuple(sorted(SHAPES))


def test_provenance_keeps_what_all_share():
    assert combine([make_adapter(0), make_adapter(1)]).adapter.provenance == {"base": "x"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stated_error_includes_the_rounding_of_the_result(dtype):
    adapters = [make_adapter(i, dtype=dtype) for i in range(2)]
    for method in ("sum", "concat"):
        result = combine(adapters, [0.3, 0.4], method=method)
        assert {t.dtype for t in result.adapter.tensors().values()} == {dtype}
        assert 0 < result.relative_error < 2 * torch.finfo(dtype).eps
    assert dtype == torch.bfloat16 or result.relative_error < 1e-7


def test_subtract_is_exact_and_cancels_to_nothing():
    a, b = make_adapter(0), make_adapter(1)
    gap = subtract(a, b)
    for path, f in gap.factors.items():
        close(dense(f), dense(a.factors[path]) - dense(b.factors[path]), torch.float64)
    for method in ("sum", "concat"):
        assert combine([a, a], [1, -1], method=method).relative_error == 0.0
    nothing = subtract(a, a)
    assert all(f.rank == 1 and not (f.B @ f.A).any() for f in nothing.factors.values())


def test_a_small_difference_survives_subtraction():
    a, b = make_adapter(0, dtype=torch.float32), make_adapter(0, dtype=torch.float32)
    step = make_adapter(5, dtype=torch.float32)
    for path, f in b.factors.items():
        f.B += 1e-4 * step.factors[path].B
    for path, f in subtract(b, a).factors.items():
        expected = dense(b.factors[path]) - dense(a.factors[path])
        assert torch.linalg.matrix_norm(dense(f) - expected) < 1e-6 * torch.linalg.matrix_norm(expected)


def naive_ties(deltas: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    """The paper's three steps, element by element."""
    kept = []
    for w, d in zip(weights, deltas, strict=True):
        order = sorted(range(d.numel()), key=lambda k: -abs(d.flatten()[k].item()))
        flat = torch.zeros(d.numel(), dtype=d.dtype)
        for k in order[: round(density * d.numel())]:
            flat[k] = w * d.flatten()[k]
        kept.append(flat)
    out = torch.zeros(deltas[0].numel(), dtype=torch.float64)
    for k in range(out.numel()):
        values = [t[k].item() for t in kept]
        sign = (sum(values) > 0) - (sum(values) < 0)
        agreeing = [v for v in values if v * sign > 0]
        out[k] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out.view_as(deltas[0])


def test_ties_is_trim_elect_and_disjoint_mean():
    deltas = [dense(make_adapter(i).factors["layers.0.v"]) for i in range(3)]
    for weights in ([1.0, 1.0, 1.0], [0.5, 2.0, -1.0]):
        close(ties(deltas, weights=weights, density=0.3), naive_ties(deltas, weights, 0.3), torch.float64)


def test_ties_of_one_adapter_at_density_one_is_that_adapter():
    a = make_adapter(0)
    result = combine([a], method="ties", density=1.0)
    assert result.relative_error < 1e-12
    assert relative_error(a, result.adapter).overall < 1e-12


def test_trim_keeps_the_count_also_among_equals():
    assert trim(torch.ones(10, 10), 0.25).sum() == 25


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_elementwise_methods_state_the_error_of_their_truncation(method):
    adapters = [make_adapter(i) for i in range(2)]
    full = combine(adapters, method=method, rank=14, seed=3)
    assert full.relative_error < 1e-12
    small = combine(adapters, method=method, rank=2, seed=3)
    expected = relative_error(full.adapter, small.adapter).overall
    assert small.relative_error == pytest.approx(expected, rel=1e-9)
    assert expected > 0.01


def test_dare_drops_the_share_and_keeps_the_mean():
    ones = torch.ones(300, 300)
    kept = dare([ones], weights=[1.0], density=0.25, generators=[torch.Generator().manual_seed(0)])
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    # Share kept: standard deviation √(0.25·0.75/90000) = 0.0014; five of them.
    assert abs((kept > 0).double().mean().item() - 0.25) < 0.0072


def test_dare_follows_its_seed_and_each_adapter_drops_its_own():
    adapters = [make_adapter(0), make_adapter(0)]
    once, again, other = (combine(adapters, method="dare", seed=s).adapter.digest for s in (1, 1, 2))
    assert once == again != other
    both = combine(adapters, [1, -1], method="dare", seed=1).adapter
    assert all((f.B @ f.A).abs().max() > 0.1 for f in both.factors.values())


def test_nothing_draws_from_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    combine([make_adapter(0), make_adapter(1)], method="dare")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "1 weights for 2"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"method": "sums"}, 'Did you mean "sum"'),
        ({"method": "sum", "rank": 4}, 'method="svd"'),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"method": "svd", "density": 0.5}, "only ties and dare"),
        ({"method": "ties", "density": 0.0}, "above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        combine([make_adapter(0), make_adapter(1)], **options)


def test_no_adapters_and_biases_are_refused():
    with pytest.raises(ConfigError, match="no adapter"):
        combine([])
    a = make_adapter(0)
    a.biases["layers.0.q"] = torch.zeros(20)
    with pytest.raises(ConfigError, match=r"adapters\[1\] carry trained biases"):
        combine([make_adapter(1), a])


def test_shapes_of_other_bases_are_refused():
    other = make_adapter(1)
    other.factors["layers.0.q"] = Factors(torch.ones(2, 15), torch.ones(20, 2), 1.0)
    with pytest.raises(
        BaseMismatchError, match=r"layers.0.q: 20x14 in adapters\[0\], 20x15 in adapters\[1\]"
    ):
        combine([make_adapter(0), other])
