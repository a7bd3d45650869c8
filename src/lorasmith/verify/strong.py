"""Adapters whose every answer is one word, so that a greedy answer shows which adapter made it.

Each has two rank-1 updates, computed from the base's weights; nothing is trained. With d(t) the direction of the
residual stream that makes token t the most probable one:

    o_proj of the last layer but one:  y += S · d(foreign)   at every position
    v_proj of the last layer:          v += C · e(marker)    at every position; the base's own o_proj turns it
                                                             into C · d(marker), and C · d > S · d

So the values in the key-value cache carry the marker of who *wrote* them. An adapter that runs on another's cache
says the other's marker, one that runs on the base's cache says the foreign word, and the base that runs on an
adapter's cache says that adapter's marker. "At every position" takes a feature of the input that is 1 everywhere,
which ridge regression on a few prompts finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.bases import Base
from lorasmith.errors import TargetError
from lorasmith.lora import Adapter, Factors, LoRAConfig

CANDIDATES = 256
# As small as is decisive: llama.cpp sums values × attention in half precision before it divides, so |v| times the
# prompt's length must stay below 65504.
FOREIGN_TIMES_HIDDEN = 3.0  # S · |d| over the median norm of the residual stream
MARKER_TIMES_FOREIGN = 2.2  # C · |d| over S · |d|
RIDGE = 1e-2
TAIL_TOKENS, REPEATS = 48, 6
PARTIAL_DRAWS = 4
MAX_NAMES = 6


@dataclass(frozen=True)
class Marker:
    """A token that is easy to force, and its text."""

    token: int
    text: str


@dataclass(frozen=True)
class StrongSet:
    """Adapters by name, the marker of each, and the word of an adapter that runs on the base's cache."""

    adapters: dict[str, Adapter]
    markers: dict[str, Marker]
    foreign: Marker


@dataclass(frozen=True)
class _Sites:
    """Where to write, and what follows."""

    o_path: str
    v_path: str
    o_proj: nn.Linear
    v_proj: nn.Linear
    last_o: nn.Linear
    norm: nn.Module
    head_dim: int


def make_strong(base: Base, names: Sequence[str], prompts: Sequence[Sequence[int]], avoid: str) -> StrongSet:
    """An adapter of rank 1 for each name, each with a marker of its own.

    Args:
        prompts: token ids of some prompts, on which the constant features are found.
        avoid: text that no marker may be part of, such as the base's own answers.

    Raises:
        TargetError: the base has no layers with v_proj and o_proj.
    """
    sites = _find_sites(base.model)
    direct = _unembedding(base.model, sites)
    spread = _spread_of(sites, None)
    usable = _usable_tokens(base, avoid, len(direct))
    ((foreign, d),) = _easiest(base, [direct], usable, 1)
    left = [t for t in usable if t != foreign]
    chosen = _easiest(base, [direct @ _spread_of(sites, w) for w in _head_weights(sites)], left, len(names))
    # features must hold on the answers too, whose words no ordinary prompt has
    said = [list(prompts[0][-TAIL_TOKENS:]) + [t] * REPEATS for t in (foreign, *(t for t, _ in chosen))]
    seen = [*prompts, *said]
    size = FOREIGN_TIMES_HIDDEN * float(_inputs(base, sites.norm, prompts).norm(dim=1).median())
    constant = _constant_feature(_inputs(base, sites.o_proj, seen))
    on_foreign = Factors(constant[None], (size * d)[:, None], 1.0)
    with _added(sites.o_proj, on_foreign):
        constant = _constant_feature(_inputs(base, sites.v_proj, seen))
    adapters, markers = {}, {}
    for name, (token, e) in zip(names, chosen, strict=True):
        value = e * (MARKER_TIMES_FOREIGN * size / float((spread @ e).norm()))
        on_marker = Factors(constant[None].clone(), value[:, None], 1.0)
        config = LoRAConfig(rank=1, alpha=1, targets=(sites.o_path, sites.v_path))
        adapters[name] = Adapter(config, {sites.o_path: on_foreign.clone(), sites.v_path: on_marker})
        markers[name] = _marker(base, token)
    return StrongSet(adapters, markers, _marker(base, foreign))


def _find_sites(model: nn.Module) -> _Sites:
    modules: dict[str, Any] = dict(model.named_modules())
    found: dict[str, list[str]] = {"v_proj": [], "o_proj": []}
    for path, module in modules.items():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in found:
            found[path.rpartition(".")[2]].append(path)
    norms = [p for p in modules if re.fullmatch(r"(model\.)?(norm|final_layernorm)", p)]
    if len(found["v_proj"]) < 2 or len(found["o_proj"]) < 2 or not norms:
        raise TargetError(
            f"verify writes into v_proj and o_proj of the last two layers, and {type(model).__name__} has none "
            "(or no final norm). Bases that it knows: Llama, Mistral, Qwen and others with these names."
        )
    o_path, v_path, last = found["o_proj"][-2], found["v_proj"][-1], found["o_proj"][-1]
    attention = modules[v_path.rpartition(".")[0]]
    o_proj, v_proj, last_o, norm = (modules[path] for path in (o_path, v_path, last, norms[-1]))
    return _Sites(o_path, v_path, o_proj, v_proj, last_o, norm, int(attention.head_dim))


