"""Write, read, write: the same bytes, the same function, at once or not at all."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasmith.errors import AdapterFileError, OutputError
from lorasmith.formats import read_adapter, read_header, write_adapter
from lorasmith.lora import Adapter, Factors, LoRAConfig

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def factors_of(
    rank: int, scaling: float, *, width: int = 4, out: int = 6, dtype=torch.float32, seed: int = 0
):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, width, generator=g).to(dtype)
    return Factors(A, torch.randn(out, rank, generator=g).to(dtype), scaling)


def adapter_of(config: LoRAConfig, *paths: str, **keywords) -> Adapter:
    return Adapter(
        config, {p: factors_of(config.rank_of(p), config.scaling_of(p), **keywords) for p in paths}
    )


def settings_of(folder: Path):
    return json.loads((folder / "adapter_config.json").read_text())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_same(a: Adapter, b: Adapter) -> None:
    assert a.digest == b.digest
    assert a.factors.keys() == b.factors.keys()
    assert all(torch.equal(t, b.tensors()[n]) for n, t in a.tensors().items())


def peft_rule(values, path: str) -> tuple[int, float]:
    """PEFT's own lines (0.21.2, `get_pattern_key`), as the oracle."""

    def first(patterns, default):
        hits = [v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)]
        return hits[0] if hits else default

    rank = first(values["rank_pattern"], values["r"])
    alpha = first(values["alpha_pattern"], values["lora_alpha"])
    return rank, alpha / (rank**0.5 if values["use_rslora"] else rank)


names = st.from_regex(r"\A[a-z_][a-z0-9_\-]{0,6}\Z")
paths = st.lists(names | st.integers(0, 30).map(str), min_size=1, max_size=4).map(".".join)


@st.composite
def adapters(draw) -> Adapter:
    chosen = draw(st.lists(paths, min_size=1, max_size=6, unique=True))
    config = LoRAConfig(
        rank=draw(st.integers(1, 5)),
        alpha=draw(st.sampled_from([1, 2.5, 16, 32])),
        targets=draw(st.sampled_from(["all-linear", ("q_proj",), tuple(chosen), ".*"])),
        exclude=draw(st.sampled_from([(), ("other",)])),
        layers=draw(st.none() | st.just((0, 3))),
        rslora=draw(st.booleans()),
        init=draw(st.sampled_from(["normal", "uniform"])),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        bias=draw(st.sampled_from(["none", "lora_only", "all"])),
    )
    factors = {}
    for seed, path in enumerate(chosen):
        rank = draw(st.just(config.rank) | st.integers(1, 5))
        alpha = draw(st.just(config.alpha) | st.sampled_from([0.5, 3, 64, 0.1]))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        factors[path] = factors_of(
            rank, alpha / (rank**0.5 if config.rslora else rank), dtype=dtype, seed=seed
        )
    biases = {p: torch.randn(6) for p in draw(st.lists(st.sampled_from([*chosen, "norm"]), unique=True))}
    if "norm" in chosen:
        biases.pop("norm", None)
    return Adapter(config, factors, biases, draw(st.sampled_from([{}, {"data": {"lines": 3}}])))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters())
