"""The tests, in the order in which they run. Each is judged only by its own fault.

A test raises `Skipped` where the server cannot be asked. What an earlier test found wrong is not counted again:
an adapter that answers wrongly alone says nothing about caches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

from lorasmith.verify.apis import Api
from lorasmith.verify.client import Client, Reply
from lorasmith.verify.probes import ANSWER_TOKENS, BASE, FOREIGN, Messages, Prompts, Reader, shown

UNKNOWN = "lorasmith-verify-nobody"
MIXED_ROUNDS = 4


class Skipped(Exception):  # noqa: N818
    """The server cannot be asked; the message says why."""


@dataclass
class Session:
    """One run against one server.

    Attributes:
        base_model: what the server calls the plain base.
        directories: our name → the adapter's local directory.
        spare: contents that are not served at first, for reloading.
        bad: fault → directory.
        alone: who answers rightly when asked alone on a new prompt.
        failed: tests that failed so far.
        refusals: how each bad adapter was refused.
        notes: what a test saw that is no fault.
    """

    client: Client
    api: Api
    prompts: Prompts
    reader: Reader
    base_model: str
    directories: dict[str, Path]
    spare: dict[str, Path]
    bad: dict[str, Path]
    burst: int = 128
    hang_ups: int = 40
    load_tokens: int = 32
    alone: dict[str, bool] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    nobody: str | None = None  # who answers for an unknown name
    refusals: dict[str, Reply] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Adapters that can be asked for; without any there is nothing to test."""
        served = [name for name in self.api.names if name in self.directories]
        if not served:
            raise Skipped(f"no adapter is served: {self.api.why_not}")
        return served

    def fields(self, name: str) -> dict[str, object]:
        """What a request adds to ask for an adapter, or for the base."""
        return {"model": self.base_model} if name == BASE else self.api.fields(name)

    async def ask(self, name: str, prompt: Messages | None = None, tokens: int = ANSWER_TOKENS) -> Reply:
        """One greedy answer; on a new prompt if none is given."""
        return await self.client.ask(self.fields(name), prompt or self.prompts.long(), tokens)

    def fault(self, name: str, reply: Reply) -> str | None:
        """What is wrong with an answer of `name`; None if nothing is."""
        if not reply.is_ok:
            return f"{name} gave no answer: {reply}"
        who = self.reader.who(reply.text)
        return None if who == name else f"{name} was asked, {title(who)} answered: {shown(reply.text)}"

    def needs_loading(self) -> None:
        """Skip where adapters cannot be loaded while the server runs."""
        if not self.api.can_load:
            raise Skipped(self.api.why_not)

    async def load(self, name: str, directory: Path) -> None:
        """Load a good adapter."""
        if not (reply := await self.api.load(name, directory)).is_ok:
            raise Skipped(f"a good adapter was not loaded: {reply}")


Check = Callable[[Session], Awaitable[list[str]]]


async def base_alone(s: Session) -> list[str]:
    """A request that names the base gets the base, though adapters are served."""
    _ = s.names
    faults = [s.fault(BASE, await s.ask(BASE)) for _ in range(2)]
    s.alone[BASE] = not any(faults)
    return _found(faults)


async def each_adapter(s: Session) -> list[str]:
    """A request that names an adapter gets that adapter."""
    faults: list[str | None] = []
    for name in s.names:
        found = [s.fault(name, await s.ask(name)) for _ in range(2)]
        s.alone[name] = not any(found)
        faults += found
    return _found(faults)


async def mixed_batch(s: Session) -> list[str]:
    """The same, while requests for the others and for the base run."""
    able = _able(s, 2)
    asked = [name for _ in range(MIXED_ROUNDS) for name in able]
    replies = await asyncio.gather(*(s.ask(name, tokens=4 * ANSWER_TOKENS) for name in asked))
    judged = [(n, r) for n, r in zip(asked, replies, strict=True) if n != BASE and not r.is_busy]
    s.notes.append(f"{len(asked)} at once; {len(judged)} answers of adapters judged")
    return _found(s.fault(*pair) for pair in judged)


async def prefix_cache(s: Session) -> list[str]:
    """The same prompt under every ordered pair of adapters, and of an adapter and the base."""
    able = _able(s, 2)
    faults: list[str | None] = []
    for first, second in permutations([n for n in able if n != BASE], 2):
        prompt = s.prompts.long()
        await s.ask(first, prompt)
        faults.append(_after(first, s.fault(second, await s.ask(second, prompt))))
    if s.alone.get(BASE):
        for name in able:
            if name != BASE:
                faults += await _around(s, name)
    return _found(faults)


