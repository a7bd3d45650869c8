"""The runner for any decoder: the model's own forward on our cache, LoRA added by hooks.

The model gets an object with the two cache methods that attention layers call, an explicit mask and
explicit positions, so that every row can be at another place. Whether that works for a model is not
guessed from its name: it is tried once on a few tokens against the plain forward.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.engine.cache import KVCache, KVShape
from lorasmith.engine.runner import Batch, rows_of
from lorasmith.engine.slots import GroupSpec, Slots, add_lora
from lorasmith.errors import ConfigError

PROBE_TOKENS = 6


class RowCache:
    """What the attention layers of one forward pass see of the key-value cache."""

    is_compileable = False

    def __init__(self, cache: KVCache, rows: slice | list[int], index: Tensor, span: int) -> None:
        self._cache = cache
        self._rows = rows
        self._index = index
        self._span = span

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, new, width) and return everything of these rows, the same way round."""
        pairs = ((self._cache.keys[layer_idx], keys), (self._cache.values[layer_idx], values))
        seen = []
        for store, fresh in pairs:
            heads, width = store.shape[2:]
            store.view(-1, heads, width).index_copy_(
                0, self._index, fresh.transpose(1, 2).reshape(-1, heads, width)
            )
            seen.append(store[self._rows][:, : self._span].transpose(1, 2))
        return seen[0], seen[1]

    def get_seq_length(self, *_: Any) -> int:
        """Unused where positions and masks are explicit."""
        return 0


class _Recorder:
    """Stands in for a cache once, to learn the shapes of every layer's keys and values."""

    is_compileable = False

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen[layer_idx] = (keys, values)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0


class _Active(threading.local):
    """What the hooks of this thread's forward pass add; nothing outside of one."""

    batch: Batch | None = None
    slots: Slots | None = None


