"""The adapter that training starts from: random A, zero B, everything else as the base has it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorasmith.errors import TargetError
from lorasmith.inject.experts import EXPERT, expert_shape
from lorasmith.inject.layer import shape_of
from lorasmith.inject.targets import resolve_targets
from lorasmith.inject.whole import weights_to_train
from lorasmith.lora import Adapter, Extras, Factors, LoRAConfig, TokenRows, generator_for, init_factors


def fresh_adapter(model: nn.Module, config: LoRAConfig, seed: int) -> Adapter:
    """An adapter under which every output is the base's own.

    Raises:
        TargetError: a name in the config that finds nothing.
    """
    targets = resolve_targets(model, config)
    factors = {p: _fresh_factors(module, p, config, seed) for p, module in targets.chosen.items()}
    for path, module in targets.stacks.items():
        factors |= _fresh_experts(path, module, config, seed)
    whole = weights_to_train(model, config, factors)
    extras = Extras(
        weights={name: t for name, t in whole.items() if not name.endswith(".bias")},
        rows={path: rows for key in config.trainable_tokens for path, rows in _rows(model, config, key)},
        shifts={p: torch.zeros(f.out_features) for p, f in factors.items()} if config.lora_bias else {},
    )
    biases = _biases_to_train(model, config, targets.chosen)
    # a bias has one place in an adapter, whatever it trains for
    biases |= {name.removesuffix(".bias"): t for name, t in whole.items() if name.endswith(".bias")}
    return Adapter(config, factors, biases, extras=extras)


def _fresh_factors(module: nn.Module, path: str, config: LoRAConfig, seed: int) -> Factors:
    shape = shape_of(module)
    parts = len(config.parts_of(path)) or 1
    return init_factors(
        shape.in_features,
        shape.out_features,
        rank=config.rank_of(path) * parts,
        scaling=config.scaling_of(path),
        generator=generator_for(seed, path),
        init=config.init,
        layout=shape.layout,
    )


def _fresh_experts(path: str, module: nn.Module, config: LoRAConfig, seed: int) -> dict[str, Factors]:
    experts, width, out = expert_shape(module, path.rpartition(".")[2])
    return {
        f"{path}.{e}": init_factors(
            width,
            out,
            rank=config.rank_of(path),
            scaling=config.scaling_of(path),
            generator=generator_for(seed, f"{path}.{e}"),
            init=config.init,
            layout=EXPERT,
        )
        for e in range(experts)
    }


def _rows(model: nn.Module, config: LoRAConfig, key: str) -> list[tuple[str, TokenRows]]:
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (path == key or path.endswith("." + key))
    ]
    if not found:
        raise TargetError(f'trainable_tokens: "{key}" matches no embedding in {type(model).__name__}.')
    ids = config.trainable_tokens[key]
    faults = [f"token {max(ids)} is beyond the {m.num_embeddings} rows of {path}" for path, m in found
              if max(ids) >= m.num_embeddings]  # fmt: skip
    if faults:
        raise TargetError("trainable_tokens: " + "; ".join(faults) + ". Resize the embedding first.")
    return [(path, TokenRows(ids, module.weight.detach()[list(ids)].clone())) for path, module in found]


def _biases_to_train(model: nn.Module, config: LoRAConfig, targets: Iterable[str]) -> dict[str, Tensor]:
    if config.bias == "none":
        return {}
    modules = dict(model.named_modules())
    paths = targets if config.bias == "lora_only" else modules
    found = {path: getattr(modules[path], "bias", None) for path in paths}
    return {path: bias.data for path, bias in found.items() if isinstance(bias, nn.Parameter)}
