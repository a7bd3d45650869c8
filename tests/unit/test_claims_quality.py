"""The quality claim: its verdict rule, its statistics, its record; the arms on a tiny model."""

from __future__ import annotations

import gzip
import importlib
import json
from dataclasses import replace

import numpy as np
import pytest

from lorasmith.claims import Holds, Setting
from lorasmith.claims.quality import QUALITY, linear, quality, rescore
from lorasmith.claims.quality import arms as arms_module
from lorasmith.claims.quality.arms import ARMS, Arm, Data, best_rate, run_arm
from lorasmith.claims.quality.record import keep_predictions
from lorasmith.claims.quality.scores import MEASURES
from lorasmith.claims.quality.statistics import paired_bootstrap, spread
from lorasmith.claims.quality.tasks import TASKS, data_of
from lorasmith.claims.quality.verdict import MARGIN, Compared
from lorasmith.errors import DataError
from tests.support.base import write_tiny_base

PAR = Compared(0.5, -2.0, 3.0, seeds=3, base=10.0, full=40.0)
WORSE = replace(PAR, difference=-8.0, low=-12.0, high=-4.0)
WIDE = replace(PAR, low=-6.0, high=7.0)


@pytest.mark.parametrize(
    ("compared", "holds"),
    [
        (PAR, Holds.YES),
        (replace(PAR, difference=9.0, low=6.0, high=12.0), Holds.YES),
        # within the margin
        (replace(PAR, difference=-1.0, low=-MARGIN + 0.1, high=-0.1), Holds.YES),
        (replace(PAR, low=-MARGIN), Holds.NOT_AT_THIS_SCALE),
        (WORSE, Holds.NO),
        (WIDE, Holds.NOT_AT_THIS_SCALE),
        (replace(PAR, seeds=1), Holds.NOT_AT_THIS_SCALE),
        (replace(WORSE, seeds=1), Holds.NOT_AT_THIS_SCALE),
        # full fine-tuning learned nothing: being its equal is no feat
        (replace(PAR, full=10.0), Holds.NOT_AT_THIS_SCALE),
    ],
)
def test_verdict(compared, holds):
    assert compared.holds == holds


def test_bootstrap_interval_is_that_of_the_mean_difference():
    # Items of score ±1 around a difference of 0.2: the interval of a mean has half-width 1.96 s/√n.
    rng = np.random.default_rng(3)
    difference = rng.normal(0.2, 1.0, 400)
    theirs = rng.normal(0.0, 5.0, 400)  # far wider, and common to both: pairing takes it out
    ours = theirs + difference
    column = lambda values: np.stack([values, np.ones_like(values)], axis=1)  # noqa: E731
    mean, low, high = paired_bootstrap([column(ours)], [column(theirs)], lambda sums: sums[0] / sums[1])
    assert mean == pytest.approx(difference.mean())
    half = 1.96 * difference.std(ddof=1) / 20
    assert (high - mean, mean - low) == pytest.approx((half, half), rel=0.1)


def test_bootstrap_of_equal_runs_is_zero_and_seeds_are_averaged():
    items = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    score = lambda sums: 100 * sums[0] / sums[1]  # noqa: E731
    assert paired_bootstrap([items], [items], score) == (0.0, 0.0, 0.0)
    ones, zeros = np.ones((5, 2)), np.array([[0.0, 1.0]] * 5)
    assert paired_bootstrap([ones, zeros], [zeros, zeros], score) == (50.0, 50.0, 50.0)


def test_spread():
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert spread([4.0]) == (4.0, None)


@pytest.mark.parametrize("task", TASKS)
def test_headline_of_all_items_is_the_metric(task):
    data = data_of(task, quick=True)
    outputs = [row["completion"] for row in data.test]
    outputs[::2] = ["The Punter is a pub near the river ."] * len(outputs[::2])
    measure = MEASURES[task]
    scores = measure.all(outputs, data.test)
    total = measure.total(measure.items(outputs, data.test).sum(0))
    assert scores[measure.headline] == pytest.approx(total, abs=1e-6)
    perfect = measure.all([row["completion"] for row in data.test], data.test)
    assert 0 < scores[measure.headline] < perfect[measure.headline] == pytest.approx(100)


def made_up(*, wrong: str = "", seeds: int = 3) -> dict:
    """A part as `measure_task` gives it: the base is always wrong, `wrong` half the time, the others rarely."""
    data, methods = data_of("clinc150"), ("base", "full", "lora")
    rng, answers = np.random.default_rng(0), {}
    for method in methods:
        share = {"base": 0.0, wrong: 0.5}.get(method, 0.8)
        right = [rng.random(len(data.test)) < share for _ in range(1 if method == "base" else seeds)]
        answers[method] = [
            [row["completion"] if hit else "x" for row, hit in zip(data.test, hits, strict=True)]
            for hits in right
        ]
    cost = {"params": 1_000_000, "train_s": 1.5, "train_cpu_s": 1.0, "peak_bytes": 2**30}
    costs = {m: [cost] * seeds for m in methods if m != "base"}
    rates = {m: {"rate": 1e-3, "losses": {}} for m in methods if m != "base"}
    return quality.scored(data, answers) | {"costs": costs, "rates": rates}


def test_conclusion_from_made_up_answers(tmp_path):
    found = quality.concluded("clinc150", made_up())
    compared = found.figures["lora_against_full"]
    assert abs(compared["difference"]) < 5
    assert found.holds in (Holds.YES, Holds.NOT_AT_THIS_SCALE)
    assert {len(row) for row in found.rows} == {10}
    assert any("published" in row["method"] for row in found.rows)
    assert "0.0 % untuned" in found.said
    json.dumps(found.figures)
    QUALITY[1].draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_lora_that_answers_worse_does_not_hold_and_better_does():
    worse, better = made_up(wrong="lora"), made_up(wrong="full")
    assert quality.concluded("clinc150", worse).holds == Holds.NO
    assert quality.concluded("clinc150", better).holds == Holds.YES


