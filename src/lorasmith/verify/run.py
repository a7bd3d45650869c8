"""Runs the tests in order and collects what they found."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lorasmith.bases import Base
from lorasmith.errors import ConfigError, UnavailableError
from lorasmith.formats import write_adapter
from lorasmith.verify import checks, stress
from lorasmith.verify.apis import find_api
from lorasmith.verify.bad import write_bad
from lorasmith.verify.checks import Check, Session, Skipped
from lorasmith.verify.client import Client
from lorasmith.verify.prepared import Prepared
from lorasmith.verify.probes import BASE, Prompts, Reader
from lorasmith.verify.proof import make_proven

Outcome = Literal["passed", "failed", "skipped"]
SERVED, SPARE = ("amber", "cobalt", "jade"), ("onyx", "ruby", "opal")
TESTS: dict[str, Check] = {
    "summed-default": checks.base_alone,
    "wrong-adapter": checks.each_adapter,
    "mixed-batch": checks.mixed_batch,
    "prefix-contamination": checks.prefix_cache,
    "silent-base": checks.unknown_name,
    "reload": checks.reload,
    "unload": checks.unload,
    "bad-names": checks.bad_names,
    "disconnects": stress.hang_ups,
    "overload": stress.overload,
    "bad-adapter-refused": stress.bad_adapters,
    "bad-adapter-survived": stress.survival,
}
MAX_FAULTS = 12


@dataclass(frozen=True)
class Tested:
    """One test's outcome, with what it found."""

    id: str
    what: str
    outcome: Outcome
    reason: str | None
    found: list[str]
    notes: list[str]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """All of them, and what was tested how."""

    url: str
    api: str
    base_model: str
    proof: dict[str, Any]
    tests: list[Tested]

    def count(self, outcome: Outcome) -> int:
        """How many tests ended so."""
        return sum(t.outcome == outcome for t in self.tests)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        counts = {o: self.count(o) for o in ("passed", "failed", "skipped")}
        return counts | {**asdict(self), "tests": [asdict(t) for t in self.tests]}


@dataclass(frozen=True)
class Options:
    """What may be set of a run.

    Attributes:
        api: one of `apis.KINDS`.
        base_model: what the server calls the base; by default the first entry of /v1/models without a parent.
        burst: requests at once in the overload test.
        hang_ups: clients that leave in the middle of a stream.
    """

    api: str = "auto"
    base_model: str | None = None
    burst: int = 128
    hang_ups: int = 40
    load_tokens: int = 32


Report = Callable[[str], None]


async def verify(
    client: Client,
    base: Base | None,
    tokenizer: Any,
    options: Options,
    prepared: Prepared | None,
    say: Report,
) -> Verdict:
    """Test a server.

    Args:
        base: the served base, to make adapters for; not needed with `prepared`.
        prepared: the adapters that the server was started with.

    Raises:
        UnavailableError: nothing answers there.
        TargetError, ConfigError: adapters of this base cannot be told apart, or an option is wrong.
    """
    base_model = options.base_model or _base_of(await _listed(client))
    api = await find_api(client, options.api, prepared.pairs if prepared else {})
    prompts = Prompts(tokenizer, longest=api.prompt_tokens)
    say(f"{client.url} is tested as {api.kind}; it calls the base {base_model}")
    with tempfile.TemporaryDirectory(prefix="lorasmith-verify-") as folder:
        made = prepared or _make(base, prompts, Path(folder), say)
        served = {n: d for n, d in made.directories.items() if n not in made.spare}
        spare = {n: made.directories[n] for n in made.spare}
        bad = write_bad(next(iter(served.values())), Path(folder) / "bad") if api.can_load else {}
        session = Session(
            client, api, prompts, Reader(made.markers, made.foreign), base_model, served, spare, bad,
            options.burst, options.hang_ups, options.load_tokens,
        )  # fmt: skip
        try:
            if api.can_load:
                await _load_all(session)
            tests = await _run_all(session, say)
        finally:
            if api.can_load:
                await api.tidy()
    return Verdict(client.url, api.kind, base_model, made.proof, tests)


async def _run_all(session: Session, say: Report) -> list[Tested]:
    tests: list[Tested] = []
    gone_since: str | None = None
    for name, check in TESTS.items():
        tested = await _run_one(session, name, check, gone_since)
        tests.append(tested)
        say(f"{name}: {tested.outcome}")
        is_last_word = name == "bad-adapter-refused"  # the next test asks what is left of the server
        if tested.outcome != "skipped" and not gone_since and not is_last_word:
            probe = await session.ask(BASE, session.prompts.short())
            gone_since = None if probe.status else name
    return tests


async def _run_one(session: Session, name: str, check: Check, gone_since: str | None) -> Tested:
    session.notes = []
    what = (check.__doc__ or "").split("\n")[0]
    began = time.monotonic()
    outcome: Outcome
    try:
        if gone_since:
            raise Skipped(f"the server answers no more, since {gone_since}")
        found = await check(session)
        outcome, reason = ("failed" if found else "passed"), None
    except Skipped as skipped:
        outcome, reason, found = "skipped", str(skipped), []
    if outcome == "failed":
        session.failed.add(name)
    more = [f"… and {len(found) - MAX_FAULTS} more"] if len(found) > MAX_FAULTS else []
    seconds = round(time.monotonic() - began, 3)
    return Tested(name, what, outcome, reason, [*found[:MAX_FAULTS], *more], session.notes, seconds)


def _make(base: Base | None, prompts: Prompts, folder: Path, say: Report) -> Prepared:
    if base is None:
        raise ConfigError("give --base, the base that is served, or --adapters that were prepared for it")
    say("making adapters, and proving on the local base that their answers tell them apart")
    mark = secrets.token_hex(3)
    return make_prepared(
        base, prompts, folder, [f"verify-{n}-{mark}" for n in SERVED], [f"verify-{n}-{mark}" for n in SPARE]
    )


def make_prepared(
    base: Base, prompts: Prompts, folder: Path, served: list[str], spare: list[str]
) -> Prepared:
    """Make, prove and write adapters, each in a directory of its name."""
    proven = make_proven(base, [*served, *spare], prompts)
    directories = {}
    for name, adapter in proven.strong.adapters.items():
        directories[name] = folder / name
        write_adapter(adapter, directories[name], base_name=base.name)
    proof = {"answers": proven.answers, "pairs": proven.pairs}
    return Prepared(directories, dict(proven.reader.markers), proven.reader.foreign, tuple(spare), proof)


async def _load_all(session: Session) -> None:
    for name, directory in session.directories.items():
        reply = await session.api.load(name, directory)
        if not reply.is_ok:
            raise ConfigError(f"the server did not take a good adapter of rank 1: {reply}")


async def _listed(client: Client) -> list[dict[str, Any]]:
    listed = await client.models()
    if listed is None:
        reply = await client.send("GET", "/v1/models")
        raise UnavailableError(
            f"{client.url} does not list models: {reply}.\n"
            "  If it is an OpenAI-compatible server, name its base with --model."
        )
    return listed


def _base_of(listed: Sequence[Mapping[str, Any]]) -> str:
    roots = [e for e in listed if not e.get("parent")]
    if not roots:
        raise ConfigError("/v1/models lists no base: name it with --model")
    return str(roots[0].get("id"))
