"""Every code block of the documentation: run, or compared with what exists."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import lorasmith as ls
from lorasmith.claims import rescore
from lorasmith.cli.app import app
from tests.support.base import write_tiny_base
from tests.support.commands import command_lines, unknown_options

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CLAIMS_RECORD = ROOT / "benchmarks/records/claims"
PAGES = sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.M | re.S)
# Pages whose Python needs what their own test makes.
OWN_TESTS = {"pixels.md": "tests/e2e/test_pixels.py"}
KINDS = {"python", "sh", "bash", "json", "text", "toml"}


def blocks(page: str, *kinds: str) -> list[str]:
    found = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    return [
        textwrap.dedent(indent + text if indent else text) for indent, kind, text in found if kind in kinds
    ]


def shell(page: str) -> list[list[str]]:
    return [words for block in blocks(page, "sh", "bash") for words in command_lines(block)]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_tested(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert {kind for _, kind, _ in BLOCK.findall(text)} <= KINDS
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(BLOCK.findall(text))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")])
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    if page in OWN_TESTS:
        assert (ROOT / OWN_TESTS[page]).is_file()
        return
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if shell(p)])
def test_commands_and_options_exist(page):
    for words in shell(page):
        assert not unknown_options(words), f"{page}: {words}"


@pytest.mark.parametrize("page", PAGES)
def test_json_and_toml_parse(page):
    for block in blocks(page, "json"):
        json.loads(block)
    for block in blocks(page, "toml"):
        tomllib.loads(block)


def test_the_tutorial_s_commands_work_from_first_to_last(tmp_path, monkeypatch):
    """On a tiny base, and with the first records of the sample; the server has tests of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORASMITH_HOME", str(tmp_path / "home"))
    (copy,) = blocks("tutorial.md", "python")
    exec(compile(copy, "tutorial.md", "exec"), {})
    for file in (tmp_path / "e2e").glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:24]))
    base = str(write_tiny_base(tmp_path / "tiny", max_position_embeddings=1024))
    done = []
    for words in shell("tutorial.md"):
        if words[0] == "serve":
            continue
        given = [
            "3" if last == "--max-steps" else word for last, word in zip(["", *words], words, strict=False)
        ]
        result = CliRunner().invoke(app, [base if word == "smollm2-135m" else word for word in given])
        assert result.exit_code == 0, f"{words}\n{result.output}"
        done.append(words[0])
    assert {"data", "train", "generate", "check", "inspect", "merge", "export", "store"} == set(done)
    assert (
        ls.read_adapter(tmp_path / "for-vllm").digest == ls.read_adapter(tmp_path / "runs/e2e/adapter").digest
    )


def test_copied_figures_are_the_records():
    for name in ("train_losses.png", "loss_parity.png"):
        assert (DOCS / "figures" / name).read_bytes() == (ROOT / "benchmarks/records" / name).read_bytes()
    for name in re.findall(r"figures/(\S+\.png)", (DOCS / "paper.md").read_text()):
        assert (DOCS / "figures" / name).read_bytes() == (CLAIMS_RECORD / "plots" / name).read_bytes()


def test_the_verdicts_are_the_records():
    claims = json.loads((CLAIMS_RECORD / "claims.json").read_text())["claims"]
    shown = re.findall(r"^\| (.+?) \| .+? \| (.+?) \|$", (DOCS / "paper.md").read_text(), re.M)
    assert dict(shown[1:]) == {claim["title"]: claim["holds"] for claim in claims}


def test_the_records_answers_score_what_is_stored_with_them():
    found = rescore(CLAIMS_RECORD)
    assert len({each.file for each in found}) > 30
    assert [each for each in found if not each.agrees] == []


TABLE = re.compile(r"<!-- figures: (\S+) -->\n\n(.*?)\n\n", re.S)
LINES = {
    "step of 8 × 256 tokens / PEFT, s": "bf16 step / PEFT, s",
    "its peak memory / PEFT, MB": "bf16 peak memory / PEFT, MB",
    "the same, `--recompute mlp`, s": "bf16 step, recompute mlp / PEFT, s",
    "its peak memory, MB": "bf16 peak memory, recompute mlp / PEFT, MB",
    "step / our own full fine-tuning, s": "bf16 step / our full fine-tuning step",
    "16 adapters, batch 32 / our plain base": "16 adapters mixed / our plain base, batch 32",
    "one adapter, batch 8 / stock transformers' base": "one adapter, batch 8 / stock transformers base",
    "our plain base / llama.cpp's, batch 1": "our plain base / llama.cpp plain base, batch 1",
    "one adapter, batch 1 / llama.cpp's plain base": "one adapter / llama.cpp plain base, batch 1",
    "our plain base / llama.cpp's, batch 16": "our plain base / llama.cpp plain base, batch 16",
}


def test_benchmark_tables_show_the_newest_records():
    tables = TABLE.findall((DOCS / "benchmarks.md").read_text())
    assert len(tables) == 4
    for name, table in tables:
        lines = (ROOT / "benchmarks/records" / name).read_text().splitlines()
        rows = {
            row["what"]: row for line in lines for row in json.loads(line)["rows"]
        }  # the newest of a name
        for line in table.splitlines()[2:]:
            what, *shown = (cell.strip() for cell in line.strip("|").split("|"))
            row = rows[LINES.get(what, what.removesuffix(", s"))] if what not in rows else rows[what]
            for text, key in zip(shown, ("ours", "peer", "ratio"), strict=True):
                digits = len(text.partition(".")[2])
                assert f"{row[key]:.{digits}f}" == text, f"{what}: {key} is {row[key]}"


def test_the_scaling_study_shows_what_its_script_computes():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
    scaling = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = scaling  # dataclasses look their module up
    spec.loader.exec_module(scaling)
    page = (DOCS / "scaling.md").read_text()
    for name, make in scaling.TABLES.items():
        assert make() in page, f"docs/scaling.md: the table {name} is another one now"


def test_the_reference_names_everything_public():
    paths = re.findall(r"^::: lorasmith\.(\S+)$", (DOCS / "reference/python.md").read_text(), re.M)
    named = {path.rpartition(".")[2] for path in paths}
    # `inject` and `train` are rooms too, and their documentation would be the whole room's
    assert not {"inject", "train"} & set(paths)
    assert len(named) == len(paths)
    assert named == set(ls.__all__) - {"__version__"}


def test_the_command_line_reference_has_every_option():
    spec = importlib.util.spec_from_file_location("cli_reference", DOCS / "generate/cli_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    group = typer.main.get_command(app)
    sections = dict(re.findall(r"^## lorasmith (.+?)\n(.*?)(?=^## |\Z)", module.page(), re.M | re.S))
    assert sections.keys() == {name for name, _ in module.commands(group)}
    assert {name.split()[0] for name in sections} == set(group.commands)
    for name, command in module.commands(group):
        options = {o for p in command.params for o in p.opts if o.startswith("--")} - {"--help"}
        assert {o for o in options if f"`{o}`" not in sections[name]} == set(), name