def test_quick_measures_one_task_and_says_so_of_the_others(tmp_path):
    for claim in QUALITY[1:]:
        found = claim.measure(Setting("no-such-base", True, tmp_path, lambda text: None))
        assert found.holds == Holds.NOT_AT_THIS_SCALE
        assert "full run" in found.said
        claim.draw(found, tmp_path / "plot.png")


def test_table_says_what_the_svm_needs_where_it_is_absent():
    found = quality.concluded("clinc150", made_up())
    (row,) = [row for row in found.rows if "SVM" in row["method"]]
    assert "lorasmith[claims]" in row["note"]
    assert row["score"] == ""


def test_tf_idf_beats_guessing_by_far():
    pytest.importorskip("sklearn")
    data = data_of("clinc150")
    scores = MEASURES["clinc150"].all(linear.classified(data)["outputs"], data.test)
    assert scores["in-scope accuracy %"] > 50  # one label for all would get 3.3


@pytest.fixture
def record(tmp_path):
    data = data_of("wikisql", quick=True)
    good = [row["completion"] for row in data.test]
    keep_predictions(tmp_path, data, {"lora-0": good, "full-0": ["SELECT 1"] * len(good)}, quick=True)
    return tmp_path


def test_rescoring_agrees_with_what_was_stored(record):
    found = rescore(record)
    assert all(each.agrees for each in found)
    values = {(each.file, each.metric): each.now for each in found}
    assert values["wikisql-lora-0.jsonl", "logical form %"] == 100
    assert values["wikisql-full-0.jsonl", "logical form %"] == 0


def test_rescoring_detects_a_changed_prediction_zipped_or_not(record):
    path = record / "predictions/wikisql-lora-0.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"output": "SELECT nothing"})
    path.with_name(path.name + ".gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    path.unlink()
    wrong = [each for each in rescore(record) if not each.agrees]
    assert {(each.file, each.metric) for each in wrong} == {
        ("wikisql-lora-0.jsonl", "logical form %"), ("wikisql-lora-0.jsonl", "valid SQL %"),
    }  # fmt: skip


def test_rescoring_detects_a_changed_score(record):
    path = record / "predictions/scores.json"
    stored = json.loads(path.read_text())
    stored["wikisql-full-0.jsonl"]["scores"]["logical form %"] = 99.0
    del stored["wikisql-lora-0.jsonl"]["scores"]["valid SQL %"]
    path.write_text(json.dumps(stored))
    assert {(e.file, e.stored) for e in rescore(record) if not e.agrees} == {
        ("wikisql-full-0.jsonl", 99.0), ("wikisql-lora-0.jsonl", None),
    }  # fmt: skip


def test_rescoring_refuses_what_it_cannot_compare(record, tmp_path):
    with pytest.raises(DataError, match="holds no predictions"):
        rescore(tmp_path / "nothing")
    path = record / "predictions/wikisql-lora-0.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match="not the 24 of wikisql's test set"):
        rescore(record)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        rescore(record)
    stored = json.loads((record / "predictions/scores.json").read_text())
    stored["wikisql-full-0.jsonl"]["data"] = "another"
    (record / "predictions/scores.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match="another version of wikisql"):
        rescore(record)


DATA = Data("e2e", [{"prompt": "a", "completion": "b"}] * 8, [], [], steps=1, search_steps=1, max_tokens=4)


def test_the_rate_of_the_lowest_validation_loss_is_taken_and_a_diverged_one_never(tmp_path, monkeypatch):
    losses = {1e-3: 2.0, 2e-3: None, 4e-3: 1.5}
    monkeypatch.setattr(arms_module, "_searched", lambda s, arm, data, rate: losses[rate])
    arm, setting = Arm("lora", "LoRA", tuple(losses)), Setting("b", False, tmp_path, lambda text: None)
    assert best_rate(setting, arm, DATA) == {
        "rate": 4e-3, "losses": {"0.001": 2.0, "0.002": None, "0.004": 1.5},
    }  # fmt: skip
    assert best_rate(replace(setting, quick=True), arm, DATA)["rate"] == 2e-3


def test_every_method_trains_and_answers_on_a_tiny_model(tmp_path):
    base = write_tiny_base(tmp_path / "base", max_position_embeddings=512)
    data = replace(data_of("e2e", quick=True), steps=1, max_tokens=3)
    data = replace(data, train=data.train[:8], test=data.test[:2])
    setting = Setting(str(base), True, tmp_path / "out", lambda text: None)
    assert len(arms_module.untuned(setting, data)) == 2
    for arm in ARMS:
        run = run_arm(setting, arm, data, 1e-3, 0)
        assert len(run["outputs"]) == 2
        assert run["params"] > 0
        assert run["peak_bytes"] > 2**20
        assert run_arm(setting, arm, data, 1e-3, 0) == run  # from the cache
    assert len(list((tmp_path / "out/cache").iterdir())) == 1 + len(ARMS)


def test_a_run_that_was_stopped_is_not_kept(tmp_path, monkeypatch):
    class Stopped:
        interrupted = True

    room = importlib.import_module("lorasmith.train")  # `lorasmith.train` itself is the verb
    monkeypatch.setattr(room, "train", lambda *args, **kwargs: Stopped())
    monkeypatch.setattr(Setting, "load", lambda self, dtype="auto": None)
    setting = Setting("b", True, tmp_path, lambda text: None)
    with pytest.raises(KeyboardInterrupt):
        run_arm(setting, ARMS[0], DATA, 1e-3, 0)
    assert not (tmp_path / "cache").exists()
