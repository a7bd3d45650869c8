"""A conversation becomes token segments, each marked as context or as supervised.

The text is rendered turn by turn and each segment is tokenised on its own: first what inference would see,
then the answer. A mask found afterwards in the tokens of the whole text is not the same thing, because
a tokenizer may merge characters across the border, and the model would train on tokens that it never
meets when it serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorasmith.data.records import Message, Record
from lorasmith.errors import DataError


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this room uses."""

    chat_template: Any
    bos_token_id: Any
    eos_token_id: Any
    all_special_ids: Any

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> Any:
        """Return the token ids of a text."""

    def decode(self, ids: Any) -> Any:
        """Return the text of token ids, special tokens included."""

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """Return the text that the template makes of the messages."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens that carry loss, all of them or none."""

    ids: list[int]
    is_supervised: bool


class TemplateRefusalError(Exception):
    """Why the template cannot give this conversation a mask; never leaves this room."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The segments of one record, and whether the mask had to leave something out.

    `only_last` says why only the last of several answers is supervised: the template rewrites earlier turns.
    `has_end` is False when the template puts no special token after an answer.
    """

    segments: list[Segment]
    only_last: str | None = None
    has_end: bool = True


def render_prompt(prompt: Record | Sequence[Message] | str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids that inference starts from, equal to the context that training saw.

    A record gives everything before its last answer; messages are taken as they are; a string is a user
    turn where the tokenizer has a chat template, and plain text where it has none.

    Raises:
        DataError: the record has no prompt, or there is no template for its messages.
    """
    if isinstance(prompt, Record) and prompt.kind == "text":
        raise DataError(f"The record on line {prompt.line} is plain text: it has no prompt to answer.")
    if not tokenizer.chat_template and (text := _plain_text(prompt)) is not None:
        return plain_prompt(text, tokenizer)
    messages = _given(prompt)
    try:
        segments = _history(messages, tokenizer, specials_of(tokenizer))
    except TemplateRefusalError as problem:
        raise DataError(f"The prompt cannot be rendered: {problem}") from problem
    return [token for segment in segments for token in segment.ids]


def chat_layout(record: Record, tokenizer: Tokenizer, specials: Specials) -> Layout:
    """Return the segments of a conversation, up to and including the end of its last answer.

    Raises:
        TemplateRefusalError: the template fails on the last answer, or rewrites what comes before it.
        DataError: there is no chat template.
    """
    messages, context = as_messages(record)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    only_last = None
    try:
        segments, _ = _walk(messages, turns, tokenizer, specials, context=context)
    except TemplateRefusalError as refusal:
        if len(turns) == 1:
            raise
        if sum(turn >= context for turn in turns) > 1:
            only_last = str(refusal)
        history = messages[: turns[-1]]
        prefix = _render(history, tokenizer, is_open=True)
        answer = _answer(messages[: turns[-1] + 1], prefix, tokenizer, specials)
        segments = [*_history(history, tokenizer, specials), Segment(ids_of(answer, tokenizer), True)]
    if segments[-1].ids and segments[-1].ids[-1] in specials.ids:
        return Layout(segments, only_last)
    # Without an end-of-turn token the model would learn to talk on for ever.
    closed = Segment(with_eos(segments[-1].ids, tokenizer), True)
    return Layout([*segments[:-1], closed], only_last, has_end=False)


def as_messages(record: Record) -> tuple[list[Message], int]:
    """Return the record as a conversation, and how many of its first messages are context."""
    if record.kind == "messages":
        return list(record.messages), record.context
    turns = (("user", record.prompt), ("assistant", record.completion))
    return [{"role": role, "content": content} for role, content in turns], 1


def plain_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a text that starts a sequence: one BOS first if the tokenizer adds one."""
    ids = ids_of(text, tokenizer)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and list(tokenizer.encode("", add_special_tokens=True))[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def with_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens, closed by exactly one EOS if the tokenizer has one."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a text with nothing added to it."""
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


@dataclass(frozen=True, slots=True)
class Specials:
    """The control tokens of a tokenizer: their ids, and how they are written."""

    ids: frozenset[int]
    texts: tuple[str, ...]


def specials_of(tokenizer: Tokenizer) -> Specials:
    """Return every control token.

    Some templates end a turn with a token that `all_special_ids` leaves out (Phi-3's `<|end|>`).
    """
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    texts = (str(tokenizer.decode([i])) for i in sorted(ids))
    return Specials(frozenset(ids), tuple(text for text in texts if text))


def _plain_text(prompt: Record | Sequence[Message] | str) -> str | None:
    if isinstance(prompt, Record):
        return prompt.prompt if prompt.kind == "completion" else None
    return prompt if isinstance(prompt, str) else None


def _given(prompt: Record | Sequence[Message] | str) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Record):
        return list(prompt)
    messages, _ = as_messages(prompt)
    return messages[: max(i for i, m in enumerate(messages) if m["role"] == "assistant")]


def _history(messages: list[Message], tokenizer: Tokenizer, specials: Specials) -> list[Segment]:
    """Segments of a prompt. Earlier answers keep their own, unless the template rewrites them."""
    whole = _render(messages, tokenizer, is_open=True)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    try:
        segments, done = _walk(messages, turns, tokenizer, specials, context=len(messages))
    except TemplateRefusalError:
        segments, done = [], ""
    if not whole.startswith(done):
        segments, done = [], ""
    return [*segments, Segment(ids_of(whole[len(done) :], tokenizer), False)]


def _walk(
    messages: list[Message], turns: list[int], tokenizer: Tokenizer, specials: Specials, *, context: int
) -> tuple[list[Segment], str]:
    """Return prompt and answer segments in turn, and the text that they cover.

    Answers from message `context` on are supervised.
    """
    segments: list[Segment] = []
    done = ""
    for turn in turns:
        prefix = _render(messages[:turn], tokenizer, is_open=True)
        _must_continue(prefix, done, f"message {turn + 1}", "an earlier turn")
        answer = _answer(messages[: turn + 1], prefix, tokenizer, specials)
        segments.append(Segment(ids_of(prefix[len(done) :], tokenizer), False))
        segments.append(Segment(ids_of(answer, tokenizer), turn >= context))
        done = prefix + answer
    return segments, done


def _answer(messages: list[Message], prefix: str, tokenizer: Tokenizer, specials: Specials) -> str:
    """Return what the template makes of the last message after the prompt, end-of-turn token included."""
    full = _render(messages, tokenizer, is_open=False)
    _must_continue(full, prefix, f"message {len(messages)}", "the start of the answer")
    answer = full[len(prefix) :]
    return answer[: _end_of_turn(answer, messages[-1]["content"], specials.texts)]


def _must_continue(text: str, start: str, where: str, what: str) -> None:
    if not text.startswith(start):
        same = next((i for i, (a, b) in enumerate(zip(text, start, strict=False)) if a != b), len(text))
        raise TemplateRefusalError(
            f"at {where} the chat template rewrites {what}: "
            f"{start[same : same + 30]!r} becomes {text[same : same + 30]!r}"
        )


def _end_of_turn(answer: str, content: str, specials: Sequence[str]) -> int:
    """Return where the first special token after the content ends, or the length if there is none."""
    found = answer.find(content)
    if found < 0:  # many templates trim the content
        content = content.strip()
        found = answer.find(content)
    if found < 0:
        raise TemplateRefusalError(
            "the chat template changes the text of the answer, so its end cannot be found"
        )
    after = found + len(content)
    ends = [(at, -len(s)) for s in specials if (at := answer.find(s, after)) >= 0]
    if not ends:
        return len(answer)
    at, minus_length = min(ends)
    return at - minus_length


def _render(messages: list[Message], tokenizer: Tokenizer, *, is_open: bool) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "The records hold messages, but this base has no chat template. "
            "Use a chat (instruct) base, set tokenizer.chat_template, or give `prompt` and `completion`."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open))
    except Exception as error:  # a template is a program of its author's: it may raise anything
        roles = ", ".join(m["role"] for m in messages) or "nothing"
        raise TemplateRefusalError(f"the chat template refuses the roles {roles}: {error}") from error
