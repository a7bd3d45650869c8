"""Prefix tuning and prompt tuning: learned positions that every token of the text attends to.

Both are one mechanism. Keys and values of `n` virtual tokens come before those of the text in every
attention, and the text's positions begin at n. A prefix learns those keys and values; a prompt learns the
n input embeddings that they are computed from: exactly what the model does when the embeddings stand
before the text, since no earlier position sees a later one. They hang on the attention itself, so a
key-value cache, packing and masks know nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.baselines.anatomy import body_of, width_of
from lorasmith.baselines.method import Baseline, refuse
from lorasmith.bases import attention_inputs
from lorasmith.errors import ConfigError

ATTRIBUTE = "virtual_tokens"
CHILD = "virtual"
INIT_STD = 0.02
Pair = tuple[Tensor, Tensor]
"""Keys and values of one layer, each (kv_heads, n, head_dim)."""


class VirtualTokens:
    """Puts pairs before the keys and values of each attention of one model.

    Args:
        pairs: called once a forward pass of the body; what it gives is used until the next.
        n: virtual tokens.
    """

    def __init__(self, model: nn.Module, n: int, pairs: Callable[[], Sequence[Pair]]) -> None:
        self.model, self.n, self.make_pairs = model, n, pairs
        self.pairs: Sequence[Pair] | None = None
        self._heard: list[tuple[nn.Module, Tensor, Tensor]] | None = None
        self._stack = ExitStack()
        if not self._stack.enter_context(attention_inputs(model, ATTRIBUTE)):
            raise ConfigError(
                f"{type(model).__name__} does not compute attention by PyTorch's fused kernel (sdpa), "
                "where virtual tokens could come before the text's."
            )
        self.places: list[nn.Module] = [m for m in model.modules() if hasattr(m, "layer_idx")]
        for module in self.places:
            object.__setattr__(module, ATTRIBUTE, self)
        try:
            self.places = self._find_layers()
        except BaseException:
            self.remove()
            raise
        self._hook = body_of(model).register_forward_pre_hook(self._before_body, with_kwargs=True)
        self._stack.callback(self._hook.remove)

    def remove(self) -> None:
        """Leave the model as it was."""
        for module in self.model.modules():
            vars(module).pop(ATTRIBUTE, None)
        self._stack.close()

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask of one attention, those of the virtual tokens first."""
        if self._heard is not None:
            self._heard.append((module, key, value))
            return key, value, mask
        if self.pairs is None:
            return key, value, mask
        before = self.pairs[self._number[id(module)]]
        wide = [p.to(key.dtype).expand(len(key), -1, -1, -1) for p in before]
        mask = _widened(mask, query, key, self.n)
        return torch.cat([wide[0], key], 2), torch.cat([wide[1], value], 2), mask

    def listen(self, **inputs: Tensor) -> list[Pair]:
        """Keys and values that each layer computes for one row of `inputs`, without virtual tokens."""
        self._heard, heard = [], []
        try:
            body_of(self.model)(**inputs, use_cache=False)
            heard = self._heard
        finally:
            self._heard = None
        self._last = [module for module, _, _ in heard]
        return [(key[0], value[0]) for _, key, value in heard]

    def _find_layers(self) -> list[nn.Module]:
        device = next(self.model.parameters()).device
        with torch.no_grad():
            pairs = self.listen(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
        layers = self._last
        if not layers or len({id(m) for m in layers}) != len(layers):
            raise ConfigError(f"{type(self.model).__name__}: no keys and values go through its attention.")
        self._number = {id(m): k for k, m in enumerate(layers)}
        self.shapes = [(int(k.shape[0]), int(k.shape[2]), int(v.shape[2])) for k, v in pairs]
        return layers

    def _before_body(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._heard is not None:
            return None
        self.pairs = self.make_pairs()
        given: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        positions = kwargs.get("position_ids")
        if positions is None:
            past = kwargs.get("past_key_values")
            start = 0 if past is None else int(past.get_seq_length())
            positions = torch.arange(start, start + given.shape[1], device=given.device)[None]
        return args, kwargs | {"position_ids": positions + self.n}


def _widened(mask: Tensor | None, query: Tensor, key: Tensor, n: int) -> Tensor | None:
    """The mask with n columns before it that everyone sees."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if queries == 1:
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril_(keys - queries)[
            None, None
        ]
    seen = (
        mask.new_ones(*mask.shape[:-1], n)
        if mask.dtype == torch.bool
        else mask.new_zeros(*mask.shape[:-1], n)
    )
    return torch.cat([seen, mask[..., :keys]], -1)


class PrefixNetwork(nn.Module):
    """P = MLP(E): E (n, width) → Linear → tanh → Linear → keys and values of every layer.

    Float32. `direct` has no network: the keys and values are the parameters.
    """

    def __init__(self, n: int, width: int, hidden: int, shapes: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.sizes = [heads * dim for heads, *dims in shapes for dim in dims]
        self.shapes = shapes
        self.embedding = nn.Embedding(n, width)
        self.transform = nn.Sequential(
            nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, sum(self.sizes))
        )

    def initialise(self, generator: torch.Generator) -> None:
        """Normal, as the paper's GPT-2 code starts every linear layer and embedding; zero biases."""
        for name, p in self.named_parameters():
            with torch.no_grad():
                p.zero_() if name.endswith("bias") else p.normal_(0, INIT_STD, generator=generator)

    def forward(self) -> list[Pair]:
        """Layer by layer."""
        flat = self.transform(self.embedding.weight)  # (n, Σ heads · dim)
        parts = [
            part.view(len(flat), heads, -1).transpose(0, 1)
            for part, (heads, *_) in zip(
                torch.split(flat, self.sizes, 1), [s for s in self.shapes for _ in (0, 1)], strict=True
            )
        ]
        return list(zip(parts[::2], parts[1::2], strict=True))


class DirectPrefix(nn.Module):
    """Keys and values themselves as parameters."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.keys = nn.ParameterList(nn.Parameter(k.detach().float().clone()) for k, _ in pairs)
        self.values = nn.ParameterList(nn.Parameter(v.detach().float().clone()) for _, v in pairs)

    def forward(self) -> list[Pair]:
        """Layer by layer."""
        return list(zip(self.keys, self.values, strict=True))


class DirectPrompt(nn.Module):
    """Input embeddings of virtual tokens, (n, width)."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.detach().float().clone())


class Virtual(Baseline):
    """What prefix and prompt tuning share."""

    _tokens: VirtualTokens

    def _ids(self) -> list[int] | None:
        """Tokens of `init_text`, repeated or cut to the number that was asked."""
        ids = self.options.get("init_ids")
        if ids is None:
            return None
        n = self.options["virtual_tokens"] = self.options["virtual_tokens"] or len(ids)
        return [ids[k % len(ids)] for k in range(n)]

    def _put(self, model: nn.Module, module: nn.Module) -> None:
        model.add_module(CHILD, module.to(next(model.parameters()).device))
        module.requires_grad_(True)

    def detach(self, model: nn.Module) -> None:
        """Virtual tokens gone."""
        self._tokens.remove()
        if hasattr(model, CHILD):
            delattr(model, CHILD)


class Prefix(Virtual):
    """Keys and values of virtual tokens, through a network that is dropped, or directly from a text's."""

    name = "prefix"

    def _add(self, model: nn.Module, generator: torch.Generator) -> str:
        ids = self._ids()
        n, hidden = self.options["virtual_tokens"], self.options["prefix_hidden"]
        self._tokens = VirtualTokens(model, n, lambda: self._module())
        self._module: Any
        if ids is not None:
            with torch.no_grad():
                pairs = self._tokens.listen(input_ids=torch.tensor([ids], device=_device(model)))
            self._module = DirectPrefix(pairs)
            said = "trained directly from a text's keys and values"
        else:
            self._module = PrefixNetwork(n, width_of(model), hidden, self._tokens.shapes)
            self._module.initialise(generator)
            said = f"through a network of width {hidden} that is dropped after training"
        self._put(model, self._module)
        return f"keys and values of {n} virtual tokens in {len(self._tokens.places)} layers, {said}"

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The keys and values alone."""
        with torch.no_grad():
            return _named(self._module())

    def apply(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """See `Baseline`."""
        n = self.options["virtual_tokens"]
        pairs: list[Pair] = []
        self._tokens = VirtualTokens(model, n, lambda: pairs)
        wanted = {
            f"layers.{k}.{part}": (heads, n, dim)
            for k, (heads, *dims) in enumerate(self._tokens.shapes)
            for part, dim in zip(("key", "value"), dims, strict=True)
        }
        try:
            _check(self.name, wanted, tensors)
        except BaseException:
            self.detach(model)
            raise
        here = {name: tensors[name].to(_device(model)) for name in wanted}
        pairs += [(here[f"layers.{k}.key"], here[f"layers.{k}.value"]) for k in range(len(wanted) // 2)]


class Prompt(Virtual):
    """Input embeddings of virtual tokens; in a forward pass they are computed once, for all rows."""

    name = "prompt"
    can_recompute = False  # the pass over the prompt is told from the text's by when it happens

    def _add(self, model: nn.Module, generator: torch.Generator) -> str:
        config: Any = model.config
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            raise ConfigError(
                f"Prompt tuning needs every token to see the prompt; this base sees {window} tokens back."
            )
        vectors = model.get_input_embeddings().weight  # type: ignore[operator]
        ids = self._ids()
        n = self.options["virtual_tokens"]
        said = "from a text" if ids is not None else "from random tokens of the vocabulary"
        if ids is None:
            ids = torch.randint(len(vectors), (n,), generator=generator).tolist()
        self._start(model, model.get_input_embeddings()(torch.tensor(ids, device=_device(model))))  # type: ignore[operator]
        return f"input embeddings of {n} virtual tokens, {said}"

    def _start(self, model: nn.Module, embeddings: Tensor) -> None:
        module = DirectPrompt(embeddings)
        dtype = next(model.parameters()).dtype
        self._tokens = tokens = VirtualTokens(
            model,
            len(embeddings),
            lambda: tokens.listen(inputs_embeds=module.embeddings.to(dtype)[None]),
        )
        self._put(model, module)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The embeddings."""
        return {"embeddings": model.get_parameter(f"{CHILD}.embeddings").detach()}

    def apply(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """See `Baseline`. Keys and values are computed once, here."""
        _check(self.name, {"embeddings": (self.options["virtual_tokens"], width_of(model))}, tensors)
        self._start(model, tensors["embeddings"])
        with torch.no_grad():
            pairs = self._tokens.make_pairs()
        self._tokens.make_pairs = lambda: pairs
        model.requires_grad_(False)


def _named(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    parts = [(k, *pair) for k, pair in enumerate(pairs)]
    return {f"layers.{k}.key": key for k, key, _ in parts} | {f"layers.{k}.value": v for k, _, v in parts}


def _check(method: str, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} belongs to nothing here" for name in tensors if name not in wanted]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, here it is {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    refuse(method, faults)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