async def _around(s: Session, name: str) -> list[str | None]:
    """The base, an adapter, the base again, on one prompt."""
    faults: list[str | None] = []
    for _ in range(2):  # a changed word counts if it happens twice: rounding may change one
        prompt = s.prompts.long()
        before = await s.ask(BASE, prompt)
        faults.append(_after(BASE, s.fault(name, await s.ask(name, prompt))))
        after = await s.ask(BASE, prompt)
        faults.append(_after(name, s.fault(BASE, after)))
        if any(faults) or before.text.split()[:1] == after.text.split()[:1]:
            return faults
    return [f"the base's answer changed after {name}: {shown(before.text)}, then {shown(after.text)}"]


async def unknown_name(s: Session) -> list[str]:
    """An adapter that nobody loaded is refused, never answered by the base."""
    reply = await s.client.ask({"model": UNKNOWN}, s.prompts.long(), ANSWER_TOKENS)
    if reply.is_ok:
        s.nobody = s.reader.who(reply.text)
        return [f'"{UNKNOWN}" was answered by {title(s.nobody)}: {shown(reply.text)}']
    return [] if reply.is_refusal else [f'"{UNKNOWN}" should be a 4xx: {reply}']


async def reload(s: Session) -> list[str]:
    """Another adapter under the same name answers from then on, on new and on known prompts."""
    s.needs_loading()
    (first, old), (second, new) = list(s.spare.items())[:2]
    name, prompt = f"{first}-swap", s.prompts.long()
    await s.load(name, old)
    before = await s.ask(name, prompt)
    if s.reader.who(before.text) != first:
        raise Skipped(f"the first content did not answer: {before}")
    await s.load(name, new)
    faults = []
    if (who := s.reader.who((on_new := await s.ask(name)).text)) != second:
        faults.append(f"after the reload, {title(who, first)} answers a new prompt: {shown(on_new.text)}")
    elif "prefix-contamination" not in s.failed:
        on_known = await s.ask(name, prompt)
        if (who := s.reader.who(on_known.text)) != second:
            faults.append(
                f"after the reload, {title(who, first)} answers a known prompt: {shown(on_known.text)}"
            )
    await s.api.unload(name)
    return faults


async def unload(s: Session) -> list[str]:
    """An adapter that was unloaded is refused, and the others still answer."""
    s.needs_loading()
    own, directory = next(iter(s.spare.items()))
    name = f"{own}-gone"
    await s.load(name, directory)
    if s.reader.who((before := await s.ask(name)).text) != own:
        raise Skipped(f"it did not answer before: {before}")
    if not (gone := await s.api.unload(name)).is_ok:
        return [f"unloading failed: {gone}"]
    after = await s.ask(name)
    who = s.reader.who(after.text)
    faults = []
    if after.is_ok and who != s.nobody:
        faults.append(f"after unloading, {title(who)} answered: {shown(after.text)}")
    elif not after.is_ok and not after.is_refusal:
        faults.append(f"after unloading it should be a 4xx: {after}")
    faults += _found([s.fault(n, await s.ask(n)) for n in s.api.names if s.alone.get(n)])
    return faults


async def bad_names(s: Session) -> list[str]:
    """Paths are no names: they load nothing and read nothing."""
    asked = ["../../../../etc/passwd", "/etc", "..%2f..%2fetc", "file:///etc/passwd", "\x00", ""]
    for directory in list(s.spare.values())[-1:]:  # never loaded; a server that takes paths would find it
        asked += [str(directory), f"../../../../../../..{directory}"]
    faults = []
    for model in asked:
        reply = await s.client.ask({"model": model}, s.prompts.short(), ANSWER_TOKENS)
        who = s.reader.who(reply.text)
        if reply.is_ok and (who in s.spare or "silent-base" not in s.failed):
            faults.append(f"model={shown(model)} was answered by {title(who)}")
        elif not reply.is_ok and not reply.is_refusal:
            faults.append(f"model={shown(model)} should be a 4xx: {reply}")
    if s.api.can_load and s.spare:
        for what, reply in await s.api.try_bad_names(list(s.spare.values())[-1]):
            if not reply.is_refusal:
                faults.append(f"{what} was not refused: {reply}")
    return faults


def _able(s: Session, least: int) -> list[str]:
    """Those that answer rightly alone: only they tell anything in company."""
    able = [name for name, is_right in s.alone.items() if is_right and (name == BASE or name in s.names)]
    if len([n for n in able if n != BASE]) < least:
        raise Skipped(f"fewer than {least} adapters answer rightly alone")
    return able


def _after(first: str, fault: str | None) -> str | None:
    return fault and f"after {first} had the same prompt: {fault}"


def title(who: str, old: str | None = None) -> str:
    """Who answered, in words."""
    if who == FOREIGN:
        return "an adapter on a cache of the base's, or several at once"
    return "the old one" if who == old else f"the {BASE}" if who == BASE else who


def _found(faults: Iterable[str | None]) -> list[str]:
    return [f for f in faults if f]
