"""Bytes that a training step holds besides weights and optimizer: the one place with the formulas.

n slots in rows of length L; s bytes per element; d width, q and k query and key width, m MLP width,
h heads, r the summed rank of a layer's targets. What autograd keeps per layer (compared with its own
count in the tests), first through `train.block`, the fast decoder layer:

    stream      s·n·2·d               what goes into the attention and into the MLP
    attention   s·n·(2·q + 2·k)       query, key, value, output
    mlp         s·n·2·m               gate and up; nothing where they are multiplied again
    low rank    s·n·r

and as transformers writes the layer and `inject` the adapted projections:

    norms       norms · (4·n·d + 4·n)   float32 copy (float32: the stream itself) and 1/rms
    inputs      s·n·d each for (q, k, v) and (gate, up), where one of them trains
    attention   as above by tiles; by torch's kernel 4·n·h more for its log-sum-exp, and under a mask
                of ours keys and values repeated to q, and the mask itself: s·n·L
    mlp         gated: s·n·m · (activation's own + 2), plus s·n·m where down trains
    low rank    s·n·r
    full        s·n·d per norm more, for the gradients of the norms' weights

Where layers are computed again in the backward pass, each keeps s·n·d, its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorasmith.planning.decoder import Decoder, ends_block, is_in_mlp

Recompute = Literal["none", "mlp", "layers"]

SAVED_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 4}
"""Tensors of the MLP's width that a nonlinearity saves; one where it is a single operation."""

