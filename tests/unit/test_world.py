"""What processes share out among themselves, seen from one; real ones are in tests/e2e/test_torchrun.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from lorasmith.errors import ConfigError, OutputError, TrainingError
from lorasmith.inject import inject
from lorasmith.lora import LoRAConfig
from lorasmith.planning import decoder_of
from lorasmith.planning.activations import Trained
from lorasmith.planning.estimate import GATHERED_LAYERS, Job, trained_here, weights_here
from lorasmith.sweep import parse_grid, points
from lorasmith.sweep.spread import names_of
from lorasmith.train import ALONE, Forward, World, is_first_to_say, partners, world
from lorasmith.train.checkpoint import load_checkpoint, save_checkpoint
from lorasmith.train.checkpoint_shards import in_shards, load_shards, save_shards
from lorasmith.train.shard import shard_model
from lorasmith.train.shares import blank, deal, in_step
from tests.support.cli import answer
from tests.support.cli import run as command
from tests.support.models import tiny_causal_lm
from tests.unit.test_train import RECORDS, Progress, changed, examples_of, run

EXAMPLES = examples_of(RECORDS + [{"prompt": "long " * k, "completion": " end"} for k in range(1, 12)])


@pytest.mark.parametrize("packing", ["none", "tree"])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_step_is_dealt_out_whole_and_about_evenly(packing, size):
    indices = list(range(len(EXAMPLES)))[::-1]
    lists = deal(EXAMPLES, indices, size, packing=packing)
    assert len(lists) == size
    assert all(lists)
    assert sorted(i for one in lists for i in one) == sorted(indices)
    if packing == "none":
        tokens = [sum(len(EXAMPLES[i]) for i in one) for one in lists]
        assert max(tokens) - min(tokens) <= max(map(len, EXAMPLES))


@pytest.mark.parametrize("packing", ["none", "tree"])
def test_of_fewer_sequences_than_processes_each_has_one_place(packing):
    lists = deal(EXAMPLES, [4, 1], 4, packing=packing)
    assert sorted(map(len, lists)) == [0, 0, 1, 1]


def test_sequences_that_share_a_beginning_stay_together():
    records = [{"prompt": text * 20, "completion": f" {i}"} for i in range(3) for text in "ab"]
    examples = examples_of(records)
    assert [{i % 2 for i in one} for one in deal(examples, range(6), 2, packing="tree")] == [{0}, {1}]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_blank_pass_adds_nothing(family):
    model = tiny_causal_lm(family).requires_grad_(False)
    inject(model, LoRAConfig(rank=2, alpha=4), seed=0)
    loss = Forward(model).loss_sum(blank())
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


def test_alone_nobody_is_asked():
    assert in_step([], ALONE) == []
    p = torch.nn.Parameter(torch.ones(2))
    assert ALONE.reduce_([p], 1.5) == [1.5]
    assert p.grad is None
    assert (ALONE.total(2.0), ALONE.most(3), ALONE.gather("x"), ALONE.of_first(4)) == ([2.0], 3, ["x"], 4)
    assert ALONE.any(True)
    assert not ALONE.any(False)
    before = torch.get_rng_state()
    ALONE.seed(0, 1)
    assert torch.equal(before, torch.get_rng_state())
    with world() as here:
        assert here == ALONE
    assert is_first_to_say("x")


def test_processes_that_see_different_things_are_told_in_what(monkeypatch):
    monkeypatch.setattr(World, "gather", lambda self, value: [value, value | {"data": "b"}])
    with pytest.raises(ConfigError, match="data: 'a' in process 0, 'b' in process 1") as caught:
        World(size=2).require_same({"data": "a", "base": "c"})
    assert "base" not in str(caught.value)


def test_processes_whose_parameters_part_are_stopped(monkeypatch):
    monkeypatch.setattr(World, "gather", lambda self, value: [value, [value[0] + 1]])
    with pytest.raises(TrainingError, match=r"processes \[1\]"):
        World(size=2).require_equal([torch.ones(3)])


def test_a_lost_partner_is_put_in_words_and_nothing_else_is():
    with pytest.raises(TrainingError, match="Another process"), partners():
        raise RuntimeError("[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shape"), partners():
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(
    ("shard", "method", "words"),
    [
        ("base", "lora", "there is one"),
        ("all", "full", "there is one"),
        ("base", "full", "method="),
        ("all", "prefix", "method="),
        ("some", "lora", "none, base, all"),
    ],
)
def test_weights_are_sharded_only_where_there_are_others_and_the_method_can(tmp_path, shard, method, words):
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "run", settings=changed(shard=shard, method=method))
    assert not (tmp_path / "run").exists()


def test_weights_are_not_sharded_twice_nor_offloaded_as_well(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="leave one of them out"):
        run(tmp_path / "run", settings=changed(shard="all", offload="weights"))
    monkeypatch.setattr(sys.modules["lorasmith.train.shard"], "is_sharded", lambda model: True)
    with pytest.raises(ConfigError, match="load it again"):
        shard_model(torch.nn.Linear(2, 2), World(size=2), "base")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_in_parts_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match=r"Error: "):
        save_shards(tmp_path / "taken", {"a": torch.ones(2)})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_one_process_wrote_in_parts_comes_back(tmp_path):
    tensors = {"param/a": torch.arange(6.0).reshape(3, 2), "step/a": torch.tensor(3.0)}
    save_shards(tmp_path / "made", tensors)
    assert in_shards(tmp_path / "made")
    room = {name: torch.zeros_like(t) for name, t in tensors.items()} | {"exp_avg/a": torch.zeros(3, 2)}
    found = load_shards(tmp_path / "made", room)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
    with pytest.raises(ValueError, match=r"Size mismatch.*param/a"):
        load_shards(tmp_path / "made", {"param/a": torch.zeros(2, 2)})


def test_a_checkpoint_goes_on_with_other_processes_but_not_with_other_data(tmp_path):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p])
    identity = {"data": "a", "threads": 1, "processes": 2}
    path = save_checkpoint(tmp_path, Progress(step=3, identity=identity), {"p": p}, optimizer)
    for now in ({"data": "a", "threads": 2}, {"data": "a", "threads": 1, "processes": 4}):
        assert load_checkpoint(path, now, {"p": p}, optimizer).step == 3
    for now in ({"data": "b", "threads": 2}, {"data": "a", "threads": 2, "processes": 2}):
        with pytest.raises(TrainingError, match="belongs to another run"):
            load_checkpoint(path, now, {"p": p}, optimizer)


def test_the_weights_of_a_sharded_base_are_planned():
    decoder = decoder_of(tiny_causal_lm("llama"))
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    assert (decoder.layer_params, decoder.largest_layer_params) == (2 * layer, layer)
    job = Job(decoder, Trained({}), [], 1)
    assert weights_here(job) == decoder.params * 4
    spread = 2 * layer + decoder.untied_embeddings
    for n in (2, 4):
        gathered = max(GATHERED_LAYERS * layer, decoder.untied_embeddings)
        assert weights_here(replace(job, sharded_over=n)) == 4 * (
            decoder.params - spread + spread // n + gathered
        )


def test_what_trains_in_parts_is_planned():
    decoder = decoder_of(tiny_causal_lm("llama"))
    job = Job(decoder, Trained(None), [], 1, sharded_over=4, spreads_trained=True)
    inside = decoder.layer_params + decoder.untied_embeddings
    assert trained_here(job) == decoder.params - inside + -(-inside // 4)
    assert trained_here(replace(job, spreads_trained=False)) == decoder.params
    ranks = dict.fromkeys(decoder.linears, 2)
    numbers = Trained(ranks).params(decoder)
    assert trained_here(replace(job, trained=Trained(ranks, 100))) == 100 + -(-numbers // 4)


def test_plan_says_what_one_of_several_processes_needs(tmp_path):
    from tests.support.base import write_tiny_base

    (data := tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    # many layers, so that the few that are gathered count for little
    base = write_tiny_base(tmp_path / "tiny", num_hidden_layers=24)
    given = ("plan", "--base", base, "--data", data, "--packing", "none")
    alone, whole = answer(*given), answer(*given, "--processes", 4)
    parts = answer(*given, "--processes", 4, "--shard", "base")
    assert whole["lora"]["activation_bytes"] < alone["lora"]["activation_bytes"]
    assert parts["lora"]["weights_bytes"] < 0.5 * whole["lora"]["weights_bytes"]
    assert parts["full"]["weights_bytes"] == whole["full"]["weights_bytes"] == alone["full"]["weights_bytes"]
    all_parts = answer(*given, "--processes", 4, "--shard", "all")
    assert all_parts["full"]["weights_bytes"] < 0.5 * whole["full"]["weights_bytes"]
    assert all_parts["full"]["optimizer_bytes"] < 0.5 * whole["full"]["optimizer_bytes"]
    assert all_parts["full"]["checkpoint_bytes"] == whole["full"]["checkpoint_bytes"]
    assert command(*given, "--processes", 2, "--measure").exit_code == 2


def test_runs_with_the_same_rows_stay_in_one_process():
    made = points(parse_grid("lr=1e-3,2e-3;seed=0,1"))
    names = [names_of(made, World(rank=k, size=2)) for k in range(2)]
    assert [{name[-1] for name in own} for own in names] == [{"0"}, {"1"}]
    assert names[0] | names[1] == {p.name for p in made}
    with pytest.raises(ConfigError, match="at most 4 processes"):
        names_of(made, World(rank=0, size=5))
    with pytest.raises(ConfigError, match="shard"):
        points(parse_grid("lr=1e-3"), {}, {"shard": "base"})