def test_round_trip_of_any_adapter(tmp_path, adapter):
    write_adapter(adapter, tmp_path / "a")
    back = read_adapter(tmp_path / "a")
    assert_same(adapter, back)
    assert back.provenance == adapter.provenance
    write_adapter(back, tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    for path, f in adapter.factors.items():
        assert peft_rule(settings_of(tmp_path / "a"), path) == (f.rank, f.scaling)


def test_config_survives_where_it_is_true(tmp_path):
    config = LoRAConfig(
        rank=3,
        alpha=6,
        targets=("k_proj", "q_proj"),
        exclude=("lm_head",),
        layers=(0,),
        rank_pattern={"q_proj": 2},
        rslora=True,
        init="uniform",
        dropout=0.1,
        bias="all",
    )
    write_adapter(adapter_of(config, Q, K), tmp_path / "a")
    assert read_adapter(tmp_path / "a").config == config


def test_all_linear_becomes_the_names_that_every_reader_knows(tmp_path):
    write_adapter(adapter_of(LoRAConfig(rank=2), Q, K), tmp_path / "a")
    assert settings_of(tmp_path / "a")["target_modules"] == ["k_proj", "q_proj"]


@pytest.mark.parametrize(
    "change",
    [{"layers": (0,)}, {"exclude": ("x",)}, {"targets": ("v_proj",)}, {"targets": ".*q_proj"}],
    ids=str,
)
def test_targets_are_named_one_by_one_where_the_config_would_not_select_them(tmp_path, change):
    write_adapter(adapter_of(LoRAConfig(rank=2, **change), Q, K), tmp_path / "a")
    values = settings_of(tmp_path / "a")
    assert (values["target_modules"], values["layers_to_transform"]) == (sorted([Q, K]), None)
    assert "exclude_modules" not in values


def test_patterns_come_from_the_factors_not_from_the_config(tmp_path):
    inner, outer = "block.q", "model.block.q"  # one path ends the other
    adapter = Adapter(
        LoRAConfig(rank=8, alpha=8),
        {inner: factors_of(2, 3.0), outer: factors_of(3, 5.0), "v": factors_of(8, 1.0)},
    )
    write_adapter(adapter, tmp_path / "a")
    values = settings_of(tmp_path / "a")
    assert {p: peft_rule(values, p) for p in adapter.factors} == {
        inner: (2, 3.0),
        outer: (3, 5.0),
        "v": (8, 1.0),
    }
    assert (values["r"], values["lora_alpha"]) == (8, 8)


def test_patterns_that_depend_on_their_order_are_rewritten(tmp_path):
    config = LoRAConfig(rank=4, alpha=4, rank_pattern={r"self_attn\.q_proj": 2, ".*": 1})
    adapter = adapter_of(config, Q, K)  # sorted, ".*" would come first and give q_proj rank 1
    write_adapter(adapter, tmp_path / "a")
    assert_same(adapter, read_adapter(tmp_path / "a"))


def test_scaling_that_no_alpha_gives_moves_by_one_ulp_at_most(tmp_path):
    scalings = {f"m{i}": 1.0 + i * 2**-52 for i in range(40)}
    adapter = Adapter(LoRAConfig(rank=3), {p: factors_of(3, s) for p, s in scalings.items()})
    write_adapter(adapter, tmp_path / "a")
    back = read_adapter(tmp_path / "a")
    assert all(abs(f.scaling - scalings[p]) <= 2**-52 for p, f in back.factors.items())


def test_names_and_metadata_are_pefts(tmp_path):
    adapter = adapter_of(LoRAConfig(rank=2), Q)
    adapter.biases = {Q: torch.ones(6), "model.norm": torch.ones(4)}
    write_adapter(adapter, tmp_path / "a")
    raw = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    prefix = "base_model.model."
    assert sorted(header) == sorted(
        [
            f"{prefix}{Q}.lora_A.weight",
            f"{prefix}{Q}.lora_B.weight",
            f"{prefix}{Q}.base_layer.bias",
            f"{prefix}model.norm.bias",
        ]
    )
    assert settings_of(tmp_path / "a")["bias"] == "all"


def test_dtype_casts_on_disk_and_leaves_the_adapter_alone(tmp_path):
    adapter = adapter_of(LoRAConfig(rank=2), Q)
    write_adapter(adapter, tmp_path / "a", dtype=torch.bfloat16)
    back = read_adapter(tmp_path / "a")
    assert back.factors[Q].A.dtype == torch.bfloat16
    assert torch.equal(back.factors[Q].A, adapter.factors[Q].A.bfloat16())
    assert adapter.factors[Q].A.dtype == torch.float32


def test_views_and_shared_memory_are_written_as_values(tmp_path):
    A, B = torch.randn(4, 2).T, torch.randn(6, 4)[:, ::2]
    adapter = Adapter(LoRAConfig(rank=2, alpha=2), {p: Factors(A, B, 1.0) for p in (Q, K)})
    write_adapter(adapter, tmp_path / "a")
    assert_same(adapter, read_adapter(tmp_path / "a"))


def test_read_factors_can_be_edited_in_place(tmp_path):
    write_adapter(adapter_of(LoRAConfig(rank=2), Q, K), tmp_path / "a")
    before, after = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "a")
    after.factors[Q].B.zero_()
    assert torch.equal(before.factors[K].B, after.factors[K].B)
    assert before.digest == read_adapter(tmp_path / "a").digest