LOGIT_CHUNK_BYTES = 96 * 2**20
CHUNK_BYTES_PER_LOGIT = {2: 8, 4: 8, 8: 16}
"""What `train.loss` reckons with when it chooses the chunk."""


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass.

    Attributes:
        rows, length: of the batch; slots = rows · length, padding included.
        supervised: tokens that carry loss.
        is_masked: several sequences share a row, so attention gets a mask of ours.
    """

    rows: int
    length: int
    supervised: int
    is_masked: bool = False

    @property
    def slots(self) -> int:
        """What is computed."""
        return self.rows * self.length


@dataclass(frozen=True)
class Computing:
    """How layers are computed, as far as memory depends on it.

    Attributes:
        is_block: by `train.block`, one autograd node a layer.
        is_tiled: attention by tiles (a CPU), which saves neither repeated keys nor a log-sum-exp.
        is_in_place: the loss turns logits into their gradient in place (the C functions, a frozen head).
        recompute: "mlp" (gate and up; the whole layer where `is_block` is not) or "layers".
        keeps_activations: else they wait elsewhere, and one layer's are here at a time.
    """

    is_block: bool = False
    is_tiled: bool = False
    is_in_place: bool = False
    recompute: Recompute = "none"
    keeps_activations: bool = True

    @property
    def again(self) -> Recompute:
        """What is really computed again."""
        return "layers" if self.recompute == "mlp" and not self.is_block else self.recompute


@dataclass(frozen=True)
class Trained:
    """What has gradients.

    Attributes:
        ranks: of the LoRA targets among the decoder's linear layers, by path; None: every weight trains.
        other_params: numbers that train elsewhere (embeddings, head, biases).
    """

    ranks: Mapping[str, int] | None
    other_params: int = 0

    @property
    def is_full(self) -> bool:
        """Full fine-tuning."""
        return self.ranks is None

    def has(self, path: str) -> bool:
        """Whether the input of this linear layer must be kept."""
        return self.ranks is None or path in self.ranks

    def params(self, decoder: Decoder) -> int:
        """How many numbers are trained: Σ rank · (in + out) and the others, or all."""
        if self.ranks is None:
            return decoder.params
        low_rank = sum(rank * sum(decoder.linears[path]) for path, rank in self.ranks.items())
        return low_rank + self.other_params


def saved_by_layer(decoder: Decoder, trained: Trained, p: Pass, how: Computing) -> list[dict[str, int]]:
    """Bytes that autograd keeps for each layer, by purpose."""
    first = _first_trained(decoder, trained)
    if how.again == "layers":
        return [{"stream": _stream(decoder, p) * (n >= first)} for n in range(decoder.layers)]
    if how.is_block:  # below the first adapter nothing has a gradient, so nothing is kept
        return [
            _block(decoder, trained, p, n, how) if n >= first else {"stream": 0}
            for n in range(decoder.layers)
        ]
    return [_plain(decoder, trained, p, n, how) for n in range(decoder.layers)]


def _stream(d: Decoder, p: Pass) -> int:
    return d.itemsize * p.slots * d.width


def _block(d: Decoder, trained: Trained, p: Pass, number: int, how: Computing) -> dict[str, int]:
    one = d.itemsize * p.slots
    return {
        "stream": one * 2 * d.width,
        "attention": one * 2 * (d.query_width + d.key_width),
        "mlp": 0 if how.again == "mlp" else one * 2 * d.mlp_width,
        "low_rank": one * _ranks(d, trained, number),
    }


def _ranks(d: Decoder, trained: Trained, number: int) -> int:
    return sum((trained.ranks or {}).get(path, 0) for path in d.by_layer.get(number, []))


def _plain(d: Decoder, trained: Trained, p: Pass, number: int, how: Computing) -> dict[str, int]:
    n, s = p.slots, d.itemsize
    paths = [path for path in d.by_layer.get(number, []) if trained.has(path)]
    inputs = {is_in_mlp(path) for path in paths if not ends_block(path)}
    ends_mlp = any(is_in_mlp(path) and ends_block(path) for path in paths)
    norms, has_attention, has_mlp = d.norms, True, True
    if number <= _first_trained(d, trained):
        # Below the first adapter nothing has a gradient, so nothing is kept.
        has_attention = any(not is_in_mlp(path) for path in paths)
        has_mlp = has_attention or True in inputs
        norms = max(0, (norms - 1 if has_attention else 0) if paths else 0)
    return {
        "norms": norms * _norm(d, n, d.width, trained) + has_attention * _head_norms(d, n, trained),
        "inputs": s * n * d.width * len(inputs),
        "attention": has_attention * _attention(d, p, how),
        "mlp": s * n * d.mlp_width * (has_mlp * _mlp_tensors(d) + ends_mlp),
        "low_rank": s * n * _ranks(d, trained, number),
    }


def _first_trained(d: Decoder, trained: Trained) -> int:
    """Number of the lowest layer with an adapter; −1 where the embeddings train too."""
    if trained.is_full:
        return -1
    return min(
        (n for n, paths in d.by_layer.items() if n is not None and any(map(trained.has, paths))), default=-1
    )


def _norm(d: Decoder, n: int, width: int, trained: Trained) -> int:
    if not d.norm_is_wide:  # torch's LayerNorm keeps its input, the mean and 1/std
        return d.itemsize * n * width + 2 * d.itemsize * n
    return 4 * n * width + 4 * n + (d.itemsize * n * width if trained.is_full else 0)


def _head_norms(d: Decoder, n: int, trained: Trained) -> int:
    if not d.has_head_norms:
        return 0
    return _norm(d, n * (d.heads + d.kv_heads), d.head_dim, trained)


def _attention(d: Decoder, p: Pass, how: Computing) -> int:
    n, s = p.slots, d.itemsize
    if how.is_tiled and not d.is_eager:
        return s * n * 2 * (d.query_width + d.key_width)
    if d.is_eager:  # scores before and after the softmax, in float32 and in the model's own dtype
        return s * n * 4 * d.query_width + n * p.length * d.heads * (4 + 2 * s)
    keys = 2 * (d.query_width if p.is_masked else d.key_width)
    mask = s * n * p.length if p.is_masked else 0
    return s * n * (2 * d.query_width + keys) + 4 * n * d.heads + mask


def _mlp_tensors(d: Decoder) -> int:
    own = SAVED_BY_ACTIVATION.get(d.activation, 1)
    return own + 2 if d.is_gated else own


def saved_bytes(decoder: Decoder, trained: Trained, p: Pass, how: Computing) -> int:
    """All that lives between forward and backward."""
    each = [sum(layer.values()) for layer in saved_by_layer(decoder, trained, p, how)]
    layers = sum(each) if how.keeps_activations else max(each)
    return layers + _norm(decoder, p.slots, decoder.width, trained) + _tables(decoder, p, how)


def _tables(d: Decoder, p: Pass, how: Computing) -> int:
    """Rotary cosines and sines, token ids and positions; the boolean mask and what tiles add to the scores."""
    positions = p.slots if p.is_masked else p.length
    mask = (1 + how.is_tiled * d.itemsize) * p.slots * p.length if p.is_masked else 0
    return 2 * d.itemsize * positions * d.head_dim + 16 * p.slots + mask


def logit_bytes(decoder: Decoder, trained: Trained, p: Pass, how: Computing) -> int:
    """Peak of the loss: hidden states, those of supervised tokens, their gradient, one chunk of logits.

    A head that trains (full fine-tuning) is differentiated chunk by chunk: its summed gradient, and
    that of the chunk, are as large as the head itself.
    """
    s = decoder.itemsize
    head = 2 * s * decoder.vocabulary * decoder.width if trained.is_full else 0
    hidden = s * decoder.width * (p.slots + 2 * p.supervised)
    return hidden + chunk_bytes(decoder, trained, p, how) + head


def chunk_bytes(decoder: Decoder, trained: Trained, p: Pass, how: Computing) -> int:
    """One chunk of logits; unless in place also log p in float32, and for a head that trains its gradients."""
    chunk, s = min(p.supervised, logit_chunk(decoder.vocabulary, decoder.itemsize)), decoder.itemsize
    wide = max(4, s)
    each = s + (3 * wide if trained.is_full else 0 if how.is_in_place else 2 * wide)
    return chunk * decoder.vocabulary * each


def logit_chunk(vocabulary: int, itemsize: int) -> int:
    """Tokens whose logits exist at one time, as `train.loss` chooses it."""
    return max(16, LOGIT_CHUNK_BYTES // (vocabulary * CHUNK_BYTES_PER_LOGIT[itemsize]))


def backward_bytes(decoder: Decoder, trained: Trained, p: Pass, how: Computing) -> int:
    """What exists while one layer is differentiated, besides what it kept.

    The gradients of gate · up, gate and up; of query, its rotated copy, output, keys and values; of the stream
    before and after each half, and a norm formed again. (Plain: the MLP's four, or a norm's four in float32.)
    What a layer did not keep is there too, made anew.
    """
    d, one = decoder, decoder.itemsize * p.slots
    if how.is_block:
        gradients = one * (6 * d.width + 3 * d.mlp_width + 3 * d.query_width + 4 * d.key_width)
    else:
        gradients = one * d.width + max(4 * one * d.mlp_width, 4 * 4 * p.slots * d.width)
    return gradients + anew_bytes(d, trained, p, how)


def anew_bytes(decoder: Decoder, trained: Trained, p: Pass, how: Computing) -> int:
    """What the backward pass computes again of one layer: all that the layer would have kept, less what it did."""
    kept, whole = (
        max(sum(layer.values()) for layer in saved_by_layer(decoder, trained, p, way))
        for way in (how, Computing(how.is_block, how.is_tiled, how.is_in_place))
    )
    return whole - kept
