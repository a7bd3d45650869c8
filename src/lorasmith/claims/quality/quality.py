"""The claim that LoRA performs on a par with full fine-tuning, or better, with far fewer trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.quality import linear
from lorasmith.claims.quality.arms import ARMS, MIB, Arm, Data, best_rate, run_arm, untuned
from lorasmith.claims.quality.draw import draw
from lorasmith.claims.quality.published import published
from lorasmith.claims.quality.record import keep_predictions
from lorasmith.claims.quality.scores import MEASURES
from lorasmith.claims.quality.statistics import paired_bootstrap, spread
from lorasmith.claims.quality.tasks import SIZES, TASKS, data_of
from lorasmith.claims.quality.verdict import RULE, Compared, verdict

SEEDS = (0, 1, 2)
QUICK_METHODS = ("lora", "full", "bitfit")
SQL_METHODS = ("lora", "full", "houlsby")
LINEAR = "tf-idf"
NAMES = {"base": "the base, untuned", LINEAR: "TF-IDF and a linear SVM"} | {a.name: a.said for a in ARMS}
Answers = dict[str, list[list[str]]]
"""Method → outputs of each seed."""


def plan(*, quick: bool) -> dict[str, tuple[Arm, ...]]:
    """Which methods are trained on which task."""
    if quick:
        return {"e2e": tuple(arm for arm in ARMS if arm.name in QUICK_METHODS)}
    return {t: tuple(a for a in ARMS if t != "wikisql" or a.name in SQL_METHODS) for t in TASKS}


def measure(setting: Setting) -> Measured:
    """Train, answer and score every method on every task; keep every answer."""
    seeds, asked = (SEEDS[:1] if setting.quick else SEEDS), plan(quick=setting.quick)
    found = {
        task: measure_task(setting, data_of(task, quick=setting.quick), arms, seeds)
        for task, arms in asked.items()
    }
    return concluded(found, list(asked))


def measure_task(setting: Setting, data: Data, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, Any]:
    """Answers, costs, scores and comparisons of one task."""
    answers: Answers = {"base": [untuned(setting, data)]}
    costs: dict[str, list[dict[str, Any]]] = {}
    rates: dict[str, dict[str, Any]] = {}
    for arm in arms:
        rates[arm.name] = best_rate(setting, arm, data)
    for seed in seeds:
        for arm in arms:
            run = run_arm(setting, arm, data, rates[arm.name]["rate"], seed)
            answers.setdefault(arm.name, []).append(run["outputs"])
            costs.setdefault(arm.name, []).append({k: v for k, v in run.items() if k != "outputs"})
    if data.task == "clinc150" and linear.is_available():
        run = linear.classified(data)
        answers[LINEAR], costs[LINEAR] = [run.pop("outputs")], [run]
    named = {f"{m}-{seed}": o for m, runs in answers.items() for seed, o in zip(SEEDS, runs, strict=False)}
    keep_predictions(setting.out, data, named, quick=setting.quick)
    return scored(data, answers) | {"costs": costs, "rates": rates}


def scored(data: Data, answers: Answers) -> dict[str, Any]:
    """Scores of every seed, their spread, and each method against full fine-tuning."""
    measured = MEASURES[data.task]
    scores = {m: [measured.all(o, data.test) for o in runs] for m, runs in answers.items()}
    items = {m: [measured.items(o, data.test) for o in runs] for m, runs in answers.items()}
    against = {
        m: paired_bootstrap(runs, items["full"], measured.total)
        for m, runs in items.items()
        if m not in ("full", "base")
    }
    return {"headline": measured.headline, "scores": scores, "against_full": against}


def concluded(found: Mapping[str, Mapping[str, Any]], asked: Sequence[str]) -> Measured:
    """Verdict, sentences and table of what `measure_task` found on each task."""
    compared = {task: _compared(part) for task, part in found.items()}
    holds = verdict(compared, asked)
    said = " ".join(_sentence(task, found[task]["headline"], each) for task, each in compared.items())
    rows = [row for task, part in found.items() for row in (*_rows(task, part), *published(task))]
    figures = {
        task: {**part, "lora_against_full": vars(compared[task]), "finding": compared[task].finding}
        for task, part in found.items()
    }
    return Measured(holds, f"{said} {_caveat(holds)}", figures | {"rule": RULE}, rows)


def _compared(part: Mapping[str, Any]) -> Compared:
    mean = {m: spread([s[part["headline"]] for s in runs])[0] for m, runs in part["scores"].items()}
    difference, low, high = part["against_full"]["lora"]
    return Compared(difference, low, high, len(part["scores"]["lora"]), mean["base"], mean["full"])


def _sentence(task: str, headline: str, c: Compared) -> str:
    seeds = f"{c.seeds} seeds" if c.seeds > 1 else "one seed"
    return (
        f"{task}: LoRA {c.full + c.difference:.1f} against {c.full:.1f} {headline} of full fine-tuning ({seeds}; untuned "
        f"{c.base:.1f}), a difference of {c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]: {c.finding}."
    )


def _caveat(holds: Holds) -> str:
    text = (
        "A 135 M model and a few hundred examples, so not the published tables over again; the interval is over test "
        "items. "
    )
    if holds == Holds.NOT_AT_THIS_SCALE:
        text += "Too little was measured to call it either way by the stated rule."
    return text.strip()


def _rows(task: str, part: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [*part["scores"]]
    rows = [_row(task, name, part) for name in names]
    if task == "clinc150" and LINEAR not in names:
        rows.append(_empty(task, NAMES[LINEAR], linear.EXTRA))
    return rows


def _row(task: str, name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    runs, costs = part["scores"][name], part["costs"].get(name, [])
    headline = part["headline"]
    others = ", ".join(_shown(metric, runs, digits=2) for metric in runs[0] if metric != headline)
    row = _empty(task, NAMES[name], "" if len(runs) > 1 or name == "base" else "one run")
    row |= {"score": _shown(headline, runs, digits=1), "other scores": others}
    if name in part["against_full"]:
        row["against full"] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*part["against_full"][name])
    if name in part["rates"]:
        row["rate"] = f"{part['rates'][name]['rate']:g}"
    if costs:
        row["trained"] = f"{costs[0]['params']:,}"
        row["time"] = f"{spread([c['train_s'] for c in costs])[0]:.3g} s"
        if all("train_cpu_s" in c for c in costs):
            row["time"] += f" ({spread([c['train_cpu_s'] for c in costs])[0]:.3g} s of CPU)"
        if all("peak_bytes" in c for c in costs):
            row["peak memory"] = f"{max(c['peak_bytes'] for c in costs) / MIB:,.0f} MiB"
    return row


def _empty(task: str, method: str, note: str) -> dict[str, Any]:
    keys = (
        "task", "method", "trained", "rate", "score", "against full", "other scores", "time", "peak memory", "note",
    )  # fmt: skip
    return dict.fromkeys(keys, "") | {"task": task, "method": method, "note": note}


def _shown(metric: str, runs: Sequence[Mapping[str, float]], *, digits: int) -> str:
    mean, deviation = spread([run[metric] for run in runs if metric in run])
    return f"{metric} {mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def _sizes() -> str:
    each = (
        f"{task}: {s['train']} examples, {s['steps']} steps of 8, {s['test']} test items"
        for task, s in SIZES.items()
    )
    return "; ".join(each)


QUALITY: tuple[Claim, ...] = (
    Claim(
        id="quality",
        title="Quality against full fine-tuning and the other methods",
        claim="LoRA performs on a par with or better than full fine-tuning, though it trains far fewer parameters.",
        source="Hu et al. 2021, abstract, section 5, tables 3 and 4",
        design=(
            f"Three tasks ({_sizes()}). Each method has the same steps and data order; its learning rate is the one "
            "of three with the lowest validation loss after a shorter run (12 steps; 24 on clinc150); then three seeds. "
            "Greedy answers, cut at the first line; the test set is asked once per run. LoRA and prefix train float32 "
            "numbers beside a base in the machine's own dtype (bfloat16 here); the methods that train numbers of the "
            "base itself have it in float32. wikisql: LoRA, full and Houlsby only. CIDEr and ROUGE-L by coco-caption's "
            "formulas without the PTB tokenizer; NIST as pymteval. Our wikisql has no table rows and fewer columns: "
            f"not comparable with its leaderboard. Quick: e2e, three methods, one seed, fixed rates, 12 steps. {RULE}"
        ),
        expected="E2E, GPT-2 M: BLEU 70.4 (LoRA) against 68.2 (full). WikiSQL, GPT-3: 73.4-74.0 % against 73.8 %.",
        measure=measure,
        draw=draw,
    ),
)
