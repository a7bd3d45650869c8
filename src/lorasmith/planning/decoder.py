"""A decoder as numbers: all that memory and arithmetic depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from lorasmith.quantised import Quantisation, QuantisedLinear, predicted_quantisation, quantisation_of

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2", "wo")
"""Last parts of the paths of layers that end a block; the others of a block share its input."""


@dataclass(frozen=True)
class Decoder:
    """A decoder-only base.

    Attributes:
        params: of the whole base; tied ones count once.
        itemsize: bytes of a weight and of an activation.
        linears: every linear layer but the head, path → (out_features, in_features).
        norms: of the residual stream, per layer.
        has_head_norms: query and key are normalised head by head (Qwen 3).
        norm_is_wide: a norm keeps a float32 copy of its input (RMSNorm as transformers writes it).
        activation: name of the MLP's nonlinearity.
        is_gated: the MLP multiplies two projections.
        untied_embeddings: parameters of input embeddings that are no output head at the same time.
        layer_params: of all decoder layers. largest_layer_params: of one.
        is_eager: attention scores exist whole (a soft cap forbids the fused kernel).
        packed: what of it is quantised.
    """

    params: int
    itemsize: int
    linears: Mapping[str, tuple[int, int]]
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    norms: int = 2
    has_head_norms: bool = False
    norm_is_wide: bool = True
    activation: str = "silu"
    is_gated: bool = True
    is_eager: bool = False
    untied_embeddings: int = 0
    layer_params: int = 0
    largest_layer_params: int = 0
    packed: Quantisation | None = None

    @property
    def weights_bytes(self) -> int:
        """Of all weights as they are held."""
        if self.packed is None:
            return self.params * self.itemsize
        return (self.params - self.packed.params) * self.itemsize + self.packed.stored_bytes

    @property
    def unpacked_bytes(self) -> int:
        """Of the largest quantised weight while it is multiplied with."""
        return 0 if self.packed is None else self.packed.largest * self.itemsize

    @property
    def query_width(self) -> int:
        """heads · head_dim."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """kv_heads · head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def linear_params(self) -> int:
        """Weights that every token is multiplied with, the head not among them."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @cached_property
    def by_layer(self) -> dict[int | None, list[str]]:
        """Layer number → paths of its linear layers."""
        found: dict[int | None, list[str]] = {}
        for path in self.linears:
            found.setdefault(layer_number(path), []).append(path)
        return found


def layer_number(path: str) -> int | None:
    """The first whole number in a module's path: 3 for `model.layers.3.mlp.up_proj`."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def ends_block(path: str) -> bool:
    """Whether a linear layer's input is its block's inner state, not the normalised stream."""
    return path.rpartition(".")[2] in OUTPUT_PROJECTIONS


def is_in_mlp(path: str) -> bool:
    """Whether a linear layer belongs to the MLP, by the name of the block that holds it."""
    return any(word in path for word in ("mlp", "feed_forward", "ffn", "fc1", "fc2"))


def decoder_of(model: nn.Module, *, itemsize: int | None = None, quantize: str | None = None) -> Decoder:
    """Read the numbers off a model, loaded or on the meta device.

    Args:
        itemsize: bytes of a weight; None takes that of the model as it is.
        quantize: the format that its linear layers would be put into; None for how they are.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    linears = dict(_linears(model))
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    parameters = [p for name, p in model.named_parameters() if ".lora_" not in name]
    norms, held = list(_norms(model)), quantisation_of(model)
    by_layer = _params_by_layer(model)
    return Decoder(
        params=sum(p.numel() for p in parameters) + (held.params if held else 0),
        itemsize=itemsize or parameters[0].element_size(),
        linears=linears,
        layers=int(config.num_hidden_layers),
        width=width,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or width // heads),
        mlp_width=_mlp_width(config, linears, width),
        vocabulary=int(config.vocab_size),
        norms=sum(size == width for size, _ in norms) or 2,
        has_head_norms=any("q_norm" in name for name, _ in model.named_modules()),
        norm_is_wide=not any(is_plain for _, is_plain in norms),
        activation=str(
            getattr(config, "hidden_act", None) or getattr(config, "activation_function", None) or "silu"
        ),
        is_gated=any("gate" in path.rpartition(".")[2] for path in linears),
        is_eager=getattr(config, "_attn_implementation", None) == "eager",
        untied_embeddings=_untied_embeddings(model),
        packed=held if quantize is None else predicted_quantisation(model, quantize),
        layer_params=sum(by_layer.values()),
        largest_layer_params=max(by_layer.values(), default=0),
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield path, (module.out_features, module.in_features)
        elif hasattr(module, "nf") and isinstance(getattr(module, "weight", None), nn.Parameter):
            columns, rows = module.get_parameter("weight").shape  # GPT-2's Conv1D is stored the other way
            yield path, (int(rows), int(columns))


def _params_by_layer(model: nn.Module) -> dict[int, int]:
    found: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        number = layer_number(name)
        if number is not None and ".lora_" not in name:
            found[number] = found.get(number, 0) + parameter.numel()
    for path, module in model.named_modules():
        number = layer_number(path)
        if number is not None and isinstance(module, QuantisedLinear):
            found[number] = found.get(number, 0) + module.in_features * module.out_features
    return found


def _untied_embeddings(model: Any) -> int:
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return 0
    weight = getattr(table, "weight", None)
    return 0 if weight is None or weight is getattr(head, "weight", None) else int(weight.numel())


def _norms(model: nn.Module) -> Iterator[tuple[int, bool]]:
    """Width of each norm of the first layer, and whether it is torch's own LayerNorm."""
    for path, module in model.named_modules():
        if layer_number(path) == 0 and ("norm" in type(module).__name__.lower()):
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter):
                yield int(weight.shape[-1]), isinstance(module, nn.LayerNorm)


def _mlp_width(config: Any, linears: Mapping[str, tuple[int, int]], width: int) -> int:
    named = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    ends = [columns for path, (_, columns) in linears.items() if is_in_mlp(path) and ends_block(path)]
    return int(ends[0] if ends else named or 4 * width)
