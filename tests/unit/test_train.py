"""A run from records to an adapter on disk: what it leaves, and that a stopped run goes on to the same bits."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from lorasmith.data import Example, encode, read_records
from lorasmith.errors import ConfigError, OutputError, TrainingError
from lorasmith.formats import read_adapter
from lorasmith.inject import inject, lora_layers
from lorasmith.lora import LoRAConfig
from lorasmith.planning import Fit
from lorasmith.train import TrainConfig, default_lr, evaluate_loss, read_metrics, train
from lorasmith.train.checkpoint import (
    Progress,
    checkpoint_parameters,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lorasmith.train.forward import Forward
from tests.support.models import tiny_causal_lm
from tests.support.tokenizer import ByteTokenizer
from tests.support.tolerance import close

ROOT = Path(__file__).parents[2]
STEPS = 12
LORA = LoRAConfig(rank=2, alpha=8, dropout=0.1)
SETTINGS = TrainConfig(
    lr=0.02, batch_size=4, epochs=6, save_every=2, eval_every=3, seed=3
)  # 8 records: 12 steps
RECORDS = [{"prompt": f"{c}{c} is", "completion": f" {c.upper()}{i}."} for i, c in enumerate("abcdefgh")]
STRONG = LoRAConfig(rank=8, alpha=32)
LONG = TrainConfig.from_dict(SETTINGS.to_dict() | {"epochs": 60, "eval_every": 4, "save_every": 50})
HELD_OUT = [{"prompt": f"{c}{c} is", "completion": f" {c.upper()}?"} for c in "abc"]


class Tokenizer(ByteTokenizer):
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.txt").write_text("bytes")


@dataclass
class FakeFingerprint:
    digest: str = "0123456789abcdef"

    def to_dict(self) -> dict[str, str]:
        return {"weights": self.digest}


@dataclass
class FakeBase:
    model: Any
    tokenizer: Any = field(default_factory=lambda: Tokenizer(chat=False))
    name: str = "tiny"
    dtype_reason: str = "float32: a test"
    fingerprint: FakeFingerprint = field(default_factory=FakeFingerprint)


def base(dtype: torch.dtype = torch.float32, family: str = "llama", **options: Any) -> FakeBase:
    return FakeBase(tiny_causal_lm(family, vocab_size=264, dtype=dtype, **options))


def run(out: Path, *, settings: TrainConfig = SETTINGS, lora: LoRAConfig = LORA, **options: Any):
    options = {"data": RECORDS, "eval_data": HELD_OUT, "quiet": True} | options
    data = options.pop("data")
    return train(options.pop("base", None) or base(), data, lora, settings, out=out, **options)


def changed(**values: Any) -> TrainConfig:
    return TrainConfig.from_dict(SETTINGS.to_dict() | values)


def weights(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def eval_losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["eval_loss"] for r in read_metrics(out / "metrics.jsonl") if "eval_loss" in r}


def checkpoints(out: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*"))


def examples_of(records: list[dict[str, str]]) -> list[Example]:
    return encode(read_records(records), Tokenizer(chat=False), max_length=64).examples


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    if "plotted" not in request.keywords and "plot" not in request.node.name:
        monkeypatch.setattr(sys.modules["lorasmith.train.loop"], "plot_loss", lambda *_: None)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


# ---------------------------------------------------------------- what a run does


def sharp_model():
    """The tiny model with a head four times as large.

    The last norm bounds |h| by √32, and rows of std 0.15 then bound the logits so that no training of
    frozen-head LoRA could bring 264 tokens' loss below about 1.3.
    """
    model = tiny_causal_lm("llama", vocab_size=264)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def test_a_few_examples_are_learned_and_the_adapter_on_disk_is_what_was_measured(tmp_path):
    given = FakeBase(sharp_model())
    result = run(tmp_path / "run", base=given, settings=LONG, lora=STRONG, eval_data=RECORDS)
    assert result.steps == 120
    assert losses(tmp_path / "run")[0] > math.log(264)  # it starts worse than a guess
    assert losses(tmp_path / "run")[-1] < 0.1
    assert result.eval_loss < 0.1
    adapter = read_adapter(tmp_path / "run" / "adapter")
    assert adapter.digest == result.adapter.digest
    model = sharp_model()
    fresh = evaluate_loss(Forward(model), examples_of(RECORDS))
    inject(model, adapter)
    measured = evaluate_loss(Forward(model), examples_of(RECORDS))
    assert measured.tokens == sum(int(e.supervised.sum()) for e in examples_of(RECORDS))
    close(torch.tensor(measured.loss), torch.tensor(result.eval_loss), torch.float32)
    close(torch.tensor(fresh.loss), torch.tensor(eval_losses(tmp_path / "run")[0]), torch.float32)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_left_as_it_was(tmp_path, fails, recompute):
    given = base()
    model = given.model
    model.model.layers[0].train()  # modes and flags of any kind come back
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}

    def stop(step: int) -> None:
        if fails and step == 5:
            raise KeyError("stop")

    options = {
        "base": given,
        "settings": changed(recompute="layers" if recompute else "none", kernels="plain"),
        "on_step": stop,
    }
    if fails:
        with pytest.raises(KeyError):
            run(tmp_path / "run", **options)
    else:
        run(tmp_path / "run", **options)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_dropout_is_on_in_the_adapter_and_off_in_the_base(tmp_path):
    given = base()
    seen = []

    def look(step: int) -> None:
        layers = set(lora_layers(given.model).values())
        seen.append({module.training for module in given.model.modules() if module in layers})
        assert not any(module.training for module in given.model.modules() if module not in layers)

    run(tmp_path / "on", base=given, on_step=look)
    assert seen == [{True}] * STEPS
    run(tmp_path / "off", lora=LoRAConfig(rank=2, alpha=8))
    # B = 0 hides it in the first step.
    assert losses(tmp_path / "on")[0] == losses(tmp_path / "off")[0]
    assert losses(tmp_path / "on")[1:] != losses(tmp_path / "off")[1:]


@pytest.mark.parametrize("recompute", ["mlp", "layers"])
def test_recomputing_in_the_block_gives_the_same_bits(tmp_path, uninterrupted, recompute):
    run(tmp_path / "run", settings=changed(recompute=recompute))
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_recomputed_layers_give_the_same_bits(tmp_path):
    run(tmp_path / "plain", settings=changed(kernels="plain"))
    given = base()
    calls = []
    mlp = given.model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run(tmp_path / "run", settings=changed(recompute="layers", kernels="plain"), base=given)
    # One batch a step, computed once forward and once more backward.
    assert sum(calls) == 2 * STEPS
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")


def test_two_runs_give_the_same_bits_and_another_seed_gives_others(tmp_path, uninterrupted):
    run(tmp_path / "again")
    run(tmp_path / "other", settings=changed(seed=4))
    assert weights(tmp_path / "again") == weights(uninterrupted)
    assert weights(tmp_path / "other") != weights(uninterrupted)


@pytest.mark.parametrize("batch_tokens", [16, 2048])
def test_packing_and_accumulation_change_losses_by_rounding_only(tmp_path, batch_tokens):
    found = {}
    for packing in ("none", "plain", "tree"):
        out = tmp_path / packing
        settings = changed(packing=packing, batch_tokens=batch_tokens)
        run(out, settings=settings, lora=LoRAConfig(rank=2, alpha=8), base=base(torch.float64))
        found[packing] = torch.tensor([*losses(out), *eval_losses(out).values()])
        assert json.loads((out / "run.json").read_text())["layout"]["packing"] == packing
    for packing in ("plain", "tree"):
        close(found[packing], found["none"], torch.float32)
    assert found["none"][0] > found["none"][STEPS - 1] + 0.5  # there was something to compare


def test_the_first_loss_is_that_of_the_base_and_the_norm_that_of_all_gradients(tmp_path):
    run(tmp_path / "run", settings=changed(batch_size=8, max_steps=1))
    model = tiny_causal_lm("llama", vocab_size=264)
    total, count = torch.zeros(()), 0
    for e in examples_of(RECORDS):
        ids = torch.from_numpy(e.tokens).long()[None]
        logits = model(input_ids=ids).logits[0, :-1]
        kept = torch.from_numpy(e.supervised[1:])
        total = total + torch.nn.functional.cross_entropy(logits[kept], ids[0, 1:][kept], reduction="sum")
        count += int(kept.sum())
    close(torch.tensor(losses(tmp_path / "run")[0]), (total / count).detach(), torch.float32)


def test_a_window_shorter_than_the_held_out_examples_forbids_packing(tmp_path):
    long = [{"prompt": "x" * 30, "completion": "y"}]
    given = base(family="gemma2")  # a window of 16
    options = {"base": given, "lora": LoRAConfig(rank=2)}
    with pytest.raises(ConfigError, match="sliding window"):
        run(tmp_path / "asked", settings=changed(packing="tree"), eval_data=long, **options)
    assert not lora_layers(given.model)
    run(tmp_path / "auto", settings=changed(max_steps=1), eval_data=long, **options)
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["layout"]["packing"] == "none"
    run(tmp_path / "short", settings=changed(max_steps=1, packing="tree"), **options)


# ---------------------------------------------------------------- what a run leaves


def test_metrics_hold_every_step_once_with_its_learning_rate(uninterrupted):
    rows = read_metrics(uninterrupted / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert sorted(eval_losses(uninterrupted)) == [0, 3, 6, 9, 12]
    rising = math.ceil(0.04 * STEPS)
    for row in steps:
        k = row["step"] - 1
        lr = 0.02 * (k + 1) / rising if k < rising else 0.02 * (STEPS - k) / (STEPS - rising)
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        assert row.keys() >= {"grad_norm", "tokens", "tokens_per_s", "step_s", "peak_rss_bytes"}
    per_epoch = sum(len(e) for e in examples_of(RECORDS))
    assert sum(row["tokens"] for row in steps) == 6 * per_epoch


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is what getrusage says")
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    held = torch.ones(400 * 2**20 // 4)  # 400 MB that this process holds, besides torch and more
    script = "from lorasmith.train.show import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours = (
        int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x).split()[1])
        * 1024
    )
    assert int(done.stdout) < ours - held.nbytes // 2


def test_run_file(uninterrupted):
    record = json.loads((uninterrupted / "run.json").read_text())
    assert record.keys() == {
        *("lora", "train", "base", "base_fingerprint", "data_fingerprint", "data"),
        *("layout", "policy", "steps", "versions", "commit"),
    }
    assert any("kernels: block" in line for line in record["policy"])
    assert TrainConfig.from_dict(record["train"]) == replace(SETTINGS, recompute="none")
    assert LoRAConfig.from_dict(record["lora"]) == LORA
    assert (record["base"], record["base_fingerprint"]) == ("tiny", {"weights": "0123456789abcdef"})
    assert record["steps"] == STEPS
    assert record["data"]["examples"] == len(RECORDS)
    assert record["versions"].keys() >= {"python", "torch", "transformers", "lorasmith"}


def test_the_adapter_says_where_it_comes_from(uninterrupted):
    provenance = read_adapter(uninterrupted / "adapter").provenance
    assert provenance["base"]["name"] == "tiny"
    assert TrainConfig.from_dict(provenance["run"]["train"]) == replace(SETTINGS, recompute="none")


def test_result(tmp_path):
    result = run(tmp_path / "run")
    lengths = [(len(e), int(e.supervised.sum())) for e in examples_of(RECORDS)]
    assert (result.tokens, result.supervised_tokens) == tuple(6 * sum(n) for n in zip(*lengths, strict=True))
    # rank 2 on q, k, v, o (32 -> 32, 16, 16, 32) and gate, up, down (32 <-> 48), in two layers
    assert result.trainable_params == 2 * 2 * (64 + 48 + 48 + 64 + 3 * 80)
    assert result.train_loss == losses(tmp_path / "run")[-1]  # the last tenth of 12 steps is one
    assert (result.interrupted, result.resumed_from_step) == (False, None)
    assert json.loads(json.dumps(result.to_dict()))["adapter_dir"] == str(tmp_path / "run" / "adapter")


def test_plot(tmp_path):
    run(tmp_path / "run", settings=changed(max_steps=2))
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_adapter_of_the_lowest_evaluation_loss_is_kept(tmp_path):
    # What is held out contradicts what is trained on, so it gets worse while training goes on.
    against = [
        {"prompt": r["prompt"], "completion": RECORDS[i - 1]["completion"]} for i, r in enumerate(RECORDS)
    ]
    result = run(tmp_path / "run", settings=LONG, lora=STRONG, eval_data=against)
    found = {step: loss for step, loss in eval_losses(tmp_path / "run").items() if step}
    best = min(found, key=found.__getitem__)
    assert best not in (100, 120)
    assert result.eval_loss == found[best]
    kept = checkpoint_parameters(tmp_path / "run" / "checkpoints" / f"step-{best:08d}", {})
    assert kept
    for path, factors in read_adapter(tmp_path / "run" / "adapter").factors.items():
        assert torch.equal(factors.A, kept[f"{path}.lora_A"])
        assert torch.equal(factors.B, kept[f"{path}.lora_B"])
    assert checkpoints(tmp_path / "run") == [best, 100, 120]


def test_full_fine_tuning_moves_every_weight_and_writes_a_model(tmp_path):
    import transformers

    given = base()
    before = {name: p.detach().clone() for name, p in given.model.named_parameters()}
    settings = changed(method="full", lr=0.01, epochs=15)
    result = run(tmp_path / "run", base=given, settings=settings)
    used = torch.cat([torch.from_numpy(e.tokens).long() for e in examples_of(RECORDS)]).unique()
    for name, p in given.model.named_parameters():
        rows = used if "embed_tokens" in name else slice(None)
        assert not torch.equal(p[rows], before[name][rows]), name
    assert result.adapter is None
    assert result.trainable_params == result.total_params == sum(p.numel() for p in before.values())
    assert losses(tmp_path / "run")[-1] < 0.5 * losses(tmp_path / "run")[0]
    assert (tmp_path / "run" / "model" / "tokenizer.txt").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for name, p in again.named_parameters():
        assert torch.equal(p, dict(given.model.named_parameters())[name])


# ---------------------------------------------------------------- schedules and settings


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_schedules(schedule, warmup):
    total, peak = 40, 0.5
    config = TrainConfig(lr=peak, warmup=warmup, schedule=schedule)
    rising = int(warmup * total)
    found = [config.lr_at(k, total) for k in range(total)]
    for k, lr in enumerate(found):
        done = (k - rising) / (total - rising)
        after = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "constant": 1.0,
        }[schedule]
        assert lr == pytest.approx(peak * ((k + 1) / rising if k < rising else after), rel=1e-12)
    assert max(found) == peak
    assert min(found) > 0


def test_default_rate_falls_with_the_root_of_the_width():
    assert default_lr(576) == 1e-3
    assert default_lr(4 * 576) == 5e-4
    assert default_lr(576, "full") == 1e-4
    assert TrainConfig().resolved(width=576).lr == 1e-3
    assert TrainConfig(lr=0.3).resolved(width=576).lr == 0.3


def test_settings_that_cannot_work_are_named_all_at_once():
    with pytest.raises(ConfigError) as error:
        TrainConfig(epochs=0, lr=-1, warmup=1.0, packing="dense", betas=(0.9,), max_steps=0, clip=math.nan)
    for name in ("epochs=0", "lr=-1", "warmup=1.0", "packing='dense'", "betas=", "max_steps=0", "clip=nan"):
        assert name in str(error.value)
    with pytest.raises(ConfigError, match=r'"learning_rat" is not a setting'):
        TrainConfig.from_dict({"learning_rat": 1})


# ---------------------------------------------------------------- stopped and gone on


def check_resumed(out: Path, whole: Path) -> None:
    assert weights(out) == weights(whole)
    volatile = {"tokens_per_s", "step_s", "peak_rss_bytes"}
    rows, expected = (
        [{k: v for k, v in row.items() if k not in volatile} for row in read_metrics(p / "metrics.jsonl")]
        for p in (out, whole)
    )
    assert rows == expected


@pytest.mark.parametrize("stop", [1, None, STEPS], ids=["first", "random", "last"])
def test_a_run_stopped_by_an_error_goes_on_to_the_same_bits(tmp_path, uninterrupted, stop):
    stop = stop or random.randrange(2, STEPS)

    def fail(step: int) -> None:
        if step == stop:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", on_step=fail)
    torch.manual_seed(99)  # whatever happened in between
    result = run(tmp_path / "run", resume=True)
    # Checkpoints are every second step, and at every best evaluation.
    assert (result.resumed_from_step or 0) in (stop, stop - 1)
    assert result.steps == STEPS
    check_resumed(tmp_path / "run", uninterrupted)


def test_a_finished_run_resumed_is_the_same_run(tmp_path, uninterrupted):
    first = run(tmp_path / "run")
    again = run(tmp_path / "run", resume=True)
    assert again.resumed_from_step == STEPS
    assert again.train_loss == first.train_loss
    assert again.eval_loss == first.eval_loss
    check_resumed(tmp_path / "run", uninterrupted)


def test_resume_where_nothing_was_begun_starts(tmp_path, uninterrupted):
    assert run(tmp_path / "run", resume=True).resumed_from_step is None
    check_resumed(tmp_path / "run", uninterrupted)


def test_full_fine_tuning_resumes_to_the_same_bits(tmp_path):
    settings = changed(method="full", lr=0.005)

    def fail(step: int) -> None:
        if step == 7:
            raise ZeroDivisionError

    run(tmp_path / "whole", settings=settings)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", settings=settings, on_step=fail)
    assert run(tmp_path / "run", settings=settings, resume=True).resumed_from_step == 6
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resumed_run_keeps_what_its_budget_settled(tmp_path, monkeypatch):
    room = sys.modules["lorasmith.train.preflight"]
    settings = changed(budget_bytes=2**40, batch_tokens=512)

    def fail(step: int) -> None:
        if step == 7:
            raise ZeroDivisionError

    # The same process holds more or less memory at another time; then another choice would fit.
    small = Fit(2, 256, 1024, "mlp", 1, 1.0, "a test")
    monkeypatch.setattr(room, "_fit", lambda *_: small)
    run(tmp_path / "whole", settings=settings)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", settings=settings, on_step=fail)
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["train"]
    assert (chosen["recompute"], chosen["batch_tokens"]) == ("mlp", 256)
    monkeypatch.setattr(room, "_fit", lambda *_: pytest.fail("settled again"))
    assert run(tmp_path / "run", settings=settings, resume=True).resumed_from_step == 6
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


CHILD = """
import os, signal, sys, torch
sys.path[:0] = [{root!r}, {source!r}]
torch.set_num_threads({threads})
from pathlib import Path
from tests.unit.test_train import run
sys.modules["lorasmith.train.loop"].plot_loss = lambda *_: None
def on_step(step):
    print(step, flush=True)
    if step == {terminate_at}:
        os.kill(os.getpid(), signal.SIGTERM)
