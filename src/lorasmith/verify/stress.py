"""Tests that a server may not survive; they run last."""

from __future__ import annotations

import asyncio
from collections import Counter

from lorasmith.verify.checks import Session, Skipped, title
from lorasmith.verify.probes import BASE


async def hang_ups(s: Session) -> list[str]:
    """Clients that leave in the middle of a stream hold nobody up."""
    name = _someone(s)
    before = await s.ask(name, s.prompts.short())
    asked = [
        s.client.leave_early(s.fields(name), s.prompts.short(), s.load_tokens * 8) for _ in range(s.hang_ups)
    ]
    began = sum([sum(await asyncio.gather(*asked[i : i + 8])) for i in range(0, len(asked), 8)])
    if not began:
        raise Skipped("no answer could be streamed")
    after = await s.ask(name, s.prompts.short())
    if after.is_ok and after.seconds <= 10 + 10 * before.seconds:
        return []
    took = f"takes {after.seconds:.1f} s, and took {before.seconds:.1f} s before"
    return [f"after {began} clients left, an answer {took}: {after}"]


async def overload(s: Session) -> list[str]:
    """Many requests at once are queued, or refused with 429; none is lost."""
    names = [n for n, is_right in s.alone.items() if is_right] or [BASE]
    asked = [names[i % len(names)] for i in range(s.burst)]
    replies = await asyncio.gather(*(s.ask(n, s.prompts.short(), s.load_tokens) for n in asked))
    lost = Counter(str(r) for r in replies if not r.is_ok and not r.is_busy)
    refused = [r for r in replies if r.is_busy]
    s.notes.append(f"{s.burst} at once: {sum(r.is_ok for r in replies)} answered, {len(refused)} refused")
    if silent := sum(r.retry_after is None for r in refused):
        s.notes.append(f"{silent} refusals do not say when to ask again (Retry-After)")
    faults = [f"{count} of {s.burst} requests at once: {what}" for what, count in lost.most_common(3)]
    if not any(r.is_ok for r in replies) and not faults:
        faults.append(f"none of {s.burst} requests at once was answered")
    if "mixed-batch" not in s.failed:
        wrong = [s.fault(n, r) for n, r in zip(asked, replies, strict=True) if r.is_ok and n != BASE]
        faults += [f for f in wrong if f][:3]
    return faults


async def bad_adapters(s: Session) -> list[str]:
    """An adapter that cannot be right is refused: at loading, or at the latest when it is asked for."""
    s.needs_loading()
    faults = []
    for kind, directory in s.bad.items():
        name = "verify-bad-" + "".join(c if c.isalnum() else "-" for c in kind)
        loaded = await s.api.load(name, directory)
        if not loaded.is_ok:
            s.refusals[kind] = loaded
            if not loaded.status:
                break
            if not loaded.is_refusal:
                faults.append(f"{kind} should be a 4xx: {loaded}")
            continue
        answer = await s.ask(name, s.prompts.short())
        await s.api.unload(name)
        if answer.is_ok:
            faults.append(f"{kind}: loaded, and {title(s.reader.who(answer.text))} answers")
    return faults


async def survival(s: Session) -> list[str]:
    """No bad adapter stops the server, or changes what the others answer."""
    s.needs_loading()
    faults = [f"{kind}: no answer: {reply}" for kind, reply in s.refusals.items() if not reply.status]
    for name in [n for n, is_right in s.alone.items() if is_right]:
        if fault := s.fault(name, await s.ask(name)):
            faults.append(f"afterwards {fault}")
    return faults


def _someone(s: Session) -> str:
    return next((n for n, is_right in s.alone.items() if is_right and n != BASE), BASE)
