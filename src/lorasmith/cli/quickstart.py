"""`lorasmith quickstart`: plan, train, evaluate, merge and prove, on the built-in base and a shipped sample."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import JsonOption, print_json, say
from lorasmith.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from lorasmith.bases import Base
    from lorasmith.lora import Adapter
    from lorasmith.train import TrainConfig, TrainResult

BASE = "smollm2-135m"
SHOWN = 3
TIMED_STEPS = 5
TRAINING_SHARE = 0.5
"""Of `--minutes`: the rest loads, answers the test prompts twice, evaluates and proves."""


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the report.")] = Path("quickstart"),
    minutes: Annotated[float, typer.Option(help="Time to take, about.")] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """The whole story: a real model learns a real task, and the numbers prove it."""
    started = time.monotonic()
    if not 0 < minutes <= 24 * 60:
        raise ConfigError(f"--minutes {minutes}: use a positive number of minutes; 5 is the default.")
    if (out / "run.json").exists():
        raise OutputError(
            f"{out} holds a run already. Choose another folder with --out (make demo OUT=…), or remove it."
        )
    from lorasmith.bases import load_base
    from lorasmith.data import read_records, sample_path
    from lorasmith.lora import LoRAConfig
    from lorasmith.train import peak_rss_bytes, train, write_atomically

    say(f"1/5 base: {BASE}")
    base = load_base(BASE)
    test = read_records(sample_path("e2e/test"))
    plan = _plan(base)
    say(f"2/5 the base before training, on {len(test)} held-out restaurant descriptions")
    before = _measure(base, test, None)
    say(f"    BLEU {before['bleu']:.1f}, loss {before['loss']:.3f}")
    config, settings = LoRAConfig(), _settings(base, minutes)
    say(f"3/5 training {settings.max_steps} steps")
    result = train(
        base, sample_path("e2e/train"), config, settings, out=out, eval_data=sample_path("e2e/validation")
    )
    if result.interrupted or result.adapter is None:
        raise typer.Exit(130)
    say("4/5 the same questions to the adapter")
    after = _measure(base, test, result.adapter)
    say(f"    BLEU {after['bleu']:.1f}, loss {after['loss']:.3f}")
    say("5/5 merging, and proving that nothing else changed")
    proof = _prove(base, result.adapter)
    summary = _summary(before, after, result, proof, base, started)
    summary["report_html"] = str(out / "report.html")
    page = _page(out, summary, plan, test, before, after)
    write_atomically(out / "report.html", page)
    summary["wall_s"], summary["peak_rss_bytes"] = time.monotonic() - started, peak_rss_bytes()
    write_atomically(out / "quickstart.json", json.dumps(summary, indent=2) + "\n")
    if as_json:
        print_json(summary)
    else:
        _print(summary, test, before, after)


def _plan(base: Base) -> dict[str, Any]:
    """What LoRA and full fine-tuning keep in memory, before anything is spent."""
    from lorasmith.inject import resolve_targets
    from lorasmith.lora import LoRAConfig
    from lorasmith.planning import Shapes, full_memory, lora_memory

    config = LoRAConfig()
    targets = resolve_targets(base.model, config).chosen
    linears = {p: (int(m.out_features), int(m.in_features)) for p, m in targets.items()}  # type: ignore[arg-type]
    parameters = list(base.model.parameters())
    shapes = Shapes(sum(p.numel() for p in parameters), parameters[0].element_size(), linears)
    lora, full = lora_memory(shapes, config), full_memory(shapes)
    say(
        f"    plan: weights {_mb(lora.weights_bytes)}; gradients and optimizer "
        f"{_mb(lora.gradient_bytes + lora.optimizer_bytes)} with LoRA, "
        f"{_mb(full.gradient_bytes + full.optimizer_bytes)} for full fine-tuning; "
        f"{lora.trainable_params:,} parameters train instead of {full.trainable_params:,}"
    )
    return {"lora": lora.to_dict(), "full": full.to_dict()}


def _settings(base: Base, minutes: float) -> TrainConfig:
    """As many steps as fit the time, by timing a few; one epoch at most."""
    from lorasmith.data import sample_path
    from lorasmith.train import TrainConfig, read_metrics, train

    with tempfile.TemporaryDirectory() as scratch:
        timed = TrainConfig(max_steps=TIMED_STEPS, save_every=TIMED_STEPS)
        train(base, sample_path("e2e/train"), None, timed, out=scratch, quiet=True)
        seconds = sorted(row["step_s"] for row in read_metrics(Path(scratch) / "metrics.jsonl"))
    steps = int(minutes * 60 * TRAINING_SHARE / seconds[len(seconds) // 2])
    return TrainConfig(max_steps=max(4, min(steps, 250)))


def _measure(base: Base, test: Any, adapter: Adapter | None) -> dict[str, Any]:
    from lorasmith.cli.evaluate import answer, measure_loss
    from lorasmith.data import references
    from lorasmith.scoring import bleu

    loss, _ = measure_loss(base, test, adapter, max_length=1024)
    outputs = answer(base, test, adapter, max_tokens=80)
    return {"loss": loss, "outputs": outputs, "bleu": bleu(outputs, [references(r) for r in test])}


def _prove(base: Base, adapter: Adapter) -> dict[str, Any]:
    """Merged against unmerged logits in float32, and the base's bits after merge and unmerge."""
    import torch

    from lorasmith.bases import load_base
    from lorasmith.inject import eject, inject, merge, merged, unmerge

    ids = torch.tensor([base.tokenizer.encode("A coffee shop by the river, cheap and family friendly.")])
    pristine = {name: value.clone() for name, value in base.model.state_dict().items()}
    merge(base.model, adapter)
    changed = sum(not torch.equal(v, pristine[n]) for n, v in base.model.state_dict().items())
    unmerge(base.model)
    identical = all(torch.equal(v, pristine[n]) for n, v in base.model.state_dict().items())
    exact = load_base(BASE, dtype="fp32").model
    with torch.no_grad():
        inject(exact, adapter)
        unmerged = exact(ids).logits
        eject(exact)
        with merged(exact, adapter):
            difference = float((exact(ids).logits - unmerged).abs().max())
    return {
        "merged_max_abs_logit_diff": difference,
        "largest_logit": float(unmerged.abs().max()),
        "merged_tensors": changed,
        "unmerge_bit_identical": identical,
    }


