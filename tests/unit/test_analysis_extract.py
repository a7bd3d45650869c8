"""LoRA out of a full fine-tune: exact at full rank, optimal below, and open about what it leaves out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lorasmith.analysis import extract_from_full, looks_linear, open_tensors
from lorasmith.analysis.dense import best_factors, residual_norm, top_svd
from lorasmith.errors import BaseMismatchError, BaseNotFoundError, ConfigError
from lorasmith.lora import Factors
from tests.support.tolerance import close


def dense(f: Factors) -> torch.Tensor:
    return f.scaling * (f.B.double() @ f.A.double())


def make_models(dtype=torch.float32) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (30, 12),
        "model.layers.0.q_proj.weight": (12, 12),
        "model.layers.0.up_proj.weight": (20, 12),
        "model.layers.0.still.weight": (6, 12),
        "model.layers.0.up_proj.bias": (20,),
        "model.norm.weight": (12,),
        "lm_head.weight": (30, 12),
    }
    base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    tuned = {name: (t + 0.1 * torch.randn(t.shape, generator=g)).to(dtype) for name, t in base.items()}
    tuned["model.layers.0.still.weight"] = base["model.layers.0.still.weight"].clone()
    return base, tuned


LINEAR = ["model.layers.0.q_proj", "model.layers.0.up_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_is_exact(dtype):
    base, tuned = make_models(dtype)
    adapter, errors = extract_from_full(base, tuned, rank=64)
    assert sorted(adapter.factors) == LINEAR
    for path, f in adapter.factors.items():
        assert f.rank == 12
        D = tuned[f"{path}.weight"].double() - base[f"{path}.weight"].double()
        close(dense(f), D, torch.float32)
        assert adapter.config.scaling_of(path) == f.scaling == 1.0
    assert errors.relative_error < 1e-6
    assert all(e < 1e-6 for e in errors.modules.values())


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_the_dense_tail(rank):
    base, tuned = make_models()
    adapter, errors = extract_from_full(base, tuned, rank=rank)
    tails, norms = 0.0, 0.0
    for path, error in errors.modules.items():
        S = torch.linalg.svdvals(tuned[f"{path}.weight"].double() - base[f"{path}.weight"].double())
        assert error == pytest.approx((S[rank:].norm() / S.norm()).item(), rel=1e-4)
        tails, norms = tails + S[rank:].norm().item() ** 2, norms + S.norm().item() ** 2
    assert errors.relative_error == pytest.approx((tails / norms) ** 0.5, rel=1e-4)
    assert adapter.config.rank == rank


def test_energy_takes_the_least_rank_in_each_module():
    base, tuned = make_models()
    adapter, errors = extract_from_full(base, tuned, energy=0.8)
    for path, f in adapter.factors.items():
        S2 = torch.linalg.svdvals(tuned[f"{path}.weight"].double() - base[f"{path}.weight"].double()) ** 2
        share = S2.cumsum(0) / S2.sum()
        assert share[f.rank - 1] >= 0.8 > share[f.rank - 2]
        assert adapter.config.rank_of(path) == f.rank
        assert errors.modules[path] == pytest.approx((1 - share[f.rank - 1]).sqrt().item(), rel=1e-4)


def test_what_changed_and_is_not_in_the_adapter_is_said():
    base, tuned = make_models()
    tuned["model.extra.weight"] = torch.ones(2, 2)
    base["model.gone.weight"] = torch.ones(2, 2)
    base["model.resized.weight"], tuned["model.resized.weight"] = torch.ones(4, 2), torch.ones(5, 2)
    _, errors = extract_from_full(base, tuned, rank=64)
    assert errors.not_captured == {
        "lm_head.weight": "its module is not selected",
        "model.embed_tokens.weight": "its module is not selected",
        "model.extra.weight": "it is only in the tuned model",
        "model.gone.weight": "it is only in the base",
        "model.layers.0.up_proj.bias": "it is no module's weight",
        "model.norm.weight": "it has 1 dimension(s), not 2",
        "model.resized.weight": "its shape changed from (4, 2) to (5, 2)",
    }
    energy = {
        n: (tuned[n] - t).double().norm().item() ** 2
        for n, t in base.items()
        if "model.g" not in n and "resized" not in n
    }
    held = sum(energy[f"{path}.weight"] for path in LINEAR)
    assert errors.captured == pytest.approx(held / sum(energy.values()), rel=1e-5)


def test_select_decides():
    base, tuned = make_models()
    adapter, errors = extract_from_full(base, tuned, rank=4, select=lambda path: path == "lm_head")
    assert list(adapter.factors) == ["lm_head"]
    assert "model.layers.0.q_proj.weight" in errors.not_captured


def test_names_that_are_no_linear_layer():
    assert looks_linear("model.layers.3.mlp.down_proj")
    for path in ("model.embed_tokens", "transformer.wte", "lm_head", "gpt_neox.embed_in", "score"):
        assert not looks_linear(path)


def test_weights_stored_in_by_out():
    base, tuned = make_models()
    path = "model.layers.0.up_proj"
    plain, _ = extract_from_full(base, tuned, rank=5)
    base[f"{path}.weight"], tuned[f"{path}.weight"] = base[f"{path}.weight"].T, tuned[f"{path}.weight"].T
    flipped, errors = extract_from_full(base, tuned, rank=5, transposed={path})
    close(dense(flipped.factors[path]), dense(plain.factors[path]), torch.float32)
    assert flipped.factors[path].in_features == 12
    assert errors.modules[path] < 1


def test_faults():
    base, tuned = make_models()
    with pytest.raises(ConfigError, match="nothing to extract"):
        extract_from_full(base, base, rank=2)
    with pytest.raises(ConfigError, match=r"these changed, but:\n  lm_head"):
        extract_from_full(base, tuned, rank=2, select=lambda path: False)
    with pytest.raises(ConfigError, match="exactly one"):
        extract_from_full(base, tuned)
    with pytest.raises(BaseMismatchError, match="no tensor name"):
        extract_from_full(base, {"x": torch.ones(1)}, rank=2)
    tuned["model.norm.weight"][0] = float("nan")
    with pytest.raises(BaseMismatchError, match=r"model.norm.weight holds NaN"):
        extract_from_full(base, tuned, rank=2)


def test_only_one_tensor_of_each_model_is_asked_for_at_a_time():
    base, tuned = make_models()
    log = []

    def lazily(which, tensors):
        return {n: (lambda n=n: (log.append((which, n)), tensors[n])[1]) for n in tensors}

    extract_from_full(lazily("base", base), lazily("tuned", tuned), rank=2)
    assert log == [(which, name) for name in sorted(base) for which in ("base", "tuned")]


# --- reading directories ---------------------------------------------------------------------------


def save_sharded(directory, tensors, shards=3):
    directory.mkdir()
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i}.safetensors"
        part = {n: tensors[n].contiguous() for n in names[i::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_directories_give_what_the_mappings_give(tmp_path):
    base, tuned = make_models()
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    save_sharded(tmp_path / "tuned", tuned)
    lazy_base, lazy_tuned = open_tensors(tmp_path / "base"), open_tensors(tmp_path / "tuned")
    assert all(torch.equal(lazy_tuned[n](), t) for n, t in tuned.items())
    from_files, errors = extract_from_full(lazy_base, lazy_tuned, rank=3)
    from_memory, same = extract_from_full(base, tuned, rank=3)
    assert from_files.digest == from_memory.digest
    assert errors == same


def test_directories_that_cannot_be_read(tmp_path):
    with pytest.raises(BaseNotFoundError, match=r"no \*.safetensors"):
        open_tensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(BaseNotFoundError, match="two files hold 'a'"):
        open_tensors(tmp_path)
    (tmp_path / "y.safetensors").write_bytes(b"\0" * 3)
    with pytest.raises(BaseNotFoundError, match="cannot be read"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "outside its directory"),
        ({"weight_map": {"a": "gone.safetensors"}}, "cannot be read"),
        ({"weight_map": {"b": "x.safetensors"}}, "promises b"),
        ({"weight_map": 3}, "not a safetensors index"),
        ([], "not a safetensors index"),
    ],
)
def test_hostile_indexes_are_refused(tmp_path, index, message):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseNotFoundError, match=message):
        open_tensors(tmp_path)


# --- the randomised SVD of wide matrices -----------------------------------------------------------


def spiked(out: int, inn: int, decay: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    k = min(out, inn)
    U = torch.linalg.qr(torch.randn(out, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(inn, k, generator=g, dtype=torch.float64)).Q
    return ((U * decay ** torch.arange(k)) @ V.T).float()


def test_the_randomised_svd_finds_a_decaying_spectrum():
    M = spiked(150, 120, 0.9)
    S = top_svd(M, 10, exact_limit=0)[1]
    close(S, torch.linalg.svdvals(M.double())[:10], torch.float32)


def test_the_randomised_residual_is_near_the_optimum_also_for_a_flat_spectrum():
    M = torch.randn(200, 160, generator=torch.Generator().manual_seed(0))
    f = best_factors(M, rank=16, dtype=torch.float32, exact_limit=0)
    optimum = torch.linalg.svdvals(M.double())[16:].norm().item()
    measured = (M.double() - dense(f)).norm().item()
    assert residual_norm(M, f) == pytest.approx(measured, rel=1e-5)
    assert optimum <= measured <= 1.01 * optimum


def test_the_randomised_energy_cut_widens_until_it_has_enough():
    M = spiked(400, 400, 0.985)
    share = torch.linalg.svdvals(M.double()) ** 2
    share = share.cumsum(0) / share.sum()
    for energy in (0.5, 0.95, 1.0):
        f = best_factors(M, rank=None, energy=energy, dtype=torch.float32, exact_limit=0)
        assert share[f.rank - 1] >= energy - 1e-6
        assert share[max(f.rank - 3, 0)] < energy or f.rank < 3


def test_the_randomised_path_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (top_svd(spiked(90, 80, 0.9), 4, exact_limit=0)[1] for _ in "ab")
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
