"""The frozen base over the processes: each keeps a part of every decoder layer (PyTorch's FSDP2).

A layer's weights are gathered when it computes and dropped afterwards, forward and backward. What trains stays
whole in every process, so gradients, optimizer, checkpoints and files are those of a run that shards nothing.
Output head, norms and whatever else lies outside of the layers stay whole too: the loss multiplies with the head
in chunks, so it would be gathered again and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lorasmith.errors import ConfigError
from lorasmith.native import forget_pages, is_mapped, mapped_files
from lorasmith.train.parts import repeated_layers
from lorasmith.train.world import World


def shard_base(model: nn.Module, world: World) -> str:
    """Spread the frozen weights of `model` over the processes, in place and for good; returns what to say of it.

    Raises:
        ConfigError: there is no other process, or no list of layers, or layers that cannot be sharded.
    """
    if world.size == 1:
        raise ConfigError(
            'shard="base" spreads the base over processes, and there is one: start it with torchrun.'
        )
    layers = repeated_layers(model)
    if not layers:
        raise ConfigError(
            'shard="base" needs a list of decoder layers, and this base has none. Use shard="none".'
        )
    odd = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if odd:
        raise ConfigError(
            f'shard="base" cannot spread {odd[0]} ({len(odd)} such), which is quantised. Use shard="none".'
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = sum(p.numel() for p in model.parameters())
    mesh = init_device_mesh(world.device.type, (world.size,))
    stays = {p for p in model.parameters() if p.requires_grad}
    files = mapped_files()
    for module in [*layers, *_input_embeddings(model)]:
        pages = [(p.data_ptr(), p.nbytes) for p in module.parameters() if p not in stays]
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=stays)
        for place in pages:  # this process's part is a copy; the file's pages, read for it, would stay too
            if is_mapped(*place, files):
                forget_pages(*place)
    stays |= {p for p in model.parameters() if not _is_part(p)}
    fully_shard(_body(model), mesh=mesh, reshard_after_forward=True, ignored_params=stays)
    model.to(world.device)
    spread = sum(p.numel() for p in model.parameters() if _is_part(p))
    return (
        f"shard: {spread:,} of {whole:,} weights ({spread / whole:.0%}: {len(layers)} layers) are spread over "
        f"{world.size} processes; what trains, the head and the norms are whole in each"
    )


def local_bytes(tensor: Tensor) -> int:
    """Bytes of `tensor` in this process."""
    here: Tensor = tensor.to_local() if _is_part(tensor) else tensor  # type: ignore[attr-defined]
    return here.nbytes


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The weights of `module` are all here inside the `with`; every process must enter it."""
    unshard, reshard = (getattr(module, name, None) for name in ("unshard", "reshard"))
    if unshard is None or reshard is None:
        yield
        return
    unshard()
    try:
        yield
    finally:
        reshard()


def gathers(hook: Any) -> bool:
    """Whether `hook` is FSDP's own, which brings weights and changes nothing that a module computes."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the weights lie in other processes."""
    return any(_is_part(p) for p in model.parameters())


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, without the second that importing it takes


def _body(model: Any) -> nn.Module:
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    return body if isinstance(body, nn.Module) else model


def _input_embeddings(model: Any) -> list[nn.Module]:
    """The table of input embeddings, where it is the base's own and no head uses it too."""
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    is_own = type(table) is nn.Embedding and table.weight is not getattr(head, "weight", None)
    return [table] if is_own and not table.weight.requires_grad else []
