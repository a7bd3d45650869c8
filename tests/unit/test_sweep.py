"""Every run of a sweep is the run that `train` makes alone; a killed sweep goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.data import Row, read_records
from lorasmith.errors import ConfigError, DataError, OutputError, TargetError, TrainingError
from lorasmith.formats import read_adapter
from lorasmith.inject import Bank
from lorasmith.sweep import Halving, parse_grid, points, sweep
from lorasmith.sweep.held_out import hold_out
from lorasmith.sweep.member import Member
from lorasmith.sweep.outputs import cells, plot_sweep, ranked
from lorasmith.sweep.passes import Unit, joint_passes
from lorasmith.train import read_metrics, train
from tests.support.models import bits, same_bits
from tests.support.tolerance import close
from tests.unit.test_train import FakeBase, base, losses, weights

RECORDS = [
    {"prompt": f"{c}{c} is" + "!" * i, "completion": f" {c.upper()}{i}."} for i, c in enumerate("abcdefgh")
]
HELD_OUT = [{"prompt": f"{c}{c} is", "completion": f" {c.upper()}?"} for c in "abc"]
LORA = {"alpha": 8}
TRAIN = {"batch_size": 4, "epochs": 4, "save_every": 2, "eval_every": 4, "lr": 0.02, "seed": 3}  # 8 steps


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    monkeypatch.setattr(sys.modules["lorasmith.train.loop"], "plot_loss", lambda *_: None)
    if "plot" not in request.node.name:
        monkeypatch.setattr(sys.modules["lorasmith.sweep.sweep"], "plot_sweep", lambda *_: None)


def run(out: Path, grid: str, *, given: FakeBase | None = None, **options: Any):
    lora, settings = LORA | options.pop("lora", {}), TRAIN | options.pop("train", {})
    options = {"data": RECORDS, "eval_data": HELD_OUT, "quiet": True} | options
    data = options.pop("data")
    return sweep(given or base(), data, points(parse_grid(grid), lora, settings), out=out, **options)


def alone(out: Path, grid: str, *, given: FakeBase | None = None, **options: Any) -> dict[str, Path]:
    """The same runs through `train`, one by one."""
    lora, settings = LORA | options.get("lora", {}), TRAIN | options.get("train", {})
    folders = {}
    for point in points(parse_grid(grid), lora, settings):
        folders[point.name] = out / "alone" / point.name
        own = given or base()
        options = {"eval_data": HELD_OUT, "quiet": True}
        train(own, RECORDS, point.lora, point.train, out=folders[point.name], **options)
    return folders


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read_adapter(folder / "adapter").tensors()


def without_times(folder: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_s", "step_s", "peak_rss_bytes")
    return [
        {k: v for k, v in row.items() if k not in timed} for row in read_metrics(folder / "metrics.jsonl")
    ]


# ------------------------------------------------------------------ each run is its run alone


def test_runs_of_one_data_order_are_their_runs_alone_to_the_bit(tmp_path):
    grid = "lr=0.02,0.005;rank=2,5"
    result = run(tmp_path / "sweep", grid)
    for name, folder in alone(tmp_path, grid).items():
        assert weights(tmp_path / "sweep" / name) == weights(folder)
        assert without_times(tmp_path / "sweep" / name) == without_times(folder)
        settings = [json.loads((f / "run.json").read_text()) for f in (tmp_path / "sweep" / name, folder)]
        assert settings[0] == settings[1]
    assert [r["eval_loss"] for r in result.runs] == sorted(r["eval_loss"] for r in result.runs)
    assert result.best == result.runs[0]["name"]


@pytest.mark.parametrize(
    "grid",
    [
        "seed=3,4,5;rank=1,4",  # other orders: rows of other lengths
        "dropout=0,0.2;seed=3,4",
        "targets=q_proj+v_proj,all-linear,down_proj;label_smoothing=0,0.1",
        "batch_size=2,4;clip=0.01,1;schedule=linear,cosine",
        "packing=none,plain,tree",
    ],
)
def test_runs_that_differ_in_anything_are_their_runs_alone(tmp_path, grid):
    given = base(torch.float64)
    run(tmp_path / "sweep", grid, given=given)
    for name, folder in alone(tmp_path, grid, given=given).items():
        found = tensors(tmp_path / "sweep" / name)
        for key, expected in tensors(folder).items():
            close(found[key], expected, torch.float64)
        assert losses(tmp_path / "sweep" / name) == pytest.approx(losses(folder), rel=1e-6)


@pytest.mark.parametrize(("family", "kernels"), [("gpt2", "auto"), ("llama", "plain")])
def test_models_that_the_block_does_not_serve(tmp_path, family, kernels):
    grid, options = "rank=2,5;seed=3,4", {"train": {"kernels": kernels}}
    given = base(torch.float64, family)
    run(tmp_path / "sweep", grid, given=given, **options)
    for name, folder in alone(tmp_path, grid, given=given, **options).items():
        for key, expected in tensors(folder).items():
            close(tensors(tmp_path / "sweep" / name)[key], expected, torch.float64)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_model_that_mixes_rows_computes_one_run_at_a_time(tmp_path, monkeypatch, mixes):
    given = base(torch.float64)
    mlp = given.model.model.layers[0].mlp
    if mixes:  # harmless within one run, but an adapter would meet the rows of another
        monkeypatch.setattr(mlp, "forward", lambda x, own=mlp.forward: own(x.flip(0)).flip(0), raising=False)
    widest: list[int] = []
    own_bank_rows = Bank.rows

    def watched(bank: Bank, *segments: tuple[str, int], training: bool = True):
        if training:
            widest.append(len(segments))
        return own_bank_rows(bank, *segments, training=training)

    monkeypatch.setattr(Bank, "rows", watched)
    run(tmp_path / "sweep", "rank=2,5", given=given)
    assert max(widest) == (1 if mixes else 2)
    for name, folder in alone(tmp_path, "rank=2,5", given=given).items():
        for key, expected in tensors(folder).items():
            close(tensors(tmp_path / "sweep" / name)[key], expected, torch.float64)


@pytest.mark.parametrize("recompute", ["mlp", "layers"])
@pytest.mark.parametrize("kernels", ["block", "plain"])
def test_recomputation_changes_nothing(tmp_path, recompute, kernels):
    grid = "rank=2,4"
    given = base(torch.float64)
    options = {"given": given, "lora": {"dropout": 0.1}}
    kept = run(tmp_path / "kept", grid, train={"kernels": kernels}, **options)
    again = run(tmp_path / "again", grid, train={"kernels": kernels, "recompute": recompute}, **options)
    for a, b in zip(kept.runs, again.runs, strict=True):
        assert a["name"] == b["name"]
        close(torch.tensor(b["eval_loss"]), torch.tensor(a["eval_loss"]), torch.float32)


def test_a_run_that_diverges_leaves_the_others_alone(tmp_path):
    result = run(tmp_path / "sweep", "alpha=8,1e38")
    by_name = {r["name"]: r for r in result.runs}
    assert by_name["alpha=1e+38"]["status"] == "diverged"
    assert by_name["alpha=1e+38"]["eval_loss"] is None
    assert result.best == "alpha=8"
    assert weights(tmp_path / "sweep" / "alpha=8") == weights(alone(tmp_path, "alpha=8")["alpha=8"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_left_as_it_was(tmp_path, fails):
    given = base()
    model = given.model
    model.model.layers[0].train()
    model.lm_head.weight.requires_grad_(False)
    before, kinds = bits(model), {n: type(m) for n, m in model.named_modules()}
    modes = {n: m.training for n, m in model.named_modules()}
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}

    def stop(number: int) -> None:
        if fails and number == 3:
            raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError):
            run(tmp_path / "sweep", "rank=1,2", given=given, on_round=stop)
    else:
        run(tmp_path / "sweep", "rank=1,2", given=given, on_round=stop)
    assert same_bits(model, before)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert not any(name.startswith("lora_") for m in model.modules() for name in vars(m))


# ------------------------------------------------------------------ resume


RESUMED = "rank=2,4;seed=3,4;dropout=0.1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["lorasmith.train.loop"], "plot_loss", lambda *_: None)
        patch.setattr(sys.modules["lorasmith.sweep.sweep"], "plot_sweep", lambda *_: None)
        run(out, RESUMED)
    return out


def same_sweep(a: Path, b: Path) -> None:
    names = [p.name for p in points(parse_grid(RESUMED))]
    for name in names:
        assert weights(a / name) == weights(b / name), name
        assert without_times(a / name) == without_times(b / name), name


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_a_sweep_that_was_cut_goes_on_to_the_same_bits(tmp_path, whole, at):
    def stop(number: int) -> None:
        if number == at:
            raise KeyError

    with pytest.raises(KeyError):
        run(tmp_path / "sweep", RESUMED, on_round=stop)
    result = run(tmp_path / "sweep", RESUMED, resume=True)
    assert result.resumed_from_step == {1: None, 2: 2, 5: 4, 8: None}[at]
    same_sweep(tmp_path / "sweep", whole)


@pytest.mark.parametrize("save", [2, 7, 15])
def test_a_kill_between_the_checkpoints_of_a_round(tmp_path, whole, monkeypatch, save):
    own, count = Member._save, [0]

    def dying(member: Member) -> None:
        count[0] += 1
        if count[0] == save:
            raise KeyError
        own(member)

    monkeypatch.setattr(Member, "_save", dying)
    with pytest.raises(KeyError):
        run(tmp_path / "sweep", RESUMED)
    monkeypatch.setattr(Member, "_save", own)
    run(tmp_path / "sweep", RESUMED, resume=True)
    same_sweep(tmp_path / "sweep", whole)


def test_a_kill_while_the_runs_end(tmp_path, whole, monkeypatch):
    own, count = Member.end, [0]

    def dying(member: Member, status: str) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyError
        own(member, status)

    monkeypatch.setattr(Member, "end", dying)
    with pytest.raises(KeyError):
        run(tmp_path / "sweep", RESUMED)
    monkeypatch.setattr(Member, "end", own)
    result = run(tmp_path / "sweep", RESUMED, resume=True)
    assert len(result.runs) == 4
    assert all(r["status"] == "done" for r in result.runs)
    same_sweep(tmp_path / "sweep", whole)


def test_a_signal_stops_between_rounds(tmp_path, whole):
    def stop(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    result = run(tmp_path / "sweep", RESUMED, on_round=stop)
    assert result.interrupted
    assert {r["steps"] for r in result.runs} == {3}
    assert run(tmp_path / "sweep", RESUMED, resume=True).resumed_from_step == 3
    same_sweep(tmp_path / "sweep", whole)


def test_what_is_resumed_must_be_the_same_sweep(tmp_path):
    run(tmp_path / "sweep", "rank=1,2", train={"max_steps": 1})
    with pytest.raises(OutputError, match="holds a sweep already"):
        run(tmp_path / "sweep", "rank=1,2", train={"max_steps": 1})
    with pytest.raises(TrainingError, match=r"rank=4: only now") as error:
        run(tmp_path / "sweep", "rank=1,4", train={"max_steps": 1, "clip": 2.0}, resume=True)
    assert "rank=2: only then" in str(error.value)
    assert "rank=1: clip 1.0 then, 2.0 now" in str(error.value)


# ------------------------------------------------------------------ halving


def test_rungs_and_survivors():
    halving = Halving(2)
    assert halving.rungs(8, 80) == [10, 20, 40]
    assert halving.rungs(5, 80) == [10, 20, 40]  # five, three, two, one
    assert halving.rungs(1, 80) == []
    assert Halving(4).rungs(16, 80) == [5, 20]
    assert halving.survivors({"a": 3.0, "b": 1.0, "c": float("nan"), "d": 2.0, "e": 1.0}) == {"b", "e", "d"}
    with pytest.raises(ConfigError, match="at least 2"):
        Halving(1)


HALVED = "lr=0.02,0.01,0.0001,0.00001"


def test_halving_stops_the_worse_and_trains_the_best_to_its_end(tmp_path):
    result = run(tmp_path / "sweep", HALVED, halving=Halving(2))
    steps = {r["name"]: r["steps"] for r in result.runs}
    assert sorted(steps.values()) == [2, 2, 4, 8]

    def at(step: int, names: list[str]) -> dict[str, float]:
        rows = {n: read_metrics(tmp_path / "sweep" / n / "metrics.jsonl") for n in names}
        return {
            n: next(r["eval_loss"] for r in rows[n] if r["step"] == step and "eval_loss" in r) for n in names
        }

    first = at(2, list(steps))
    assert {n for n, s in steps.items() if s > 2} == set(sorted(first, key=first.__getitem__)[:2])
    second = at(4, [n for n, s in steps.items() if s > 2])
    (last,) = (n for n, s in steps.items() if s == 8)
    assert last == min(second, key=second.__getitem__)
    assert losses(tmp_path / "sweep" / last) == losses(alone(tmp_path, f"lr={last.partition('=')[2]}")[last])


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_kill_while_halving_decides(tmp_path, monkeypatch, dies_at):
    expected = run(tmp_path / "whole", HALVED, halving=Halving(2))
    own, count = Member.end, [0]

    def dying(member: Member, status: str) -> None:
        count[0] += 1
        if count[0] == dies_at:
            raise KeyError
        own(member, status)

    monkeypatch.setattr(Member, "end", dying)
    with pytest.raises(KeyError):
        run(tmp_path / "sweep", HALVED, halving=Halving(2))
    monkeypatch.setattr(Member, "end", own)
    result = run(tmp_path / "sweep", HALVED, halving=Halving(2), resume=True)
    for name in ("name", "steps", "status", "eval_loss"):
        assert [r[name] for r in result.runs] == [r[name] for r in expected.runs]


def test_halving_needs_runs_of_one_length(tmp_path):
    with pytest.raises(ConfigError, match="equal steps"):
        run(tmp_path / "sweep", "max_steps=2,4", halving=Halving(2))
    assert not (tmp_path / "sweep").exists()


# ------------------------------------------------------------------ the grid, and what is refused


def test_a_grid_is_every_combination():
    grid = parse_grid("lr=5e-4,1e-3; rank=4,16;targets=q_proj+v_proj,all-linear;rslora=true")
    made = points(grid, {"alpha": 8}, {"epochs": 2})
    assert [p.name for p in made][:3] == [
        "lr=0.0005,rank=4,targets=q_proj+v_proj,rslora=True",
        "lr=0.0005,rank=4,targets=all-linear,rslora=True",
        "lr=0.0005,rank=16,targets=q_proj+v_proj,rslora=True",
    ]
    assert len({p.name for p in made}) == 8
    first = made[0]
    assert (first.lora.rank, first.lora.alpha, first.lora.targets) == (4, 8, ("q_proj", "v_proj"))
    assert (first.train.lr, first.train.epochs) == (5e-4, 2)
    assert first.config["rank"] == 4
    assert first.config["lr"] == 5e-4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr=5e-4;rnak=4", 'Did you mean "rank"'),
        ("lr", "not of the form"),
        ("lr=", "not of the form"),
        ("", "names no key"),
        ("lr=1e-3;lr=2e-3", "comes twice"),
        ("lr=1e-3,0.001", "a value twice"),
        ("kernels=plain", "one for all runs"),
        ("bias=all", "cannot be swept"),
    ],
)
def test_a_grid_that_says_nothing_sensible(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_grid(text)


def test_one_bad_run_stops_all_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"rank=0: use a whole number(.|\n)*in lr=0.1,rank=0") as error:
        points(parse_grid("lr=0.1,20;rank=0,4"))
    assert "lr=20.0: use a positive number" in str(error.value)
    with pytest.raises(TargetError, match=r"1 of 2 runs cannot be(.|\n)*q_porj"):
        run(tmp_path / "sweep", "targets=q_proj,q_porj")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("lora", "settings", "said"),
    [
        ({"bias": "all"}, {}, "bias"),
        ({"modules_to_save": ("norm",)}, {}, "modules_to_save"),
        ({}, {"method": "full"}, "full fine-tuning"),
        ({}, {"budget_bytes": 1 << 30}, "budget_bytes"),
        ({}, {"kernels": "inductor"}, "inductor"),
    ],
)
def test_what_cannot_share_a_pass_is_refused(lora, settings, said):
    with pytest.raises(ConfigError, match=said):
        points({"rank": [2]}, lora, settings)


def test_targets_that_are_no_linear_layers(tmp_path):
    with pytest.raises(ConfigError, match="not a plain linear layer"):
        run(tmp_path / "sweep", "rank=1,2", lora={"targets": ("embed_tokens",)})


# ------------------------------------------------------------------ ranking


def test_a_tenth_is_held_out_by_whole_prompts(tmp_path):
    rows = [{"prompt": f"q{i // 3}", "completion": f"a{i}"} for i in range(120)]
    kept, held = hold_out(read_records(rows))
    assert len(kept) + len(held) == 120
    assert 12 <= len(held) <= 14
    assert not {r.prompt for r in kept} & {r.prompt for r in held}
    again = hold_out(read_records(list(reversed(rows))))[1]
    assert {r.completion for r in again} == {r.completion for r in held}
    with pytest.raises(DataError, match="eval-data"):
        hold_out(read_records([{"prompt": "q", "completion": f"a{i}"} for i in range(9)]))
    result = run(tmp_path / "sweep", "rank=1,2", data=rows, eval_data=None, train={"max_steps": 2})
    assert all(r["eval_loss"] is not None for r in result.runs)
    lines = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["plan"]["held_out_lines"]
    assert lines == [r.line for r in held]


def test_data_in_the_grid_is_ranked_on_one_set(tmp_path):
    for name, records in (("a", RECORDS[:4]), ("b", RECORDS[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    grid = f"data={tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    with pytest.raises(ConfigError, match="needs --eval-data"):
        run(tmp_path / "sweep", grid, eval_data=None)
    result = run(tmp_path / "sweep", grid)
    assert {r["name"] for r in result.runs} == {"data=a.jsonl", "data=b.jsonl"}
    point = points(parse_grid("rank=16"), LORA, TRAIN)[0]
    train(base(), RECORDS[4:], point.lora, point.train, out=tmp_path / "b", eval_data=HELD_OUT, quiet=True)
    assert weights(tmp_path / "sweep" / "data=b.jsonl") == weights(tmp_path / "b")


def outcome(name: str, loss: float | None, status: str = "done") -> dict[str, Any]:
    return {"name": name, "eval_loss": loss, "status": status}


def test_cells_hold_mean_and_spread_over_seeds_and_the_best_of_the_rest():
    varied = {p.name: p.varied for p in points(parse_grid("lr=0.1,0.2;rank=1;alpha=8,16;seed=0,1"))}
    table = {(0.1, 8): (1.0, 1.2), (0.1, 16): (3.0, 3.4), (0.2, 8): (2.0, 2.0), (0.2, 16): (1.5, 1.9)}
    runs = [outcome(n, table[v["lr"], v["alpha"]][v["seed"]]) for n, v in varied.items()]
    found = cells(runs, varied, ["lr", "rank"])
    for lr, best in (("0.1", (1.0, 1.2)), ("0.2", (1.5, 1.9))):
        assert found[lr, "1"] == pytest.approx((statistics.fmean(best), statistics.stdev(best), 2))
    stopped = [{**r, "status": "stopped"} for r in runs]
    assert cells(stopped, varied, ["lr", "rank"]) == {}


def test_the_worst_and_the_unknown_come_last():
    runs = [outcome("a", None, "diverged"), outcome("b", 2.0), outcome("c", 1.0)]
    assert [r["name"] for r in ranked(runs)] == ["c", "b", "a"]


@pytest.mark.parametrize(
    "grid", ["lr=0.1,0.2,0.4;rank=1,2;seed=0,1", "lr=0.1,0.2", "targets=q_proj+v_proj,all-linear"]
)
def test_a_plot_for_each_kind_of_grid(tmp_path, grid):
    varied = {p.name: p.varied for p in points(parse_grid(grid))}
    runs = ranked([outcome(name, 1 + i / 10) for i, name in enumerate(varied)])
    path = plot_sweep(runs, varied, tmp_path / "sweep.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_no_plot_without_two_values(tmp_path):
    varied = {p.name: p.varied for p in points(parse_grid("lr=0.1;seed=0,1"))}
    assert plot_sweep([outcome(n, 1.0) for n in varied], varied, tmp_path / "sweep.png") is None


# ------------------------------------------------------------------ passes


def unit(run: str, place: int, *lengths: int) -> Unit:
    rows = []
    for n in lengths:
        at = torch.arange(n).numpy()
        rows.append(Row(at, at, at, at[:1], at[:1]))
    return Unit(run, place, tuple(rows))


def test_passes_hold_every_unit_once_and_keep_each_runs_order():
    units = [unit(run, place, 100 + 20 * (i % 2), 90) for i, run in enumerate("abcde") for place in range(3)]
    passes = joint_passes(units, batch_tokens=900)
    flat = [u for p in passes for u in p]
    assert sorted((u.run, u.place) for u in flat) == sorted((u.run, u.place) for u in units)
    for run in "abcde":
        assert [u.place for u in flat if u.run == run] == [0, 1, 2]
    for p in passes:
        (length,) = {u.length for u in p}
        assert len({u.run for u in p}) == len(p)
        assert length * sum(len(u.rows) for u in p) <= 900
    assert len(passes) == 3 * 2  # of each place: three and two runs, all that 900 slots hold


def test_a_unit_beyond_the_limit_has_a_pass_of_its_own():
    units = [unit("a", 0, 100), unit("b", 0, 500), unit("c", 0, 100), unit("d", 0, 500)]
    assert [[u.run for u in p] for p in joint_passes(units, batch_tokens=400)] == [["b"], ["d"], ["a", "c"]]