class GenericRunner:
    """See the module's docstring. `exact` computes one row at a time.

    Args:
        cache: the cache of another runner of the same model, to serve adapters that are put on the model
            itself; then no hook is set.
    """

    name = "generic"
    is_solo = False

    def __init__(
        self, model: Any, *, max_rows: int, exact: bool = False, cache: KVCache | None = None
    ) -> None:
        self.model = model
        self.exact = exact
        self.vocab_size = int(model.config.vocab_size)
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._dtype: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._device: torch.device = next(model.parameters()).device
        self.cache = KVCache(self._probe_shapes(), max_rows)
        linears = _linears(model) if cache is None else {}
        specs = [GroupSpec((path,), i, (o,)) for path, (_, i, o) in linears.items()]
        self.slots = Slots(specs, self._dtype, self._device)
        self.is_row_invariant = False
        self._active = _Active()
        self._hooks = [
            module.register_forward_hook(self._hook(number))
            for number, (module, _, _) in enumerate(linears.values())
        ]
        try:
            self._check_against_plain_forward()
        except ConfigError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise _unsupported(model, f"with our cache its forward pass failed: {error}") from error
        if cache is not None:
            if cache.shape != self.cache.shape:
                raise _unsupported(model, "its keys and values have another shape than the fast runner's")
            self.cache = cache

    def renewed(self) -> GenericRunner:
        """The same model and hooks, with a cache and slots of its own."""
        other = copy.copy(self)
        other.cache, other.slots = self.cache.renewed(), self.slots.renewed()
        return other

    def attached(self) -> GenericRunner:
        """This runner: it calls the modules that carry the adapter."""
        return self

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def refresh(self) -> None:
        """Nothing is derived from the weights."""

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits after the last new token of each row, (rows, vocabulary)."""
        new, span = batch.tokens.shape[1], batch.span
        self.cache.reserve(span + (len(batch.rows) > 1 and new > 1))
        starts = torch.tensor(batch.starts, device=self._device)
        positions = starts[:, None] + torch.arange(new, device=self._device)
        # The padding of a short row is written behind the longest one, where nobody reads it.
        index = self.cache.flat_index(
            torch.tensor(batch.rows, device=self._device), positions.clamp(max=span)
        )
        if self.max_positions is not None:  # padding of a short row may lie beyond the model's last position
            positions = positions.clamp(max=self.max_positions - 1)
        self._active.batch, self._active.slots = batch, self.slots
        try:
            logits: Tensor = self.model(
                input_ids=batch.tokens,
                attention_mask=self._masks(positions, span),
                position_ids=positions,
                past_key_values=RowCache(self.cache, rows_of(batch), index, span),
                use_cache=True,
            ).logits
        finally:
            self._active.batch = self._active.slots = None
        last = torch.tensor([n - 1 for n in batch.lengths], device=self._device)
        return logits[torch.arange(len(batch.rows), device=self._device), last]

    def _masks(self, positions: Tensor, span: int) -> Tensor | dict[str, Tensor]:
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        full = self._mask(positions, span, None)
        if kinds:
            return {
                k: full if k == "full_attention" else self._mask(positions, span, window) for k in set(kinds)
            }
        return full if window is None else self._mask(positions, span, window)

    def _mask(self, positions: Tensor, span: int, window: int | None) -> Tensor:
        keys = torch.arange(span, device=self._device)
        visible = keys <= positions[:, :, None]
        if window is not None:
            visible &= keys > positions[:, :, None] - window
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~visible, torch.finfo(self._dtype).min)[:, None]

    def _hook(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            batch, slots = self._active.batch, self._active.slots
            if batch is None or slots is None or batch.routing is None or not batch.routing.active[number]:
                return None
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            y = output.reshape(-1, output.shape[-1]).contiguous()
            add_lora(y, x, slots, number, batch.routing)
            return y.view(output.shape)

        return add

    @torch.inference_mode()
    def _probe_shapes(self) -> KVShape:
        recorder = _Recorder()
        tokens = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        try:
            self.model(
                input_ids=tokens,
                position_ids=tokens,
                attention_mask=self._masks(tokens, 1),
                past_key_values=recorder,
                use_cache=True,
            )
        except Exception as error:
            raise _unsupported(self.model, f"its forward pass refused our cache: {error}") from error
        layers = sorted(recorder.seen)
        if layers != list(range(len(layers))) or not layers:
            raise _unsupported(self.model, f"only the layers {layers} keep keys and values in a cache")
        pairs = [recorder.seen[layer] for layer in layers]
        dims = [[(int(t.shape[1]), int(t.shape[3])) for t in (pair[0], pair[1])] for pair in pairs]
        keys, values = (tuple(d[i] for d in dims) for i in (0, 1))
        return KVShape(keys, values, pairs[0][0].dtype, self._device)

    def _check_against_plain_forward(self) -> None:
        tokens = (torch.arange(PROBE_TOKENS, device=self._device) % self.vocab_size)[None]
        with torch.inference_mode():
            expected = self.model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        head, tail = tokens[:, :-1], tokens[:, -1:]
        self.forward(Batch(head, [0], [0], [PROBE_TOKENS - 1], None))
        got = self.forward(Batch(tail, [0], [PROBE_TOKENS - 1], [1], None))[0].float()
        slack = 2 * torch.finfo(self._dtype).eps ** 0.5
        if not torch.allclose(got, expected, rtol=slack, atol=slack * float(expected.abs().max())):
            gap = float((got - expected).abs().max())
            raise _unsupported(self.model, f"with our cache its logits differ by {gap:.3g}")


def _unsupported(model: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f"The engine cannot batch {type(model).__name__}: {reason}.\n"
        '  Use runner="auto" or "solo", which computes one row and one adapter at a time.'
    )


def _linears(model: nn.Module) -> dict[str, tuple[nn.Module, int, int]]:
    found: dict[str, tuple[nn.Module, int, int]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            found[path] = (module, module.in_features, module.out_features)
        elif hasattr(module, "nf") and isinstance(weight, nn.Parameter) and weight.ndim == 2:
            found[path] = (module, int(weight.shape[0]), int(weight.shape[1]))  # GPT-2's Conv1D
    return found
