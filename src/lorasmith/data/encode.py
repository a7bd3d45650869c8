"""Records become token examples with a loss mask; what is cut or left out is counted and named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorasmith.data.records import Problem, Record, shown
from lorasmith.data.template import (
    Segment,
    Specials,
    TemplateRefusalError,
    Tokenizer,
    chat_layout,
    ids_of,
    plain_prompt,
    specials_of,
    with_eos,
)
from lorasmith.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence to train on.

    `supervised[i]` means that token i carries loss: it is predicted from the tokens before it. The first
    token has nothing before it and never does. `truncated` tokens were cut from the left of the prompt.
    """

    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    line: int
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Stats:
    """What the examples add up to, in tokens."""

    records: int
    examples: int
    tokens: int
    supervised_tokens: int
    truncated_examples: int
    truncated_tokens: int
    longest: int
    mean_length: float
    mean_supervised: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """The examples, the problems that encoding found, and the totals."""

    examples: list[Example]
    problems: list[Problem]
    stats: Stats


def encode(records: Iterable[Record], tokenizer: Tokenizer, *, max_length: int) -> Encoded:
    """Tokenise each record and mark the tokens that carry loss.

    - Conversations: every answer and its end-of-turn token, and nothing else.
    - `prompt` + `completion`: the same, as a user turn and an answer; without a chat template, the tokens
      of the completion and EOS.
    - `text`: every token but the first, and EOS. A longer text is split into chunks that share one token,
      so that each token is predicted exactly once.

    An answer is never cut: a sequence over `max_length` loses tokens from the left of its prompt, and a
    record whose answers alone do not fit becomes a Problem.

    Raises:
        DataError: there is no chat template for `messages`, or no token at all would carry loss.
    """
    if max_length < 2:
        raise ConfigError(f"max_length={max_length}: one token predicts the next, so it must be at least 2.")
    records = list(records)
    examples: list[Example] = []
    problems: list[Problem] = []
    specials = specials_of(tokenizer)
    for record in records:
        made, found = _encode_one(record, tokenizer, specials, max_length)
        examples += made
        problems += found
    if not examples:
        raise DataError(f"No token of {len(records)} records would carry loss.{shown(problems)}")
    return Encoded(examples, problems, _stats(len(records), examples))


def _encode_one(
    record: Record, tokenizer: Tokenizer, specials: Specials, max_length: int
) -> tuple[list[Example], list[Problem]]:
    if record.kind == "text":
        return _chunks(record, tokenizer, max_length)
    if record.kind == "completion" and not tokenizer.chat_template:
        answer = with_eos(ids_of(record.completion, tokenizer), tokenizer)
        segments = [Segment(plain_prompt(record.prompt, tokenizer), False), Segment(answer, True)]
        return _fitted(segments, record.line, max_length)
    try:
        layout = chat_layout(record, tokenizer, specials)
    except TemplateRefusalError as problem:
        return [], [Problem(record.line, "template", str(problem))]
    examples, problems = _fitted(layout.segments, record.line, max_length)
    if layout.only_last:
        text = f"only the last answer carries loss: {layout.only_last}"
        problems.append(Problem(record.line, "template", text, is_dropped=False))
    if not layout.has_end:
        text = "the chat template ends an answer with no special token; EOS is added after the last one"
        problems.append(Problem(record.line, "end-of-turn", text, is_dropped=False))
    return examples, problems


def _fitted(segments: Sequence[Segment], line: int, max_length: int) -> tuple[list[Example], list[Problem]]:
    tokens = [token for segment in segments for token in segment.ids]
    supervised = [segment.is_supervised for segment in segments for _ in segment.ids]
    first = next((i for i, mask in enumerate(supervised) if mask and i), None)
    if first is None:
        return [], [_no_loss(line)]
    cut = max(0, len(tokens) - max_length)
    if cut >= first:  # one token must stay before it, to predict it from
        need = len(tokens) - supervised.index(True)
        text = f"completion of {need} tokens does not fit max_length={max_length} with a token before it"
        return [], [Problem(line, "length", text)]
    problems: list[Problem] = []
    if cut:
        text = f"{cut} of {first} prompt tokens were cut from the left to fit max_length={max_length}"
        problems.append(Problem(line, "truncated", text, is_dropped=False))
    return [_example(tokens[cut:], supervised[cut:], line, cut)], problems


def _chunks(record: Record, tokenizer: Tokenizer, max_length: int) -> tuple[list[Example], list[Problem]]:
    tokens = with_eos(plain_prompt(record.text, tokenizer), tokenizer)
    if len(tokens) < 2:
        return [], [_no_loss(record.line)]
    starts = range(0, len(tokens) - 1, max_length - 1)
    pieces = [tokens[start : start + max_length] for start in starts]
    return [_example(piece, [True] * len(piece), record.line, 0) for piece in pieces], []


def _no_loss(line: int) -> Problem:
    return Problem(line, "no-loss", "none of its tokens would carry loss")


def _example(tokens: list[int], supervised: list[bool], line: int, truncated: int) -> Example:
    mask = np.array(supervised, dtype=np.bool_)
    mask[:1] = False
    return Example(np.array(tokens, dtype=np.int32), mask, line, truncated)


def _stats(records: int, examples: Sequence[Example]) -> Stats:
    tokens = sum(len(e) for e in examples)
    supervised = sum(int(e.supervised.sum()) for e in examples)
    return Stats(
        records=records,
        examples=len(examples),
        tokens=tokens,
        supervised_tokens=supervised,
        truncated_examples=sum(e.truncated > 0 for e in examples),
        truncated_tokens=sum(e.truncated for e in examples),
        longest=max((len(e) for e in examples), default=0),
        mean_length=tokens / max(1, len(examples)),
        mean_supervised=supervised / max(1, len(examples)),
    )
