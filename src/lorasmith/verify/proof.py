"""The proof, on the local base, that the adapters decide: it comes before a server is judged by them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lorasmith.bases import Base
from lorasmith.engine import Engine, Request
from lorasmith.errors import TargetError
from lorasmith.inject import eject, inject
from lorasmith.lora import Adapter
from lorasmith.verify.probes import ANSWER_TOKENS, BASE, Messages, Prompts, Reader, shown
from lorasmith.verify.strong import StrongSet, make_strong

CALIBRATION_PROMPTS = 4
PROOF_PROMPTS = 2
PAIRED = 3


@dataclass(frozen=True)
class Proven:
    """Adapters that have answered as they should.

    Attributes:
        answers: how many answers of the local engine were as expected.
        pairs: how many ordered pairs were seen to differ when the second runs on the first's cache.
    """

    strong: StrongSet
    reader: Reader
    answers: int
    pairs: int


def make_proven(base: Base, names: Sequence[str], prompts: Prompts) -> Proven:
    """Make strong adapters, and show on this base that their answers tell them apart.

    Raises:
        TargetError: they do not; then no server of this base can be judged.
    """
    calibration = [prompts.tokens(prompts.long()) for _ in range(CALIBRATION_PROMPTS)]
    questions = [prompts.long() for _ in range(PROOF_PROMPTS)]
    said = [r.text for r in _answers(base, {}, [(q, None) for q in questions])]
    strong = make_strong(base, names, calibration, "".join(said))
    reader = Reader({name: m.text for name, m in strong.markers.items()}, strong.foreign.text)
    pairs = _prove_pairs(base, strong, prompts.tokens(questions[0]))
    answers = _prove_answers(base, strong, reader, questions)
    return Proven(strong, reader, answers, pairs)


def _prove_answers(base: Base, strong: StrongSet, reader: Reader, questions: Sequence[Messages]) -> int:
    asked = [(q, name) for q in questions for name in (None, *strong.adapters)]
    for (_, name), result in zip(asked, _answers(base, strong.adapters, asked), strict=True):
        if (who := reader.who(result.text)) != (name or BASE):
            raise TargetError(
                f"verify cannot tell adapters of {base.name} apart: {name or BASE} said {shown(result.text)}, "
                f"which reads as {who}."
            )
    return len(asked)


def _answers(
    base: Base, adapters: dict[str, Adapter], asked: Sequence[tuple[Messages, str | None]]
) -> list[Any]:
    engine = Engine(base, prefix_cache_bytes=0)
    try:
        engine.add_adapters(dict(adapters))
        return engine.generate([Request(q, adapter=n, max_tokens=ANSWER_TOKENS) for q, n in asked])
    finally:
        engine.close()


def _prove_pairs(base: Base, strong: StrongSet, prompt: Sequence[int]) -> int:
    """Next tokens of the second of each pair, on the first's cache of all but the last token of the prompt."""
    names = (None, *list(strong.adapters)[:PAIRED])
    caches = {name: _cache(base, _adapter(strong, name), prompt) for name in names}
    own = _next(base, None, prompt, caches[None])
    count = 0
    for first in names:
        for second in names:
            if first != second:
                wrong = own if second is None else strong.markers[second].token
                if _next(base, _adapter(strong, second), prompt, caches[first]) == wrong:
                    raise TargetError(
                        f"verify cannot see on {base.name} that {second or BASE} runs on {first or BASE}'s cache."
                    )
                count += 1
    return count


def _adapter(strong: StrongSet, name: str | None) -> Adapter | None:
    return None if name is None else strong.adapters[name]


def _cache(base: Base, adapter: Adapter | None, prompt: Sequence[int]) -> Any:
    with _on(base, adapter), torch.no_grad():
        ids = torch.tensor([list(prompt[:-1])], device=base.model.device)
        return base.model(ids, use_cache=True).past_key_values


def _next(base: Base, adapter: Adapter | None, prompt: Sequence[int], cache: Any) -> int:
    with _on(base, adapter), torch.no_grad():
        ids = torch.tensor([[prompt[-1]]], device=base.model.device)
        logits = base.model(ids, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    return int(logits[0, -1].argmax())


@contextmanager
def _on(base: Base, adapter: Adapter | None) -> Iterator[None]:
    if adapter is None:
        yield
        return
    inject(base.model, adapter)
    try:
        yield
    finally:
        eject(base.model)
