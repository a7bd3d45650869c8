"""A run is refused before its first step, or fitted to its budget by what changes no result."""

from __future__ import annotations

import json
import sys

import pytest

from lorasmith.bases import load_base
from lorasmith.cli.options import parse_bytes
from lorasmith.errors import BudgetError, ConfigError
from lorasmith.lora import LoRAConfig
from lorasmith.planning import machine
from lorasmith.train import TrainConfig, train
from tests.support.base import write_tiny_base

ROWS = [{"prompt": "say " + word * 60, "completion": word * 60} for word in ("ab", "cd", "ef", "gh")]
MIB = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(write_tiny_base(tmp_path_factory.mktemp("base")), dtype="fp32")


@pytest.fixture
def small_process(monkeypatch):
    """A process that holds nothing but the base, so that numbers depend on the run alone."""
    room, estimate = (sys.modules[f"lorasmith.{name}"] for name in ("train.preflight", "planning.estimate"))
    monkeypatch.setattr(room, "FLOOR_BYTES", 0)
    monkeypatch.setattr(room, "resident_bytes", lambda: 0)
    monkeypatch.setattr(estimate, "LATER_BYTES", 0)


def trained(base, out, **settings):
    config = TrainConfig(**{"batch_size": 4, "packing": "none", "batch_tokens": 2048} | settings)
    train(base, ROWS, LoRAConfig(rank=2), config, out=out, quiet=True)
    return json.loads((out / "run.json").read_text())["train"]


def test_a_budget_is_met_by_what_changes_no_result(base, tmp_path, small_process):
    seen = []
    for k in range(80):
        try:
            chosen = trained(base, tmp_path / str(k), budget_bytes=int(20 * MIB * 0.93**k))
        except BudgetError:
            assert not (tmp_path / str(k)).exists()
            break
        seen.append((chosen["recompute"], chosen["batch_tokens"]))
    assert seen[0] == ("none", 2048)
    assert seen[-1][0] == "layers"
    assert len(set(seen)) >= 3


def test_what_is_asked_for_is_kept_within_a_budget(base, tmp_path, small_process):
    chosen = trained(base, tmp_path / "run", budget_bytes=2**40, recompute="mlp")
    assert (chosen["recompute"], chosen["batch_tokens"]) == ("mlp", 2048)


def test_a_run_that_cannot_fit_the_container_is_refused(base, tmp_path, monkeypatch):
    left = (1000, "left under the cgroup limit of 1.0 GiB")
    monkeypatch.setattr(machine, "usable_memory", lambda: left)
    monkeypatch.setattr(machine, "resident_bytes", lambda anonymous=False: 0)
    with pytest.raises(BudgetError, match=r"(?s)needs about .* GiB.*cgroup limit.*--budget"):
        trained(base, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_plan_is_printed_before_the_first_step(base, tmp_path, capsys):
    train(base, ROWS, LoRAConfig(rank=2), TrainConfig(batch_size=4), out=tmp_path / "run")
    said = capsys.readouterr().err
    assert 0 < said.index("plan: predicted peak") < said.index("1/1")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 2**33),
        ("500MB", 5 * 10**8),
        ("1.5 gib", 3 * 2**29),
        ("2e9", 2 * 10**9),
        ("64K", 2**16),
        ("7", 7),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "8 gigs", "1.2.3M", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="8GiB"):
        parse_bytes(text)


def test_the_heap_is_trimmed_when_passes_differ_and_it_has_grown(base, tmp_path, monkeypatch):
    room, trims = sys.modules["lorasmith.train.loop"], []
    monkeypatch.setattr(room, "trim_heap", lambda: trims.append(1))
    monkeypatch.setattr(room, "resident_bytes", lambda: 2**60)
    rows = [{"text": word * length} for length in range(5, 17, 2) for word in ("ab", "cd")]
    for name, data in (("uneven", rows), ("even", rows[:2] * 6)):
        config = TrainConfig(batch_size=2, packing="none", shuffle=False)
        train(base, data, LoRAConfig(rank=2), config, out=tmp_path / name, quiet=True)
        assert len(trims) == 6
