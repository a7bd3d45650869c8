"""Tiny models of every kind of linear layer, with random weights and no tokenizer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lorasmith.inject import eject, extract, inject
from lorasmith.lora import Adapter, LoRAConfig

VOCAB = 64


def tiny_causal_lm(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
):
    """A two-layer decoder of transformers' own code: llama, qwen2, qwen3, gemma2, gemma3, mixtral, gpt2, mamba."""
    import transformers

    torch.manual_seed(seed)
    common = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    configs: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(**(common | overrides)),
        "qwen2": lambda: transformers.Qwen2Config(**(common | overrides)),
        "qwen3": lambda: transformers.Qwen3Config(**(common | {"head_dim": 8} | overrides)),
        "gemma2": lambda: transformers.Gemma2Config(
            **(common | {"head_dim": 8, "sliding_window": 16} | overrides)
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(**(common | {"head_dim": 8} | overrides)),
        "mixtral": lambda: transformers.MixtralConfig(
            **(common | {"num_local_experts": 3, "num_experts_per_tok": 2} | overrides)
        ),
        "gpt2": lambda: transformers.GPT2Config(
            **(dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128) | overrides)
        ),
    }
    configs["mamba"] = lambda: transformers.MambaConfig(
        **(dict(vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=2) | overrides)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(configs[family]())
    # Initial weights of std 0.02 make tiny models nearly constant; wider ones make differences visible.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    return model.to(dtype).eval()


class TinyMLP(nn.Module):
    """No transformers, no tokenizer: a plain module with layers 0 and 1 and a head."""

    def __init__(self, width: int = 12, *, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"up": nn.Linear(width, 2 * width, bias), "down": nn.Linear(2 * width, width, bias)}
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 5, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.head(x)


def randomise(adapter: Adapter, *, seed: int = 0, size: float = 0.1) -> Adapter:
    """Give every B random values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for factors in adapter.factors.values():
        factors.B.copy_(torch.randn(factors.B.shape, generator=generator, dtype=factors.B.dtype) * size)
    return adapter


def tokens(rows: int = 2, length: int = 10, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_adapter(model: nn.Module, *, seed: int = 0, **config: Any) -> Adapter:
    """An adapter for `model` that does something; the model is left as it was."""
    inject(model, LoRAConfig(**{"rank": 3, "alpha": 6, **config}), seed=seed)
    adapter = randomise(extract(model), seed=seed)
    eject(model)
    return adapter


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return same_bits_of(model.state_dict(), expected)


def same_bits_of(now: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return now.keys() == expected.keys() and all(torch.equal(now[n], expected[n]) for n in expected)
