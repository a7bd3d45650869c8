"""`lorasmith store` as a user runs it."""

from __future__ import annotations

import pytest

from lorasmith.formats import write_adapter
from lorasmith.inject import extract, inject
from lorasmith.lora import LoRAConfig
from tests.support.adapters import write_small
from tests.support.base import write_tiny_base
from tests.support.cli import answer, run
from tests.support.models import randomise, tiny_causal_lm


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [write_small(folder, seed) for seed in range(3)]


def test_the_story_of_one_adapter(adapters, tmp_path):
    at = ("--store", tmp_path / "store")
    first = answer("store", "add", adapters[0], *at, "--name", "support")
    assert (first["version"], first["aliases"]) == (1, ["support"])
    second = answer("store", "add", adapters[1], *at, "--name", "support", "--canary", 0.1)
    assert (second["version"], second["aliases"]) == (2, [])
    assert answer("store", "show", "support", *at)["digest"] == first["digest"]
    assert answer("store", "canary", "support", 2, 0.5, *at)["canary"] == {"version": 2, "share": 0.5}
    moved = answer("store", "alias", "support", "support@2", *at)
    assert (moved["digest"], moved["version"], moved["aliases"]) == (second["digest"], 2, ["support"])
    assert answer("store", "rollback", "support", *at)["version"] == 1
    listed = answer("store", "list", *at)["adapters"]
    assert [(v["version"], v["aliases"]) for v in listed] == [(1, ["support"]), (2, [])]
    assert run("store", "remove", "support@1", *at).exit_code == 2
    gone = answer("store", "remove", "support@2", *at)
    assert (gone["version"], gone["digest"]) == (2, second["digest"])
    assert [e["action"] for e in answer("store", "audit", *at)["entries"]][:2] == ["collect", "remove"]
    assert answer("store", "gc", *at) == {"freed": []}
    for command in (("list",), ("show", "support"), ("audit",), ("gc",)):
        assert run("store", *command, *at).exit_code == 0


def test_with_a_base_an_adapter_of_another_is_refused(tmp_path):
    base = write_tiny_base(tmp_path / "base")
    model = tiny_causal_lm("llama", hidden_size=16, vocab_size=258)
    inject(model, LoRAConfig(rank=2), seed=0)
    write_adapter(randomise(extract(model)), tmp_path / "narrow")
    result = run(
        "store", "add", tmp_path / "narrow", "--store", tmp_path / "s", "--name", "x", "--base", base
    )
    assert result.exit_code == 2
    assert "wrong-shape" in result.stderr
    assert not list((tmp_path / "s" / "objects").iterdir())
    model = tiny_causal_lm("llama", vocab_size=258)
    inject(model, LoRAConfig(rank=2), seed=0)
    write_adapter(randomise(extract(model)), tmp_path / "fits")
    added = answer(
        "store", "add", tmp_path / "fits", "--store", tmp_path / "s", "--name", "x", "--base", base
    )
    assert added["checked_against"] == str(base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list",), "is no store"),
        (("show", "nobody"), "is no store"),
        (("add", "nowhere", "--name", "a"), "does not exist"),
        (("add", "nowhere", "--name", "../a"), "cannot be used"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(arguments, message, tmp_path):
    result = run("store", *arguments, "--store", tmp_path / "store")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.glob("store/objects/*"))
