"""From a prompt of any form to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorasmith.engine.requests import Prompt
from lorasmith.errors import DataError


def encode_prompt(prompt: Prompt, tokenizer: Any, vocab_size: int, *, use_template: bool = True) -> list[int]:
    """Token ids of a text, of chat messages, or of ids, which are checked.

    Args:
        use_template: make a text the user's turn in the chat template, if there is one.

    Raises:
        DataError: the prompt is empty, holds an id outside the vocabulary, or needs a template
            or a tokenizer that the base does not have.
    """
    if isinstance(prompt, str):
        ids = _encode_text(prompt, _required(tokenizer), use_template)
    elif _is_messages(prompt):
        ids = _encode_messages(prompt, _required(tokenizer))
    else:
        ids = [_as_id(token) for token in prompt]
    if not ids:
        raise DataError("The prompt is empty: give a text, at least one token id, or one message.")
    bad = [token for token in ids if not 0 <= token < vocab_size]
    if bad:
        raise DataError(f"The prompt holds token id {bad[0]}; this base has ids 0 to {vocab_size - 1}.")
    return ids


def _encode_text(text: str, tokenizer: Any, use_template: bool) -> list[int]:
    if use_template and getattr(tokenizer, "chat_template", None):
        return _encode_messages([{"role": "user", "content": text}], tokenizer)
    return [int(i) for i in tokenizer.encode(_as_text(text))]


def _encode_messages(messages: Any, tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("This base has no chat template: give a text or token ids instead of messages.")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever their author chose
        raise DataError(f"The chat template refused these messages: {error}") from error
    return [int(i) for i in tokenizer.encode(_as_text(text), add_special_tokens=False)]


def _as_text(text: str) -> str:
    """JSON can carry half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"The prompt holds half a surrogate pair at character {error.start}.") from None
    return text


def _is_messages(prompt: Sequence[Any]) -> bool:
    return len(prompt) > 0 and all(isinstance(item, Mapping) for item in prompt)


def _as_id(token: Any) -> int:
    if isinstance(token, bool) or not hasattr(token, "__index__"):
        raise DataError(f"The prompt holds {token!r} where a token id or a chat message was expected.")
    return int(token.__index__())


def _required(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise DataError("This base has no tokenizer: give the prompt as token ids.")
    return tokenizer
