"""check_coverage and check_values: every mismatch is a named problem."""

from __future__ import annotations

import json

import pytest
import torch

from lorasmith.formats import check_coverage, check_values, read_header, write_adapter
from lorasmith.lora import Adapter, Factors, LoRAConfig

NAMES = ("q_proj", "o_proj")
PATHS = [f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in NAMES]
BASE = {f"{p}.weight": (6, 4) for p in PATHS} | {
    "model.embed_tokens.weight": (9, 4),
    "model.norm.weight": (4,),
}


def header_of(tmp_path, config=None, paths=PATHS, shape=(6, 4), biases=None):
    config = config or LoRAConfig(rank=2, alpha=2, targets=NAMES)
    out, width = shape
    factors = {p: Factors(torch.ones(2, width), torch.ones(out, 2), config.scaling_of(p)) for p in paths}
    write_adapter(Adapter(config, factors, biases or {}), tmp_path / "a")
    return read_header(tmp_path / "a")


def kinds(coverage):
    return sorted({p.kind for p in coverage.problems})


@pytest.mark.parametrize("targets", ["all-linear", NAMES, r".*_proj"], ids=str)
def test_complete_coverage(tmp_path, targets):
    coverage = check_coverage(header_of(tmp_path, LoRAConfig(rank=2, alpha=2, targets=targets)), BASE)
    assert coverage.is_complete
    assert coverage.table == {n: {"0": (1, 1), "1": (1, 1)} for n in NAMES[::-1]}
    assert str(coverage).splitlines() == ["o_proj  2/2  complete", "q_proj  2/2  complete"]
    assert json.loads(json.dumps(coverage.to_dict()))["table"]["q_proj"] == {"0": [1, 1], "1": [1, 1]}


def test_target_that_matches_nothing(tmp_path):
    config = LoRAConfig(rank=2, alpha=2, targets=(*NAMES, "q_porj"))
    coverage = check_coverage(header_of(tmp_path, config), BASE)
    assert [(p.kind, p.module) for p in coverage.problems] == [("unmatched-target", "")]
    assert "q_porj" in coverage.problems[0].message


def test_targeted_module_without_factors(tmp_path):
    coverage = check_coverage(header_of(tmp_path, paths=PATHS[:-1]), BASE)
    assert [(p.kind, p.module) for p in coverage.problems] == [("missing-factors", PATHS[-1])]
    assert coverage.table["o_proj"] == {"0": (1, 1), "1": (0, 1)}
    assert "1/2  layers 1 lack some" in str(coverage)


def test_factors_of_another_base_name_the_nearest_module(tmp_path):
    renamed = {n.replace("model.", "model.language_model.", 1): s for n, s in BASE.items()}
    coverage = check_coverage(header_of(tmp_path), renamed)
    assert "not-in-base" in kinds(coverage)
    assert "the base has model.language_model.layers.0.self_attn.q_proj" in str(coverage)


def test_wrong_shape_names_both(tmp_path):
    base = BASE | {f"{PATHS[0]}.weight": (6, 8)}
    (problem,) = check_coverage(header_of(tmp_path), base).problems
    assert (problem.kind, problem.module) == ("wrong-shape", PATHS[0])
    assert "A (2, 4) and B (6, 2)" in problem.message
    assert "(6, 8)" in problem.message


def test_transposed_storage_is_recognised_as_a_whole_only(tmp_path):
    header = header_of(tmp_path)
    transposed = {n: s[::-1] for n, s in BASE.items()}
    assert check_coverage(header, transposed).is_complete
    mixed = transposed | {f"{PATHS[0]}.weight": (6, 4)}
    assert kinds(check_coverage(header, mixed)) == ["wrong-shape"]


def test_bias_without_a_place(tmp_path):
    header = header_of(tmp_path, biases={PATHS[0]: torch.ones(6)})
    assert kinds(check_coverage(header, BASE)) == ["wrong-bias"]
    assert check_coverage(header, BASE | {f"{PATHS[0]}.bias": (6,)}).is_complete


def adapter_with(B: float = 1.0, A: float = 1.0, scaling: float = 1.0) -> Adapter:
    return Adapter(
        LoRAConfig(), {p: Factors(torch.full((2, 4), A), torch.full((6, 2), B), scaling) for p in PATHS}
    )


def test_values_of_a_sound_adapter():
    assert check_values(adapter_with()) == []


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"B": 0.0}, "no-effect"),
        ({"A": 0.0}, "no-effect"),
        ({"B": float("nan")}, "non-finite"),
        ({"A": float("inf")}, "non-finite"),
        ({"scaling": 64.0}, "extreme-scaling"),
        ({"scaling": 1 / 64}, "extreme-scaling"),
    ],
    ids=str,
)
def test_values_that_are_off(values, kind):
    assert {p.kind for p in check_values(adapter_with(**values))} == {kind}


def test_single_idle_modules_are_listed():
    adapter = adapter_with()
    adapter.factors[PATHS[1]].B.zero_()
    assert [(p.kind, p.module) for p in check_values(adapter)] == [("zero-factors", PATHS[1])]
