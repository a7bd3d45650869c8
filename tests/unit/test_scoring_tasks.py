"""Slot errors, logical forms and intents, by hand; and on the samples that ship."""

from __future__ import annotations

import json

import pytest

from lorasmith.data import sample_path
from lorasmith.scoring import (
    in_scope_accuracy,
    is_same_form,
    is_valid_sql,
    logical_form,
    logical_form_accuracy,
    out_of_scope_recall,
    slot_error_rate,
    slot_faults,
    valid_sql_rate,
)

MEANING = "Describe the restaurant: name[Aromi], food[Chinese], area[riverside], familyFriendly[no], customer rating[3 out of 5]"
GOOD = "Aromi, by the river, serves Chinese food, is rated three stars and is not for families."


def rows(name: str):
    return [json.loads(line) for line in sample_path(name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("output", "faults"),
    [
        (GOOD, []),
        (GOOD.replace("not for", "for"), ["familyfriendly"]),
        (GOOD.replace("not for families", "adults only"), []),
        (GOOD.replace("three stars", "well"), ["customer rating"]),
        (GOOD.replace("three stars", "3 out of 5"), []),
        (GOOD.replace("Aromi", "Aromas").replace("Chinese", "Thai"), ["name", "food"]),
        (GOOD + " It is cheap.", ["pricerange"]),
        ("", ["name", "food", "area", "familyfriendly", "customer rating"]),
    ],
)
def test_slot_faults(output, faults):
    assert slot_faults(output, MEANING) == faults


def test_slot_error_rate_is_faults_over_slots():
    assert slot_error_rate([GOOD, ""], [MEANING, MEANING]) == 5 / 10
    assert slot_faults("A pub called X. Kids are welcome.", "name[X]") == ["familyfriendly"]


def test_people_make_few_slot_errors_and_another_restaurants_text_many():
    test = rows("e2e/test")
    own = [row["references"][0] for row in test]
    meanings = [row["prompt"] for row in test]
    assert slot_error_rate(own, meanings) < 0.1
    assert slot_error_rate(own[1:] + own[:1], meanings) > 3 * slot_error_rate(own, meanings)


def test_logical_form_does_not_see_case_order_or_space():
    a = """SELECT COUNT("irst") FROM t WHERE "date" = '1 May' AND "no. of episodes" > '3'"""
    b = """select count( "IRST" )  from t where "no. of episodes" > '3' and "Date" = '1 MAY';"""
    assert is_same_form(a, b)


@pytest.mark.parametrize(
    "other",
    [
        """SELECT MAX("a") FROM t WHERE "b" = 'x'""",
        """SELECT "a" FROM t""",
        """SELECT "b" FROM t WHERE "b" = 'x'""",
        """SELECT "a" FROM t WHERE "b" > 'x'""",
        """SELECT "a" FROM t WHERE "b" = 'y'""",
        """SELECT "a" FROM t WHERE "b" = 'x' AND "b" = 'x'""",  # a multiset
        """SELECT "a" FROM t WHERE "b" = 'x' AND""",
        """SELECT COUNT("a" FROM t WHERE "b" = 'x'""",
        "",
    ],
)
def test_another_logical_form(other):
    this = """SELECT "a" FROM t WHERE "b" = 'x'"""
    assert is_same_form(this, this)
    assert not is_same_form(other, this)


def test_quotes_and_the_word_and_within_values():
    form = logical_form("""SELECT "a" FROM t WHERE "b" = 'rock and roll''s' AND "c" = '5'""")
    assert form is not None
    assert dict(form.conditions) == {("b", "=", "rock and roll's"): 1, ("c", "=", "5"): 1}


def test_every_shipped_statement_has_the_form_that_the_data_say():
    for row in [r for part in ("train", "validation", "test") for r in rows(f"wikisql/{part}")]:
        form, said = logical_form(row["completion"]), lambda text: " ".join(text.lower().split())
        assert form is not None
        wanted = [(said(column), op, said(value)) for column, op, value in row["conds"]]
        found = [each for each, number in form.conditions for _ in range(number)]
        assert (form.aggregate, form.column) == (row["agg"].lower(), said(row["sel"]))
        assert sorted(found) == sorted(wanted)
        assert is_valid_sql(row["completion"], row["columns"])


def test_rates_of_sql():
    good, bad = """SELECT "a" FROM t""", """SELECT "z" FROM t"""
    assert logical_form_accuracy([good, bad], [good, good]) == 0.5
    assert valid_sql_rate([good, bad, "SELECT a FROM", "DROP TABLE t"], [["a"]] * 4) == 0.25
    assert not is_valid_sql("SELECT 1; SELECT 2", ["a"])


def test_intents():
    labels = ["pay bill", "out of scope", "out of scope", "freeze account"]
    outputs = ["Pay bill", "out of scope", "pay bill", "out of scope"]
    assert in_scope_accuracy(outputs, labels) == 0.5
    assert out_of_scope_recall(outputs, labels) == 0.5
    assert in_scope_accuracy(["a"], ["out of scope"]) is None
    assert out_of_scope_recall(["a"], ["pay bill"]) is None


@pytest.mark.parametrize("task", ["clinc150", "wikisql"])
def test_samples_share_nothing_between_their_splits_and_carry_their_licence(task):
    train, validation, test = (
        {row["prompt"] for row in rows(f"{task}/{part}")} for part in ("train", "validation", "test")
    )
    assert not train & (validation | test)
    assert not validation & test
    licence = (sample_path(f"{task}/test").parent / "LICENCE.md").read_text()
    assert {"clinc150": "CC BY 3.0", "wikisql": "BSD 3-Clause"}[task] in licence


def test_clinc_has_every_intent_in_every_split():
    splits = [{row["completion"] for row in rows(f"clinc150/{p}")} for p in ("train", "validation", "test")]
    assert splits[0] == splits[1] == splits[2]
    assert len(splits[0]) == 31
