"""`lorasmith claims` as a user calls it."""

from __future__ import annotations

import json

from tests.support.base import write_tiny_base
from tests.support.cli import answer, run


def test_one_claim_from_the_command_to_the_page(tmp_path):
    base, out = write_tiny_base(tmp_path / "tiny"), tmp_path / "out"
    asked = ("claims", "--base", base, "--quick", "--only", "identity-at-start", "--out", out)
    found = answer(*asked)
    (claim,) = found["claims"]
    assert (claim["id"], claim["holds"]) == ("identity-at-start", "holds")
    assert json.loads((out / "claims.json").read_text())["claims"] == [claim]
    assert claim["title"] in (out / "report.html").read_text()
    assert str(out / "report.html") == found["report_html"]
    (cached,) = (out / "cache").iterdir()
    stamp = cached.stat().st_mtime_ns
    again = answer(*asked)["claims"][0]
    assert again["rows"] == claim["rows"]
    assert cached.stat().st_mtime_ns == stamp


def test_bad_input_writes_nothing(tmp_path):
    for words in (("--only", "identity-at-strat"), ("--base", tmp_path / "nowhere")):
        result = run("claims", "--out", tmp_path / "out", *words)
        assert result.exit_code == 2, result.output
        assert not (tmp_path / "out").exists()
    assert (
        '"identity-at-start"'
        in run("claims", "--out", tmp_path / "out", "--only", "identity-at-strat").stderr
    )
