"""The claims that LoRA performs on a par with full fine-tuning, or better, with far fewer trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.claims.quality import linear
from lorasmith.claims.quality.arms import ARMS, MIB, Arm, Data, best_rate, run_arm, untuned
from lorasmith.claims.quality.draw import draw
from lorasmith.claims.quality.published import published
from lorasmith.claims.quality.record import keep_predictions
from lorasmith.claims.quality.scores import MEASURES
from lorasmith.claims.quality.statistics import paired_bootstrap, spread
from lorasmith.claims.quality.tasks import SIZES, data_of
from lorasmith.claims.quality.verdict import MARGIN, RULE, Compared

SEEDS = (0, 1, 2)
QUICK_TASKS = ("e2e",)
QUICK_METHODS = ("lora", "full", "bitfit")
LINEAR = "tf-idf"
NAMES = {"base": "the base, untuned", LINEAR: "TF-IDF and a linear SVM"} | {a.name: a.said for a in ARMS}
CAVEAT = "A small model and a few hundred examples: not the published tables over again."
Answers = dict[str, list[list[str]]]
"""Method → outputs of each seed."""


def measure(task: str, setting: Setting) -> Measured:
    """Train, answer and score every method on the task; keep every answer."""
    if setting.quick and task not in QUICK_TASKS:
        said = f"--quick trains on {QUICK_TASKS[0]} alone; {task} is measured by the full run."
        return Measured(Holds.NOT_AT_THIS_SCALE, said, {}, published(task))
    arms = [arm for arm in ARMS if arm.name in QUICK_METHODS] if setting.quick else ARMS
    seeds = SEEDS[:1] if setting.quick else SEEDS
    return concluded(task, measure_task(setting, data_of(task, quick=setting.quick), arms, seeds))


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


def concluded(task: str, part: Mapping[str, Any]) -> Measured:
    """Verdict, sentences and table of what `measure_task` found."""
    compared = _compared(part)
    figures = {**part, "lora_against_full": vars(compared), "margin": MARGIN}
    said = f"{_sentence(part['headline'], compared)} {CAVEAT}"
    return Measured(compared.holds, said, figures, [*_rows(task, part), *published(task)])


def _compared(part: Mapping[str, Any]) -> Compared:
    mean = {m: spread([s[part["headline"]] for s in runs])[0] for m, runs in part["scores"].items()}
    difference, low, high = part["against_full"]["lora"]
    return Compared(difference, low, high, len(part["scores"]["lora"]), mean["base"], mean["full"])


def _sentence(headline: str, c: Compared) -> str:
    name, percent = headline.removesuffix(" %"), " %" if headline.endswith(" %") else ""
    seeds = f"means of {c.seeds} seeds" if c.seeds > 1 else "one seed"
    return (
        f"{name[0].upper()}{name[1:]} {c.full + c.difference:.1f}{percent} with LoRA, {c.full:.1f}{percent} with full fine-tuning, "
        f"{c.base:.1f}{percent} untuned ({seeds}). LoRA is {c.difference:+.1f} points apart, 95 % interval over test items "
        f"{c.low:+.1f} to {c.high:+.1f}, against a margin of {MARGIN:g}."
    )


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


def _claim(task: str, title: str, source: str, expected: str, *, more: str) -> Claim:
    s = SIZES[task]
    design = (
        f"{s['train']} examples, {s['steps']} steps of 8, {s['test']} test items. Each method has the same steps and data "
        f"order; its learning rate is the one of three with the lowest validation loss after {s['search_steps']} steps; then "
        "three seeds. Greedy answers, cut at the first line; the test set is asked once a run, and every answer is kept "
        "(predictions/). LoRA and prefix train float32 numbers beside a base in the machine's own dtype (bfloat16 where it "
        "has it); the methods that train numbers of the base itself, or biases added to it, have it in float32. "
        "Prefix's trained numbers include the network that is dropped afterwards. Peak memory is that of the process, in "
        "which the runs follow each other: an upper bound. "
        f"{more} {RULE}"
    )
    return Claim(
        id=f"quality-{task}",
        title=title,
        claim="LoRA performs on a par with or better than full fine-tuning, though it trains far fewer parameters.",
        source=source,
        design=design,
        expected=expected,
        measure=partial(measure, task),
        draw=draw,
    )


QUALITY: tuple[Claim, ...] = (
    _claim(
        "e2e",
        "Quality: descriptions of restaurants (E2E)",
        "Hu et al. 2021, section 5.4, table 3",
        "GPT-2 M: BLEU 70.4 ± 0.1 with LoRA, 68.2 with full fine-tuning, 67.3 ± 0.6 with AdapterH.",
        more="BLEU is lowercased; NIST as pymteval; ROUGE-L and CIDEr by coco-caption's formulas without the PTB "
        "tokenizer. Slot errors are matches of strings; people's own references have 5.8 %. --quick: 12 steps, 24 items, "
        "three methods, one seed, fixed rates.",
    ),
    _claim(
        "clinc150",
        "Quality: the intent of a request (CLINC150)",
        "Hu et al. 2021, section 5.2, in the place of GLUE",
        "On a par: RoBERTa base averages 87.2 on GLUE with LoRA, 86.4 with full fine-tuning (table 2).",
        more="30 intents of two domains, and requests out of scope; the label is generated. A linear SVM over TF-IDF of "
        "the same examples stands beside.",
    ),
    _claim(
        "wikisql",
        "Quality: SQL for a question (WikiSQL)",
        "Hu et al. 2021, section 5.5, table 4",
        "GPT-3: 73.4 to 74.0 % (± 0.5) with LoRA, 73.8 % with full fine-tuning, 73.2 % with AdapterH.",
        more="Our sample has no table rows and fewer columns than WikiSQL: not "
        "comparable with its leaderboard.",
    ),
)
