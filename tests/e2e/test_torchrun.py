"""Several real processes under torchrun leave what one process leaves."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.errors import TrainingError
from lorasmith.train import read_metrics
from tests.support.base import write_tiny_base
from tests.support.cli import answer
from tests.support.models import tiny_causal_lm
from tests.support.together import HELD_OUT, RECORDS, launch, launch_jobs, sweep_job, train_job
from tests.support.tolerance import close

JOBS = {
    "plain": {"train": {"batch_tokens": 60, "packing": "none"}},  # several passes a step
    "tree": {"train": {"packing": "tree"}},
    "wide": {"dtype": "float32", "train": {"packing": "tree", "lr": 0.002}},
    "narrow": {"dtype": "bfloat16", "train": {"lr": 0.002}},
    "sharded": {"train": {"packing": "tree", "shard": "base"}},
    "sharded-plain": {"train": {"packing": "none", "batch_tokens": 60, "shard": "base", "kernels": "plain"}},
    "sharded-again": {"train": {"packing": "tree", "shard": "base", "recompute": "layers"}},
    "biases": {"lora": {"bias": "all"}, "family": "qwen2", "train": {"shard": "base"}},
    "untied": {"family": "gemma3", "train": {"shard": "base"}},
    "full": {"train": {"method": "full"}},
    "parts": {"train": {"packing": "tree", "shard": "all"}},
    "parts-biases": {"lora": {"bias": "all"}, "family": "qwen2", "train": {"shard": "all"}},
    "parts-full": {"train": {"method": "full", "batch_tokens": 60, "packing": "none", "shard": "all"}},
    "parts-narrow": {"dtype": "bfloat16", "train": {"lr": 0.002, "method": "full", "shard": "all"}},
    "bitfit": {"train": {"method": "bitfit", "options": {"biases": "added"}}},
    "dropout": {"lora": {"dropout": 0.2}},
    "stopped": {"train": {"packing": "tree"}},
    "stopped-parts": {"train": {"method": "full", "shard": "all"}},
}
FOUR = ("tree", "sharded", "narrow", "parts-full")
ROUNDED = ("wide", "narrow", "parts-narrow", "dropout", "stopped", "stopped-parts")


def tiny() -> torch.nn.Module:
    return tiny_causal_lm("llama", vocab_size=264)


def result(out: Path) -> dict[str, torch.Tensor]:
    (file,) = [f for f in out.glob("*/*.safetensors") if f.parent.name != "checkpoints"]
    return load_file(file)


def files(out: Path) -> set[str]:
    """All but those within checkpoints, which each process may write a part of."""
    inside = {f for f in out.rglob("*") if f.is_file() and f.parent.parent.name != "checkpoints"}
    return {str(f.relative_to(out)) for f in inside}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Each job by one process, by two and some by four: `FOLDER/1/plain`, …; and what was said, `FOLDER/2.txt`."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["lorasmith.train.loop"], "plot_loss", lambda *_: None)
        for name in JOBS:
            train_job(job(folder, 1, name, shard="none"))
    (folder / "2.txt").write_text(launch_jobs(folder, 2, [job(folder, 2, name) for name in JOBS]))
    for name in ("stopped", "stopped-parts"):
        shutil.copytree(folder / "2" / name, folder / "4" / name)
    again = [job(folder, 4, name) for name in FOUR]
    again += [job(folder, 4, name) | {"resume": True} for name in ("stopped", "stopped-parts")]
    (folder / "4.txt").write_text(launch_jobs(folder, 4, again))
    return folder


def job(folder: Path, count: int, name: str, **train: str) -> dict:
    made = JOBS[name] | {"train": JOBS[name].get("train", {}) | train, "out": str(folder / str(count) / name)}
    return made | ({"stopped_at": 4} if name.startswith("stopped") and count == 2 else {})


def differences(runs: Path, count: int, name: str, dtype: torch.dtype) -> None:
    ours, alone = result(runs / str(count) / name), result(runs / "1" / name)
    assert ours.keys() == alone.keys()
    assert files(runs / str(count) / name) == files(runs / "1" / name)
    for key, tensor in ours.items():
        close(tensor, alone[key], dtype)


@pytest.mark.parametrize("name", [n for n in JOBS if n not in ROUNDED])
def test_two_processes_leave_what_one_leaves(runs, name):
    differences(runs, 2, name, torch.float64)
    ours, alone = (read_metrics(runs / count / name / "metrics.jsonl") for count in "21")
    assert [row["step"] for row in ours] == [row["step"] for row in alone]
    for a, b in zip(ours, alone, strict=True):
        for key in {"loss", "eval_loss", "grad_norm", "lr"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-9)
        assert a.get("tokens") == b.get("tokens")


def test_in_coarser_dtypes_they_agree_within_the_table(runs):
    differences(runs, 2, "wide", torch.float32)
    differences(runs, 2, "narrow", torch.bfloat16)
    differences(runs, 2, "parts-narrow", torch.bfloat16)


def test_four_processes_leave_what_one_leaves_though_the_last_step_has_but_one_sequence(runs):
    assert len(RECORDS) % 5 == 1
    for name in FOUR:
        differences(runs, 4, name, torch.bfloat16 if name == "narrow" else torch.float64)


def test_a_sharded_base_gives_the_very_bits_of_a_whole_one(runs):
    for other in ("sharded", "sharded-again"):
        for key, tensor in result(runs / "2" / "tree").items():
            assert torch.equal(tensor, result(runs / "2" / other)[key])
    said = (runs / "2.txt").read_text()
    spread = sum(p.numel() for n, p in tiny().named_parameters() if ".layers." in n or ".embed_tokens." in n)
    assert re.search(rf"shard: {spread:,} of [0-9,]+ weights .*2 layers.* are spread over 2 processes", said)
    assert said.count("shard: ") == sum("shard" in j.get("train", {}) for j in JOBS.values())


def test_each_process_draws_its_own_dropout(runs):
    """So the result is another one, as with another seed, and it learns all the same."""
    ours, alone = (read_metrics(runs / count / "dropout" / "metrics.jsonl") for count in "21")
    assert not torch.equal(*(next(iter(result(runs / c / "dropout").values())) for c in "21"))
    assert ours[-1]["eval_loss"] < 0.95 * ours[0]["eval_loss"]
    assert ours[-1]["eval_loss"] == pytest.approx(alone[-1]["eval_loss"], rel=0.1)


def test_a_signal_to_one_stops_all_and_four_go_on_where_two_stopped(runs):
    assert "stopped after step 4 of 9; the checkpoint is saved" in (runs / "2.txt").read_text()
    assert (
        "with other processes, or what trains in other parts: equal within rounding"
        in (runs / "4.txt").read_text()
    )
    differences(runs, 4, "stopped", torch.float64)
    differences(runs, 4, "stopped-parts", torch.float64)


def test_a_checkpoint_in_parts_is_safetensors_of_each_process_and_one_alone_goes_on_from_it(runs, tmp_path):
    out = shutil.copytree(runs / "2" / "stopped-parts", tmp_path / "1" / "stopped-parts")
    (checkpoint,) = [f for f in out.glob("checkpoints/*") if f.name.endswith("4")]
    names = [f.name for f in checkpoint.iterdir()]
    assert {name.partition("-model")[0] for name in names} == {"state.json", "shard-00001", "shard-00002"}
    assert all(name.endswith((".safetensors", ".json")) for name in names)
    held = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    whole = runs / "1" / "stopped-parts" / "checkpoints" / "step-00000009" / "state.safetensors"
    assert held < 1.2 * whole.stat().st_size  # nothing is there twice, but for the headers
    train_job(job(tmp_path, 1, "stopped-parts", shard="none") | {"resume": True})
    for key, tensor in result(out).items():
        close(tensor, result(runs / "1" / "stopped-parts")[key], torch.float64)


def test_two_in_parts_go_on_from_a_whole_checkpoint(runs, tmp_path):
    shutil.copytree(runs / "2" / "stopped", tmp_path / "2" / "stopped")
    again = job(tmp_path, 2, "stopped", shard="all") | {"resume": True}
    assert "resuming after step 4" in launch_jobs(tmp_path, 2, [again])
    assert any((tmp_path / "2" / "stopped" / "checkpoints").glob("*9/shard-*"))
    for key, tensor in result(tmp_path / "2" / "stopped").items():
        close(tensor, result(runs / "1" / "stopped")[key], torch.float64)


@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_or_lost_part_is_told_and_nothing_is_overwritten(runs, tmp_path, number):
    out = shutil.copytree(runs / "2" / "stopped-parts", tmp_path / "1" / "stopped-parts")
    again = job(tmp_path, 1, "stopped-parts", shard="none") | {"resume": True}
    part = next(out.glob(f"checkpoints/*4/shard-0000{number}-*"))
    state = part.with_name("state.json")
    for damage, words in (
        (lambda: part.write_bytes(part.read_bytes()[:-100]), "cannot be read"),
        (part.unlink, f"{part.name} is not there"),
        # not even the list tells: what is left must add up to whole tensors
        (
            lambda: state.write_text(json.dumps(json.loads(state.read_text()) | {"files": []})),
            "cannot be read",
        ),
    ):
        damage()
        before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
        with pytest.raises(TrainingError, match=rf"{words}.*Delete it to go on from the one before"):
            train_job(again)
        assert before == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}


def test_a_base_given_by_name_goes_with_its_process_group(given, tmp_path):
    """`together` looks for threads that are left."""
    job = {"base": str(given[1]), "out": str(tmp_path / "run"), "train": {"shard": "all", "epochs": 1}}
    assert "are spread over 2 processes" in launch_jobs(tmp_path, 2, [job])


def test_one_process_speaks_and_says_how_many_there_are(runs):
    for count in (2, 4):
        said = (runs / f"{count}.txt").read_text()
        jobs = len(JOBS) if count == 2 else len(FOUR) + 2
        assert said.count("data: 11 examples") == jobs
        assert said.count(f"processes: {count} through gloo") == jobs


@pytest.mark.parametrize("name", ["tree", "parts-full"])
def test_after_a_killed_worker_torchrun_goes_on_to_the_same_bits(runs, tmp_path, name):
    killed = JOBS[name] | {"out": str(tmp_path / "killed"), "killed_at": 5}
    said = launch_jobs(tmp_path, 2, [killed], "--max-restarts", "1")
    assert "exitcode: -9" in said
    assert "resuming after step 4" in said
    undisturbed = result(runs / "2" / name)
    for key, tensor in result(tmp_path / "killed").items():
        assert torch.equal(tensor, undisturbed[key])
    rows = read_metrics(tmp_path / "killed/metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[object]:
    """Options that every command takes."""
    folder = tmp_path_factory.mktemp("given")
    for name, records in (("data", RECORDS), ("held_out", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    base = write_tiny_base(folder / "tiny")
    return ["--base", base, "--data", folder / "data.jsonl", "--eval-data", folder / "held_out.jsonl"]


def test_bad_input_is_said_once_and_every_process_ends_with_2(given, tmp_path):
    options = [*given, "--out", tmp_path / "run", "--batch-size", 1]
    done = launch(2, "lorasmith", "train", *options, options=("--max-restarts", "0"))
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size=1 and 11 examples on 2 processes") == 1
    assert "exitcode  : 2" in done.stderr
    assert "[rank" not in done.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()


def test_a_sweep_over_two_processes_is_the_sweep_of_one(given, tmp_path):
    grid = [
        *given,
        "--grid",
        "lr=5e-3,2e-2;rank=2,4;seed=0,1",
        "--halving",
        "2",
        "--epochs",
        "4",
        "--dtype",
        "fp32",
    ]
    alone = answer("sweep", *grid, "--out", tmp_path / "1")
    done = launch(2, "lorasmith", "sweep", *grid, "--out", tmp_path / "2", "--json")
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)
    assert (ours["processes"], ours["best"]) == (2, alone["best"])
    times = ("train_s", "adapter_dir")
    assert [{k: v for k, v in run.items() if k not in times} for run in ours["runs"]] == [
        {k: v for k, v in run.items() if k not in times} for run in alone["runs"]
    ]
    assert {run["status"] for run in ours["runs"]} == {"done", "stopped"}
    for run in ours["runs"]:
        weights = [tmp_path / c / run["name"] / "adapter/adapter_model.safetensors" for c in "12"]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_after_a_killed_worker_a_sweep_goes_on_to_the_same_bits(tmp_path):
    job = {"grid": "lr=5e-3,2e-2;rank=2,4", "dtype": "float32"}
    sweep_job(job | {"out": str(tmp_path / "whole")})
    killed = job | {"out": str(tmp_path / "killed"), "killed_at": 5}  # after the first rung of two
    said = launch_jobs(tmp_path, 2, [killed], "--max-restarts", "1")
    assert "exitcode: -9" in said
    drawn_only_here = {f for f in files(tmp_path / "whole") if f.endswith("loss.png")}
    assert files(tmp_path / "killed") == files(tmp_path / "whole") - drawn_only_here
    adapters = list((tmp_path / "whole").glob("*/adapter/adapter_model.safetensors"))
    assert len(adapters) == 4
    for adapter in adapters:
        other = tmp_path / "killed" / adapter.relative_to(tmp_path / "whole")
        assert adapter.read_bytes() == other.read_bytes()