print("begin", flush=True)
result = run(Path({out!r}), on_step=on_step)
print("interrupted" if result.interrupted else "done", result.steps, flush=True)
"""


def child(out: Path, *, terminate_at: int = 0) -> subprocess.Popen[str]:
    script = CHILD.format(
        root=str(ROOT),
        source=str(ROOT / "src"),
        threads=torch.get_num_threads(),
        terminate_at=terminate_at,
        out=str(out),
    )
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_a_terminated_process_saves_and_goes_on_to_the_same_bits(tmp_path, uninterrupted):
    stop = random.randrange(1, STEPS)
    with child(tmp_path / "run", terminate_at=stop) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.splitlines()[-1] == f"interrupted {stop}"
    assert not (tmp_path / "run" / "adapter").exists()
    result = run(tmp_path / "run", resume=True)
    assert result.resumed_from_step == stop
    check_resumed(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("moment", [0.1, 0.45, 0.8])
def test_a_killed_process_goes_on_to_the_same_bits(tmp_path, uninterrupted, moment):
    rows = [row for row in read_metrics(uninterrupted / "metrics.jsonl") if "step_s" in row]
    expected_s = 2 * sum(row["step_s"] for row in rows[1:])  # and as long again for checkpoints
    with child(tmp_path / "run") as process:
        assert process.stdout.readline() == "begin\n"
        process.stdout.readline()  # the first step is done
        time.sleep((moment + 0.1 * random.random()) * expected_s)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    run(tmp_path / "run", resume=True)
    check_resumed(tmp_path / "run", uninterrupted)
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))


def test_a_signal_in_the_last_step_finds_a_finished_run(tmp_path, uninterrupted):
    def terminate(step: int) -> None:
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    result = run(tmp_path / "run", on_step=terminate)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not result.interrupted
    check_resumed(tmp_path / "run", uninterrupted)


def test_resuming_another_run_is_refused_and_what_differs_is_named(tmp_path):
    run(tmp_path / "run", settings=changed(max_steps=2))
    with pytest.raises(TrainingError) as error:
        run(
            tmp_path / "run",
            settings=changed(max_steps=2, lr=0.01, seed=8, save_every=5),
            lora=LoRAConfig(rank=2, alpha=9, dropout=0.1),
            data=RECORDS[:6],
            eval_data=HELD_OUT[:2],
            resume=True,
        )
    text = str(error.value)
    for line in ("train.lr: 0.02 then, 0.01 now", "train.seed: 3 then, 8 now", "lora.alpha: 8 then, 9 now"):
        assert line in text
    assert "\n  data: " in text
    assert "\n  eval_data: " in text
    assert "save_every" not in text
    assert "train.epochs" not in text
    other = base()
    other.fingerprint = FakeFingerprint("another")
    with pytest.raises(TrainingError, match="base: '0123456789abcdef' then, 'another' now"):
        run(tmp_path / "run", settings=changed(max_steps=2), base=other, resume=True)


def test_another_run_is_not_written_over(tmp_path):
    run(tmp_path / "run", settings=changed(max_steps=1))
    before = weights(tmp_path / "run")
    with pytest.raises(OutputError, match="holds a run already"):
        run(tmp_path / "run", settings=changed(max_steps=2))
    assert weights(tmp_path / "run") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run(tmp_path / "file")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_at_the_last_good_step(
    tmp_path, monkeypatch, bad
):
    lora = LoRAConfig(rank=2, alpha=8)
    run(tmp_path / "whole", lora=lora)
    original, calls = Forward.loss_sum, []

    def planted(self, batch):
        loss = original(self, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 6:
                loss = loss * math.inf if bad == "loss" else loss + (loss - loss.detach()) * 1e39
        return loss

    monkeypatch.setattr(Forward, "loss_sum", planted)
    with pytest.raises(TrainingError, match=r"Step 6: .*The state after step 5 is good.*lower learning rate"):
        run(tmp_path / "run", lora=lora)
    assert checkpoints(tmp_path / "run")[-1] == 5
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules["lorasmith.train.loop"], "plot_loss", lambda *_: None)
    assert run(tmp_path / "run", lora=lora, resume=True).resumed_from_step == 5
    check_resumed(tmp_path / "run", tmp_path / "whole")


def test_a_first_step_that_is_not_finite_says_that_nothing_was_trained(tmp_path):
    given = base()
    with torch.no_grad():
        given.model.model.embed_tokens.weight[ord("a")] = math.inf
    with pytest.raises(TrainingError, match="nothing was trained yet"):
        run(tmp_path / "run", base=given, settings=changed(batch_size=8), eval_data=None)
    assert not (tmp_path / "run" / "adapter").exists()


# ---------------------------------------------------------------- checkpoints alone


def small_state(value: float = 1.0) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    parameters = {"w": torch.nn.Parameter(torch.full((3,), value))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    parameters["w"].square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return parameters, optimizer


def test_checkpoints_kept_are_the_last_two_and_the_best_as_of_each(tmp_path):
    state = small_state()
    kept = []
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6), (8, 6)):
        save_checkpoint(tmp_path, Progress(step=step, best_step=best), *state)
        kept.append([int(p.name[-8:]) for p in sorted(tmp_path.iterdir())])
    # At step 6 the best of step 5 still counts: should 6 be lost, the run goes on from 5.
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7], [6, 7, 8]]


def test_a_checkpoint_gives_back_parameters_optimizer_and_random_state(tmp_path):
    parameters, optimizer = small_state()
    torch.manual_seed(5)
    path = save_checkpoint(tmp_path, Progress(step=3, tokens=70, identity={"a": 1}), parameters, optimizer)
    drawn = torch.rand(4)
    other, other_optimizer = small_state(7.0)
    progress = load_checkpoint(path, {"a": 1}, other, other_optimizer)
    assert (progress.step, progress.tokens) == (3, 70)
    assert torch.equal(torch.rand(4), drawn)
    assert torch.equal(other["w"], parameters["w"])
    for p, o in ((parameters, optimizer), (other, other_optimizer)):
        p["w"].square().sum().backward()
        o.step()
    assert torch.equal(other["w"], parameters["w"])


def test_what_a_kill_left_is_no_checkpoint(tmp_path):
    state = small_state()
    (tmp_path / ".step-00000009.123").mkdir()
    assert latest_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, Progress(step=2), *state)
    assert latest_checkpoint(tmp_path) == path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_writing_a_step_again_never_leaves_half_a_checkpoint(tmp_path, monkeypatch):
    state = small_state()
    path = save_checkpoint(tmp_path, Progress(step=2), *state)
    module = sys.modules["lorasmith.train.checkpoint"]
    whole = []
    rmtree = module.shutil.rmtree

    def watched(folder, **options):
        # A kill in the middle of this would leave `folder` broken: it must not be the checkpoint.
        whole.append(Path(folder) != path)
        rmtree(folder, **options)

    monkeypatch.setattr(module.shutil, "rmtree", watched)
    save_checkpoint(tmp_path, Progress(step=2), *state)
    assert whole
    assert all(whole)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "error", [OSError("no space"), SafetensorError("no space")], ids=["os", "safetensors"]
)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, error):
    state = small_state()
    path = save_checkpoint(tmp_path, Progress(step=2), *state)

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["lorasmith.train.checkpoint"], "save_file", full)
    with pytest.raises(OutputError, match=r"could not be written: no space.*last one is intact"):
        save_checkpoint(tmp_path, Progress(step=4), *state)
    assert latest_checkpoint(tmp_path) == path
    load_checkpoint(path, {}, *small_state())


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path, file):
    path = save_checkpoint(tmp_path, Progress(step=2), *small_state())
    content = (path / file).read_bytes()
    for damaged in (content[: len(content) // 2], b"", None):
        if damaged is None:
            (path / file).unlink()
        else:
            (path / file).write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"cannot be read.*Delete it to go on from the one before"):
            load_checkpoint(path, {}, *small_state())


def test_a_reason_is_given_for_what_was_left_at_its_default_only():
    assert "width 64" in TrainConfig().reasons(width=64)["lr"]
    assert set(TrainConfig(lr=1e-3, batch_size=4).reasons(width=64)) == {"schedule", "weight_decay"}


@pytest.mark.parametrize(
    ("family", "tied", "lora"),
    [
        ("llama", False, dict(targets=["embed_tokens", "lm_head"])),
        ("llama", True, dict(targets=["q_proj", "lm_head"], lora_bias=True)),
        ("llama", True, dict(targets=["q_proj"], trainable_tokens={"embed_tokens": [97, 98]})),
        ("llama", True, dict(targets=["q_proj"], modules_to_save=["lm_head", "model.norm"])),
        ("gpt2", True, dict(targets=["c_attn"], parts={"c_attn": [(0, 32), (64, 96)]})),
        ("mixtral", False, dict(targets=["q_proj"], target_parameters=["experts.down_proj"])),
    ],
)
def test_layers_of_other_kinds_train_resume_and_come_back_from_disk(tmp_path, family, tied, lora):
    make = lambda: base(family=family, tie_word_embeddings=tied)  # noqa: E731
    config = LoRAConfig(rank=2, alpha=8, **lora)
    given = make()
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    result = run(tmp_path / "run", base=given, lora=config)
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    adapter = read_adapter(tmp_path / "run" / "adapter")
    assert adapter.digest == result.adapter.digest
    model = make().model
    inject(model, adapter)
    measured = evaluate_loss(Forward(model), examples_of(HELD_OUT))
    close(torch.tensor(measured.loss), torch.tensor(result.eval_loss), torch.float32)

    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", base=make(), lora=config, on_step=stop)
    run(tmp_path / "stopped", base=make(), lora=config, resume=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "run")
