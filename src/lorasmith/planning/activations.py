"""Bytes that a training step holds besides weights and optimizer: the one place with the formulas.

n slots in rows of length L; s bytes per element; d width, q and k query and key width, m MLP width,
h heads, r the summed rank of a layer's targets. What autograd saves per layer, as transformers writes
the layer and `inject` the adapted projections (compared with autograd's own count in the tests):

    norms       norms · (4·n·d + 4·n)   float32 copy (float32: the stream itself) and 1/rms
    inputs      s·n·d each for (q, k, v) and (gate, up), where one of them trains
    attention   s·n·(q + 2·k) + s·n·q + 4·n·h    query, key, value, output, log-sum-exp
                under a mask of ours keys and values are repeated to q, and the mask is kept: s·n·L
    mlp         gated: s·n·m · (activation's own + 2), plus s·n·m where down trains
    low rank    s·n·r
    full        s·n·d per norm more, for the gradients of the norms' weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorasmith.planning.decoder import Decoder, ends_block, is_in_mlp

SAVED_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 4}
"""Tensors of the MLP's width that a nonlinearity saves; one where it is a single operation."""

LOGIT_CHUNK_BYTES = 64 * 2**20
CHUNK_BYTES_PER_LOGIT = {2: 8, 4: 8, 8: 16}
"""What `train.loss` reckons with when it chooses the chunk."""

PEAK_BYTES_PER_LOGIT = {2: 2 + 4 + 4, 4: 4 + 4 + 4, 8: 8 + 8 + 8}
"""What one logit costs at the worst moment: logits, their float32 copy, log p (then p and its gradient)."""


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
class Trained:
    """What has gradients: `ranks` of the LoRA targets by path, or every weight where it is None."""

    ranks: Mapping[str, int] | None

    @property
    def is_full(self) -> bool:
        """Full fine-tuning."""
        return self.ranks is None

    def has(self, path: str) -> bool:
        """Whether the input of this linear layer must be kept."""
        return self.ranks is None or path in self.ranks

    def params(self, decoder: Decoder) -> int:
        """How many numbers are trained: Σ rank · (in + out), or all."""
        if self.ranks is None:
            return decoder.params
        return sum(rank * sum(decoder.linears[path]) for path, rank in self.ranks.items())


def saved_by_layer(decoder: Decoder, trained: Trained, p: Pass) -> list[dict[str, int]]:
    """Bytes that autograd keeps for each layer, by purpose, when nothing is recomputed."""
    return [_saved_in(decoder, trained, p, number) for number in range(decoder.layers)]


def _saved_in(d: Decoder, trained: Trained, p: Pass, number: int) -> dict[str, int]:
    n, s = p.slots, d.itemsize
    paths = [path for path in d.by_layer.get(number, []) if trained.has(path)]
    inputs = {is_in_mlp(path) for path in paths if not ends_block(path)}
    ends_mlp = any(is_in_mlp(path) and ends_block(path) for path in paths)
    ranks = sum((trained.ranks or {}).get(path, 0) for path in paths)
    norms, has_attention, has_mlp = d.norms, True, True
    if number <= _first_trained(d, trained):
        # Below the first adapter nothing has a gradient, so nothing is kept.
        has_attention = any(not is_in_mlp(path) for path in paths)
        has_mlp = has_attention or True in inputs
        norms = max(0, (norms - 1 if has_attention else 0) if paths else 0)
    return {
        "norms": norms * _norm(d, n, d.width, trained) + has_attention * _head_norms(d, n, trained),
        "inputs": s * n * d.width * len(inputs),
        "attention": has_attention * _attention(d, p),
        "mlp": s * n * d.mlp_width * (has_mlp * _mlp_tensors(d) + ends_mlp),
        "low_rank": s * n * ranks,
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


def _attention(d: Decoder, p: Pass) -> int:
    n, s = p.slots, d.itemsize
    if d.is_eager:  # scores before and after the softmax, in float32 and in the model's own dtype
        return s * n * 4 * d.query_width + n * p.length * d.heads * (4 + 2 * s)
    keys = 2 * (d.query_width if p.is_masked else d.key_width)
    mask = s * n * p.length if p.is_masked else 0
    return s * n * (2 * d.query_width + keys) + 4 * n * d.heads + mask


def _mlp_tensors(d: Decoder) -> int:
    own = SAVED_BY_ACTIVATION.get(d.activation, 1)
    return own + 2 if d.is_gated else own


def saved_bytes(decoder: Decoder, trained: Trained, p: Pass, *, recompute: bool) -> int:
    """All that lives between forward and backward.

    Args:
        recompute: layers are recomputed in the backward pass, so only their inputs are kept.
    """
    stream = decoder.itemsize * p.slots * decoder.width
    kept = decoder.layers - max(0, _first_trained(decoder, trained))
    final = _norm(decoder, p.slots, decoder.width, trained) + _tables(decoder, p)
    if recompute:
        return kept * stream + final
    return sum(sum(layer.values()) for layer in saved_by_layer(decoder, trained, p)) + final


def _tables(d: Decoder, p: Pass) -> int:
    """Rotary cosines and sines, token ids and positions, the boolean mask."""
    positions = p.slots if p.is_masked else p.length
    return 2 * d.itemsize * positions * d.head_dim + 16 * p.slots + (p.slots * p.length if p.is_masked else 0)


def logit_bytes(decoder: Decoder, trained: Trained, p: Pass) -> int:
    """Peak of the loss: hidden states, those of supervised tokens, their gradient, one chunk of logits.

    A head that trains (full fine-tuning) is differentiated chunk by chunk: its summed gradient, and
    that of the chunk, are as large as the head itself.
    """
    s = decoder.itemsize
    logits = chunk_bytes(decoder, p)
    head = 2 * s * decoder.vocabulary * decoder.width if trained.is_full else 0
    return s * decoder.width * (p.slots + 2 * p.supervised) + logits + head


def chunk_bytes(decoder: Decoder, p: Pass) -> int:
    """One chunk of logits and what is made of them."""
    chunk = min(p.supervised, logit_chunk(decoder.vocabulary, decoder.itemsize))
    return chunk * decoder.vocabulary * PEAK_BYTES_PER_LOGIT[decoder.itemsize]


def logit_chunk(vocabulary: int, itemsize: int) -> int:
    """Tokens whose logits exist at one time, as `train.loss` chooses it."""
    return max(16, LOGIT_CHUNK_BYTES // (vocabulary * CHUNK_BYTES_PER_LOGIT[itemsize]))


def backward_bytes(decoder: Decoder, trained: Trained, p: Pass, *, recompute: bool) -> int:
    """Gradients of activations that exist while one layer is differentiated.

    The stream's gradient and the MLP's four tensors, or the four float32 tensors of a norm; with
    `recompute` also the layer's own activations, made anew.
    """
    s, n = decoder.itemsize, p.slots
    gradients = s * n * decoder.width + max(4 * s * n * decoder.mlp_width, 4 * 4 * n * decoder.width)
    layer = max(sum(x.values()) for x in saved_by_layer(decoder, trained, p)) if recompute else 0
    return gradients + layer


def activation_bytes(decoder: Decoder, trained: Trained, p: Pass, *, recompute: bool) -> int:
    """The most that one pass holds at any time, besides weights, factors, gradients and optimizer."""
    moment = max(logit_bytes(decoder, trained, p), backward_bytes(decoder, trained, p, recompute=recompute))
    return saved_bytes(decoder, trained, p, recompute=recompute) + moment
