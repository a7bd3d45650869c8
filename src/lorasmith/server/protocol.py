"""What OpenAI's clients send. A setting that would change the answer and is not supported is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.errors import ConfigError, did_you_mean

MAX_CONTENT_PARTS = 256
# Settings of OpenAI's API that change nothing here at these values, and are refused at others.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "best_of": (1,),
    "echo": (False,), "suffix": ("",), "parallel_tool_calls": (True, False), "reasoning_effort": (), "verbosity": (),
}  # fmt: skip
# Labels and hints, which never change an answer.
IGNORED = frozenset(
    {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Settings(BaseModel):
    """What chat and plain completions share."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str = Field(max_length=200)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    ignore_eos: bool = False

    def stops(self) -> tuple[str, ...]:
        """Stop texts; OpenAI allows four."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 16 or any(not s or len(s) > 256 for s in stop):
            raise ConfigError("stop: use up to 16 texts of 1 to 256 characters")
        return stop

    def refuse_unsupported(self) -> None:
        """Refuse what was asked beyond the fields above, unless it changes nothing.

        Raises:
            ConfigError: naming every such setting.
        """
        faults = []
        for key, value in (self.model_extra or {}).items():
            if key in IGNORED or value is None:
                continue
            if key not in NEUTRAL:
                faults.append(f'"{key[:80]}" is no setting.{did_you_mean(key, type(self).model_fields)}')
            elif not any(value == neutral for neutral in NEUTRAL[key]):
                faults.append(f'"{key}" is not supported here')
        if faults:
            raise ConfigError("; ".join(faults))


class Message(BaseModel):
    """One turn. Content is a text, or parts of type text."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = Field(None, max_length=1 << 21)

    def as_turn(self) -> Mapping[str, Any]:
        """As chat templates take it.

        Raises:
            ConfigError: a part that is no text.
        """
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str) or self.content is None:
            return {"role": role, "content": self.content or ""}
        texts = [part.get("text") for part in self.content if part.get("type") == "text"]
        if len(texts) != len(self.content) or not all(isinstance(t, str) for t in texts):
            raise ConfigError("messages: only content parts of type text are understood")
        return {"role": role, "content": "".join(map(str, texts))}


class ChatRequest(Settings):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def refuse_unsupported(self) -> None:
        """As above, and alternatives to the chosen tokens, which the engine does not report."""
        super().refuse_unsupported()
        if self.top_logprobs:
            raise ConfigError('"top_logprobs" is not supported here above 0')


class CompletionRequest(Settings):
    """POST /v1/completions: the text goes to the model as it is."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(union_mode="left_to_right")
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[Any]:
        """One or many, each a text or token ids."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else list(self.prompt)

    def refuse_unsupported(self) -> None:
        """As above, and alternatives to the chosen tokens, which the engine does not report."""
        super().refuse_unsupported()
        if self.logprobs:
            raise ConfigError('"logprobs" is not supported here above 0 (the chosen tokens alone)')