def _summary(
    before: dict[str, Any],
    after: dict[str, Any],
    result: TrainResult,
    proof: dict[str, Any],
    base: Base,
    started: float,
) -> dict[str, Any]:
    from lorasmith.train import peak_rss_bytes

    assert base.directory is not None
    return {
        "base_bleu": before["bleu"],
        "tuned_bleu": after["bleu"],
        "base_loss": before["loss"],
        "tuned_loss": after["loss"],
        "adapter_dir": str(result.adapter_dir),
        "adapter_bytes": (result.adapter_dir / "adapter_model.safetensors").stat().st_size,
        "base_bytes": sum(f.stat().st_size for f in base.directory.glob("*.safetensors")),
        "trainable_params": result.trainable_params,
        "total_params": result.total_params,
        "train_steps": result.steps,
        "train_tokens_per_s": result.tokens_per_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "wall_s": time.monotonic() - started,
        **proof,
    }


def _page(
    out: Path,
    summary: dict[str, Any],
    plan: dict[str, Any],
    test: Any,
    before: dict[str, Any],
    after: dict[str, Any],
) -> str:
    from lorasmith.cli.report import page
    from lorasmith.data import references

    samples = [
        (record.prompt, references(record)[0], before["outputs"][i], after["outputs"][i])
        for i, record in enumerate(list(test)[:SHOWN])
    ]
    return page(summary, plan, samples, out / "loss.png", sizes(summary))


def sizes(s: dict[str, Any]) -> dict[str, int]:
    """Disk for a hundred tasks: one base and a hundred adapters, or a hundred models."""
    return {"adapters": s["base_bytes"] + 100 * s["adapter_bytes"], "models": 100 * s["base_bytes"]}


def _print(s: dict[str, Any], test: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    disk = sizes(s)
    for record, old, new in zip(list(test)[:SHOWN], before["outputs"], after["outputs"], strict=False):
        print(f"\n  asked   {record.prompt}\n  before  {_short(old)}\n  after   {_short(new)}")
    print(f"""
  BLEU      {s["base_bleu"]:6.1f}  →  {s["tuned_bleu"]:.1f}   (64 held-out meaning representations)
  loss      {s["base_loss"]:6.3f}  →  {s["tuned_loss"]:.3f}   (nats per answer token)
  trained   {s["trainable_params"]:,} of {s["total_params"]:,} parameters, {s["train_steps"]} steps, \
{s["train_tokens_per_s"]:,.0f} tokens/s
  sizes     adapter {_mb(s["adapter_bytes"])}, base {_mb(s["base_bytes"])}; \
a hundred tasks {disk["adapters"] / 1e9:.1f} GB instead of {disk["models"] / 1e9:.1f} GB
  merged    largest logit difference {s["merged_max_abs_logit_diff"]:.1e} in fp32 \
(logits up to {s["largest_logit"]:.0f}); base bit-identical after unmerge: {s["unmerge_bit_identical"]}
  took      {s["wall_s"]:.0f} s, {s["peak_rss_bytes"] / 1e9:.1f} GB at most
  report    {s["report_html"]}

  next:
    lorasmith generate --base {BASE} --adapter {s["adapter_dir"]} \\
        --prompt "Describe the restaurant: name[Aromi], eatType[pub], area[riverside]"
    lorasmith check {s["adapter_dir"]} --base {BASE}
    lorasmith train --base {BASE} --data your.jsonl --out runs/yours""")


def _short(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
