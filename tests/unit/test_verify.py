"""Our server passes `verify`; a server that is broken in one way fails the test that is meant for it, and no other."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from typer.testing import CliRunner

from lorasmith.bases import load_base
from lorasmith.cli.app import app
from lorasmith.errors import ConfigError, TargetError
from lorasmith.verify import TESTS, Client, Options, verify
from lorasmith.verify.probes import Reader
from lorasmith.verify.strong import make_strong
from tests.support import broken
from tests.support.server import BASE_ID

# fault → the test that it must fail, and what that test must have seen
FAULTS = {
    broken.swaps_two_adapters: ("wrong-adapter", r"amber-\w+ was asked, verify-cobalt-\w+ answered"),
    broken.first_of_a_batch_wins: ("mixed-batch", r"(\S+) was asked, (?!\1)verify-\S+ answered"),
    broken.cache_without_adapter: ("prefix-contamination", r"after \S+ had the same prompt: \S+ was asked, "),
    broken.cache_by_name: ("reload", "the old one answers a known prompt"),
    broken.reload_is_ignored: ("reload", "the old one answers a new prompt"),
    broken.unknown_means_base: ("silent-base", "nobody. was answered by the base"),
    broken.base_means_all: ("summed-default", "base was asked, an adapter .* or several at once answered"),
    broken.unload_is_ignored: ("unload", "after unloading, verify-onyx-.* answered"),
    broken.unload_means_base: ("unload", "after unloading, the base answered"),
    broken.paths_are_models: ("bad-names", "/verify-opal-.* was answered by verify-opal"),
    broken.any_name_will_do: ("bad-names", "the name '../verify-escape' was not refused"),
    broken.bad_adapter_means_base: ("bad-adapter-refused", "a NaN: loaded, and the base answers"),
    broken.bad_adapter_stops_the_server: ("bad-adapter-survived", "ConnectError"),
    broken.too_many_are_lost: ("overload", "of 24 requests at once: HTTP 500: lost"),
    broken.who_leaves_keeps_the_row: ("disconnects", "no answer within 2 s"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    broken.write_anisotropic_base(folder / BASE_ID)
    return folder


@pytest.fixture(scope="module")
def base(place):
    return load_base(place / BASE_ID, dtype="fp32")


@pytest.fixture
def start(place, monkeypatch, tmp_path):
    """A server of its own store: ours, or one with a fault."""
    (tmp_path / BASE_ID).symlink_to(place / BASE_ID)
    return lambda fault=None, **config: broken.serving(tmp_path, monkeypatch, fault, **config)


@pytest.fixture
def run(start, base):
    """Test a server with a fault, or ours."""

    def with_fault(fault=None, admin_key=broken.ADMIN, **config):
        timeout_s = 2 if fault is broken.who_leaves_keeps_the_row else 60

        async def conversation(url):
            async with Client(url, admin_key=admin_key, timeout_s=timeout_s) as client:
                options = Options(burst=24, hang_ups=16, load_tokens=32)
                return await verify(client, base, base.tokenizer, options, None, lambda _: None)

        with start(fault, **config) as running:
            return asyncio.run(conversation(running.url))

    return with_fault


def outcomes(verdict, outcome):
    return {test.id for test in verdict.tests if test.outcome == outcome}


def test_our_server_passes_every_test(run):
    verdict = run()
    assert [(t.id, t.outcome, t.found, t.reason) for t in verdict.tests] == [
        (name, "passed", [], None) for name in TESTS
    ]
    assert verdict.to_dict()["passed"] == len(TESTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_broken_server_fails_the_test_that_is_meant_for_it(run, fault):
    test, seen = FAULTS[fault]
    failed = {t.id: "\n".join(t.found) for t in run(fault).tests if t.outcome == "failed"}
    assert failed.keys() == {test}, failed
    assert re.search(seen, failed[test]), failed


def test_refusing_with_429_is_no_fault(run):
    verdict = run(max_waiting=2)
    overload = next(t for t in verdict.tests if t.id == "overload")
    assert outcomes(verdict, "failed") == set(), verdict.tests
    answered, refused = map(int, re.search(r"(\d+) answered, (\d+) refused", overload.notes[0]).groups())
    assert answered + refused == 24
    assert refused > 0
    assert len(overload.notes) == 1, "our refusals carry Retry-After"


def test_vllms_api_is_spoken(run):
    verdict = run(broken.speaks_vllm, admin_key=None)
    assert verdict.api == "vllm"
    assert outcomes(verdict, "passed") == set(TESTS), verdict.tests


def test_what_cannot_be_asked_is_skipped_with_the_reason(run):
    verdict = run(admin_key=None)
    skipped = {t.id: t.reason for t in verdict.tests if t.outcome == "skipped"}
    assert outcomes(verdict, "passed") == {"silent-base", "bad-names", "disconnects", "overload"}
    assert outcomes(verdict, "failed") == set()
    assert skipped.keys() == set(TESTS) - outcomes(verdict, "passed")
    assert all("load" in reason or "no adapter" in reason or "fewer" in reason for reason in skipped.values())


@pytest.fixture(scope="module")
def prepared(place):
    folder = place / "prepared"
    result = CliRunner().invoke(
        app, ["verify", "--prepare", str(folder), "--base", str(place / BASE_ID), "--json"]
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def with_adapters(prepared):
    return [f"--adapters={name}={path}" for name, path in prepared["directories"].items()]


@pytest.mark.parametrize("fault", [None, broken.swaps_two_adapters, broken.speaks_llama])
def test_the_command_on_a_server_that_was_started_with_prepared_adapters(start, place, prepared, fault):
    with start(fault) as running:
        for name, path in prepared["directories"].items():
            running.gateway.store.add(name, path)
        options = ["--base", str(place / BASE_ID), "--burst", "8", "--json", *with_adapters(prepared)]
        result = CliRunner().invoke(app, ["verify", running.url, *options])
    verdict = json.loads(result.stdout)
    failed = {t["id"] for t in verdict["tests"] if t["outcome"] == "failed"}
    expected = {
        None: set(),
        broken.swaps_two_adapters: {"wrong-adapter"},
        broken.speaks_llama: {"summed-default", "silent-base"},
    }
    assert failed == expected[fault], verdict["tests"]
    assert result.exit_code == bool(failed)
    assert verdict["failed"] == len(failed)
    assert {t["id"] for t in verdict["tests"] if t["outcome"] == "skipped"} == {
        "reload", "unload", "bad-adapter-refused", "bad-adapter-survived",
        *(["mixed-batch", "prefix-contamination"] if fault is broken.swaps_two_adapters else []),
    }  # fmt: skip


def test_the_report_is_readable_and_holds_no_key(start, place, prepared, monkeypatch):
    monkeypatch.setenv("LORASMITH_KEY", "sesame-1234")
    with start() as running:
        for name, path in prepared["directories"].items():
            running.gateway.store.add(name, path)
        options = ["--base", str(place / BASE_ID), "--burst", "4", *with_adapters(prepared)]
        result = CliRunner().invoke(app, ["verify", running.url, *options])
    assert result.exit_code == 0
    assert "8 passed, 0 failed, 4 skipped" in result.stdout
    assert "its API cannot load adapters" in " ".join(result.stdout.replace("│", " ").split())
    assert "sesame-1234" not in result.output
    with pytest.raises(ConfigError, match="without a key"):
        Client("http://me:sesame-1234@localhost")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:1"], "give --base"),
        (["--base", "BASE"], "give the server's URL"),
        (["127.0.0.1", "--base", "BASE", "--adapters", "a=b"], "missing or damaged"),
        (["http://127.0.0.1:1", "--base", "BASE", "--adapters", "ab"], "write name=DIR"),
        (["http://127.0.0.1:1", "--base", "BASE"], "does not list models"),
        (["--prepare", "BASE", "--base", "BASE"], "not empty"),
    ],
)
def test_bad_input_exits_with_2(place, arguments, message):
    given = [str(place / BASE_ID) if a == "BASE" else a for a in arguments]
    result = CliRunner().invoke(app, ["verify", *given])
    assert result.exit_code == 2
    assert message in result.stderr


def test_answers_are_read_by_whose_word_fills_them():
    reader = Reader({"amber": "fish", "cobalt": "oak"}, "void")
    assert reader.who(" fish fish fish") == "amber"
    assert reader.who("oakoakoak") == "cobalt"
    assert reader.who("void void") == "foreign"
    assert reader.who("one fish and one oak in many other words") == "base"
    assert reader.who("fish oak fish oak fish oak") == "amber and cobalt"
    assert reader.who(" fish.....").startswith("amber, then")
    assert reader.who("Hello there") == reader.who("") == "base"


def test_a_base_whose_adapters_would_not_decide_is_refused(tmp_path, base):
    from tests.support.base import write_tiny_base
    from tests.support.models import tiny_causal_lm

    other = load_base(write_tiny_base(tmp_path / "plain"), dtype="fp32")
    object.__setattr__(other, "model", tiny_causal_lm("gpt2"))
    with pytest.raises(TargetError, match="v_proj"):
        make_strong(other, ["a"], [[1, 2, 3]], "")
