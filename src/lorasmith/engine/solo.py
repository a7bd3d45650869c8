"""The runner for models that no batch can be made of: one row at a time, on the model's own cache.

Recurrent and hybrid models keep a state that has no place per token. Each row keeps whatever cache the
model returns, under the name that the model gives it; where feeding it back does not give the logits of
the plain forward (tried once), the whole text is computed again for every token. Slow and correct.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.engine.runner import Batch
from lorasmith.engine.slots import Slots
from lorasmith.errors import BudgetError, ConfigError

PROBE_TOKENS = 6
STATE_NAMES = ("past_key_values", "cache_params")


@dataclass
class RowState:
    """What one row computed so far: its tokens, and the model's own cache after them."""

    tokens: list[int] = field(default_factory=list)
    past: Any = None


class RowStates:
    """As `KVCache`, for states that only the model understands."""

    def __init__(self, device: torch.device, max_rows: int, token_bytes: int) -> None:
        self.shape = SimpleNamespace(device=device)
        self.max_rows = max_rows
        self.max_tokens = 0
        self.token_bytes = token_bytes
        self.rows = [RowState() for _ in range(max_rows)]

    @property
    def num_bytes(self) -> int:
        """Of the states that are held now."""
        return sum(state_bytes(row.past) for row in self.rows)

    def limit(self, max_bytes: int, max_tokens: int) -> None:
        """Let rows grow to `max_tokens`, or to what fits `max_bytes`."""
        fitting = max_bytes // (self.token_bytes * self.max_rows) if self.token_bytes else max_tokens
        self.max_tokens = min(max_tokens, fitting)
        if self.max_tokens < 2:
            raise BudgetError(f"Engine: kv_cache_bytes={max_bytes:,} holds {self.max_tokens} tokens per row.")

    def move(self, source: int, target: int, tokens: int) -> None:
        """Row `target` becomes row `source`."""
        self.rows[target], self.rows[source] = self.rows[source], RowState()

    def clear(self, row: int) -> None:
        """Forget what a row computed."""
        self.rows[row] = RowState()


class SoloRunner:
    """See the module's docstring. Adapters are put on the model, never stacked."""

    name = "solo"
    is_solo = True
    is_row_invariant = False

    def __init__(self, model: Any, *, max_rows: int) -> None:
        self.model = model
        config = model.config
        self.vocab_size = int(config.vocab_size)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self._device: torch.device = parameter.device
        self.slots = Slots((), parameter.dtype, parameter.device)
        self._state_name, token_bytes = _probe(model, parameter)
        self.cache: Any = RowStates(parameter.device, max_rows, token_bytes)

    @property
    def recomputes(self) -> bool:
        """Whether every token computes the whole text again."""
        return self._state_name is None

    def refresh(self) -> None:
        """Nothing is derived from the weights."""

    def renewed(self) -> SoloRunner:
        """The same model with empty states."""
        other = copy.copy(self)
        other.cache = RowStates(self._device, self.cache.max_rows, self.cache.token_bytes)
        other.cache.max_tokens = self.cache.max_tokens
        return other

    def attached(self) -> SoloRunner:
        """This runner: it calls the modules that carry the adapter."""
        return self

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits after the last new token of the one row, (1, vocabulary)."""
        (row,), (start,), (length,) = batch.rows, batch.starts, batch.lengths
        new = batch.tokens[:, :length]
        state = self.cache.rows[row] if start else RowState()
        state.tokens += new[0].tolist()
        if self._state_name is None:
            new, state.past = torch.tensor([state.tokens], device=self._device), None
        logits, state.past = _forward(self.model, new, self._state_name, state.past)
        self.cache.rows[row] = state
        return logits


def state_bytes(state: Any, seen: set[int] | None = None) -> int:
    """Bytes of every tensor inside a cache object, whatever its class."""
    seen = set() if seen is None else seen
    if state is None or id(state) in seen:
        return 0
    seen.add(id(state))
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        inner: Sequence[Any] = list(state.values())
    elif isinstance(state, list | tuple):
        inner = state
    elif isinstance(state, nn.Module | type | torch.device | torch.dtype) or not hasattr(state, "__dict__"):
        inner = ()
    else:
        inner = list(vars(state).values())
    return sum(state_bytes(item, seen) for item in inner)


def _forward(model: Any, tokens: Tensor, name: str | None, past: Any) -> tuple[Tensor, Any]:
    """The last logits, and the cache under the name `name`."""
    given = {} if past is None or name is None else {name: past}
    out = model(input_ids=tokens, use_cache=name is not None, **given)
    return out.logits[:, -1], None if name is None else getattr(out, name, None)


@torch.inference_mode()
def _probe(model: Any, parameter: Tensor) -> tuple[str | None, int]:
    """Under which name the model's cache can be fed back, and its bytes per token."""
    tokens = (torch.arange(PROBE_TOKENS, device=parameter.device) % int(model.config.vocab_size))[None]
    try:
        expected = _forward(model, tokens, None, None)[0].float()
    except Exception as error:
        raise ConfigError(
            f"The engine cannot run {type(model).__name__}: model(input_ids=…).logits failed: {error}"
        ) from error
    slack = 2 * torch.finfo(parameter.dtype).eps ** 0.5
    for name in STATE_NAMES:
        try:
            _, past = _forward(model, tokens[:, :-2], name, None)
            before = state_bytes(past)
            for at in (-2, -1):
                end = at + 1 or None
                got, past = _forward(model, tokens[:, at:end], name, past)
        except Exception:  # a model that cannot take its cache back may fail in any way
            continue
        if past is not None and torch.allclose(
            got.float(), expected, rtol=slack, atol=slack * float(expected.abs().max())
        ):
            return name, max(0, state_bytes(past) - before) // 2
    return None, 0
