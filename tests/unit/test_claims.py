"""The runner and the page: every claim is entered, whatever happens to one of them."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import pytest

from lorasmith.claims import CLAIMS, Claim, Holds, Measured, Setting, choose, run_claims
from lorasmith.cli.claims_page import claims_page
from lorasmith.drawing import label, panels
from lorasmith.errors import ConfigError, OutputError


def claim(name: str, measure, draw=None) -> Claim:
    return Claim(name, f"Title of {name}", "A <claim>.", "Paper, §1", "How.", "1", measure, draw)


def yes(setting: Setting) -> Measured:
    value = setting.cached({"claim": "yes"}, lambda: 2)
    return Measured(
        Holds.YES, "It is <2>.", {"value": value}, [{"arm": "a", "value": 2.0, "series": [1] * 99}]
    )


def no(setting: Setting) -> Measured:
    return Measured(Holds.NO, "It is not.")


def breaks(setting: Setting) -> Measured:
    raise ValueError("no such thing")


def draw(found: Measured, path) -> None:
    with panels(path) as (panel,):
        panel.plot([1, 2])
        label(panel, "a line", "x", "y")


@pytest.fixture
def setting(tmp_path):
    return Setting("some-base", True, tmp_path / "out", lambda text: None)


def test_a_claim_that_fails_is_entered_and_the_others_go_on(setting):
    seen = []
    claims = [claim("a", yes, draw), claim("b", breaks), claim("c", no)]
    document = run_claims(claims, setting, order="abc", on_done=lambda d: seen.append(len(d["claims"])))
    a, b, c = document["claims"]
    assert [e["holds"] for e in (a, b, c)] == ["holds", None, "does not hold"]
    assert b["error"] == "ValueError: no such thing"
    assert "in breaks" in b["traceback"]
    assert seen == [1, 2, 3]
    assert (setting.out / a["plot"]).read_bytes()[1:4] == b"PNG"
    assert json.loads((setting.out / "claims.json").read_text()) == document
    assert {"id", "expected", "measured", "holds"} <= a.keys()


def test_an_interruption_keeps_what_is_done_and_a_second_call_goes_on(setting):
    def stop(_: Setting) -> Measured:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_claims([claim("a", yes), claim("b", stop)], setting, order="ab")
    assert [e["id"] for e in json.loads((setting.out / "claims.json").read_text())["claims"]] == ["a"]

    def again(s: Setting) -> Measured:
        assert s.cached({"claim": "yes"}, lambda: 3) == 2
        return no(s)

    document = run_claims([claim("a", again), claim("b", no)], setting, order="ab")
    assert [e["holds"] for e in document["claims"]] == ["does not hold"] * 2


def test_pieces_make_a_whole_in_the_report_s_order(setting):
    run_claims([claim("b", no)], setting, order="ab")
    document = run_claims([claim("a", yes)], setting, order="ab")
    assert [e["id"] for e in document["claims"]] == ["a", "b"]


@pytest.mark.parametrize("change", [{"base": "other"}, {"quick": False}])
def test_entries_of_another_base_or_size_are_not_mixed_in(setting, change):
    run_claims([claim("b", no)], setting, order="ab")
    document = run_claims([claim("a", yes)], replace(setting, **change), order="ab")
    assert [e["id"] for e in document["claims"]] == ["a"]


def test_a_damaged_file_is_written_anew(setting):
    setting.out.mkdir()
    (setting.out / "claims.json").write_text("{")
    assert len(run_claims([claim("a", yes)], setting, order="a")["claims"]) == 1


def test_a_place_that_cannot_be_written_is_refused(setting):
    setting.out.parent.joinpath("out").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        run_claims([claim("a", yes)], setting, order="a")


def test_ids_are_unique_and_unknown_ones_are_refused():
    ids = [c.id for c in CLAIMS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9-]+", i) for i in ids)
    assert [c.id for c in choose([ids[1]])] == [ids[1]]
    assert choose([]) == CLAIMS
    with pytest.raises(ConfigError, match=f'no claim is called "{ids[0]}s".*{ids[0]}'):
        choose([f"{ids[0]}s"])


def test_the_page_holds_every_verdict_plot_and_number(setting):
    claims = [claim("a", yes, draw), claim("b", breaks), claim("c", no)]
    document = run_claims(claims, setting, order="abc")
    page = claims_page(document, setting.out)
    plot = base64.b64encode((setting.out / "plots/a.png").read_bytes()).decode()
    assert page.count("<img") == 1
    assert f'src="data:image/png;base64,{plot}"' in page
    assert 'alt="Plot: Title of a. It is &lt;2&gt;."' in page
    assert "A &lt;claim&gt;." in page
    assert [
        page.count(f"{mark} {name}</span>") for mark, name in (("✓", "holds"), ("✗", "does not hold"))
    ] == [2, 2]
    assert "ValueError: no such thing" in page
    assert "<td class=n>2</tr>" in page
    assert "series" not in page
    assert not re.search(r'(src|href)="https?:', page)