def test_base_name_is_kept_when_written_again(tmp_path):
    write_adapter(adapter_of(LoRAConfig(rank=2), Q), tmp_path / "a", base_name="some/base")
    assert read_header(tmp_path / "a").base_name == "some/base"
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_changed_weights_are_noticed(tmp_path):
    write_adapter(adapter_of(LoRAConfig(rank=2), Q), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match="changed after they were written"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / "lorasmith.json").unlink()
    assert read_adapter(tmp_path / "a").provenance == {}


def test_header_agrees_with_the_adapter_and_takes_milliseconds(tmp_path):
    paths = [
        f"model.layers.{i}.mlp.{n}" for i in range(40) for n in ("up", "down", "gate", "q", "k", "v", "o")
    ]
    adapter = Adapter(
        LoRAConfig(rank=2, alpha=2), {p: factors_of(1 + i % 7, 1.0, seed=i) for i, p in enumerate(paths)}
    )
    write_adapter(adapter, tmp_path / "a")
    start = time.process_time()
    header = read_header(tmp_path / "a")
    assert time.process_time() - start < 0.5  # milliseconds; this only catches quadratic pattern matching
    assert {p: (m.rank, m.scaling) for p, m in header.modules.items()} == {
        p: (f.rank, f.scaling) for p, f in adapter.factors.items()
    }
    assert header.content_digest == adapter.digest


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a: a.factors.clear(), "no factors"),
        (lambda a: a.factors[Q].A.fill_(float("nan")), "not finite"),
        (lambda a: setattr(a.factors[Q], "scaling", -1.0), "must be positive"),
        (lambda a: a.factors.update({"a/b": factors_of(2, 1.0)}), "slashes"),
        (lambda a: a.biases.update({Q: torch.ones(3)}), "the bias has shape"),
        (lambda a: setattr(a, "provenance", {"x": {1, 2}}), "as JSON"),
    ],
    ids=["empty", "nan", "negative", "path", "bias", "provenance"],
)
def test_what_nobody_could_read_is_not_written(tmp_path, spoil, reason):
    adapter = adapter_of(LoRAConfig(rank=2), Q)
    write_adapter(adapter, tmp_path / "a")
    before = bytes_of(tmp_path / "a")
    spoil(adapter)
    with pytest.raises(AdapterFileError, match=reason):
        write_adapter(adapter, tmp_path / "a")
    assert bytes_of(tmp_path / "a") == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_adapter_is_replaced_and_nothing_is_left_behind(tmp_path):
    write_adapter(adapter_of(LoRAConfig(rank=2), Q), tmp_path / "a")
    second = adapter_of(LoRAConfig(rank=3), K)
    write_adapter(second, tmp_path / "a")
    assert_same(second, read_adapter(tmp_path / "a"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_rename_loses_nothing(tmp_path, monkeypatch, failing):
    first = adapter_of(LoRAConfig(rank=2), Q)
    write_adapter(first, tmp_path / "a")
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="No space left"):
        write_adapter(adapter_of(LoRAConfig(rank=3), K), tmp_path / "a")
    assert_same(first, read_adapter(tmp_path / "a"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_directory_with_other_things_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        write_adapter(adapter_of(LoRAConfig(rank=2), Q), tmp_path / "a")
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_unwritable_places(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_adapter(adapter_of(LoRAConfig(rank=2), Q), tmp_path / place)