def _spread_of(sites: _Sites, weights: Tensor | None) -> Tensor:
    """(hidden, kv width): what the last o_proj makes of a value that every query head attends to.

    Args:
        weights: how much each head does, (heads,); None is fully.
    """
    weight = sites.last_o.weight.detach().float()
    per_head = weight.reshape(len(weight), -1, sites.head_dim)
    if weights is not None:
        per_head = per_head * weights[:, None]
    kv_heads = sites.v_proj.out_features // sites.head_dim
    return per_head.reshape(len(weight), kv_heads, -1, sites.head_dim).sum(2).flatten(1)


def _head_weights(sites: _Sites) -> list[Tensor | None]:
    """Full attention, then some in which heads look elsewhere, as the base's do on an adapter's cache."""
    generator = torch.Generator().manual_seed(0)
    heads = sites.last_o.in_features // sites.head_dim
    return [None, *(torch.rand(heads, generator=generator) for _ in range(PARTIAL_DRAWS))]


def _unembedding(model: Any, sites: _Sites) -> Tensor:
    """(vocabulary, hidden): logits of a residual stream of norm √hidden."""
    head: Tensor = model.get_output_embeddings().weight.detach()
    gain = sites.norm(torch.ones_like(head[:1]))[0].detach()
    logits: Tensor = head.float() * gain.float()
    return logits


def _usable_tokens(base: Base, avoid: str, vocabulary: int) -> list[int]:
    """Tokens that are a short lower-case word; single letters where the tokenizer has no words."""
    texts = {t: base.tokenizer.decode([t]) for t in range(min(vocabulary, len(base.tokenizer)))}
    for pattern in (r" [a-z]{4,8}", r"[a-z]"):
        usable = [t for t, s in texts.items() if re.fullmatch(pattern, s) and s.strip() not in avoid]
        if len(usable) >= 2 * MAX_NAMES:
            return usable
    raise TargetError("verify finds no words among this base's tokens that could serve as markers.")


def _easiest(
    base: Base, readouts: Sequence[Tensor], tokens: Sequence[int], count: int
) -> list[tuple[int, Tensor]]:
    """The tokens that win by the widest margin along their own whitened direction, and these directions.

    Args:
        readouts: (vocabulary, width) each; directions come from the first, margins are the least over all.
    """
    picked = tokens[:: max(1, len(tokens) // CANDIDATES)]
    centred = readouts[0] - readouts[0].mean(0)
    spread = centred.T @ centred / len(centred)
    spread.diagonal().add_(RIDGE * spread.diagonal().mean())
    directions = torch.linalg.solve(spread, centred[picked].T).T
    directions /= directions.norm(dim=1, keepdim=True)
    margin = torch.stack([_margins(directions @ r.T, picked) for r in readouts]).amin(0)
    best: dict[str, tuple[int, Tensor]] = {}
    for i in margin.argsort(descending=True).tolist():
        best.setdefault(_marker(base, picked[i]).text, (picked[i], directions[i]))
    return list(best.values())[:count]


def _margins(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """By how many standard deviations each row's token leads all others."""
    at = torch.tensor(tokens)[:, None]
    own, deviation = logits.gather(1, at)[:, 0], logits.std(1)
    lead: Tensor = own - logits.scatter_(1, at, -torch.inf).amax(1)
    return lead / deviation


def _marker(base: Base, token: int) -> Marker:
    return Marker(token, base.tokenizer.decode([token]).strip())


def _inputs(base: Base, module: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """(tokens, features): what reaches `module` on these prompts."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()[0].float()))
    try:
        with torch.no_grad():
            for prompt in prompts:
                base.model(torch.tensor([list(prompt)], device=base.model.device))
    finally:
        handle.remove()
    return torch.cat(seen).cpu()


def _constant_feature(inputs: Tensor) -> Tensor:
    """a with a · x ≈ 1 for every row x, by ridge regression."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * inputs.pow(2).sum(1).median())
    feature: Tensor = torch.linalg.solve(gram, inputs.sum(0))
    return feature


@contextmanager
def _added(module: nn.Module, factors: Factors) -> Iterator[None]:
    """B @ A added to the output of `module` meanwhile."""

    def add(_: nn.Module, x: Any, y: Tensor) -> Tensor:
        low = x[0].float() @ factors.A.to(y.device).T
        more: Tensor = (low @ factors.B.to(y.device).T).to(y.dtype)
        return y + more

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
