"""Weights over the processes: each keeps a part of every decoder layer (PyTorch's FSDP2).

A layer's weights are gathered when it computes and dropped afterwards, forward and backward. With `shard="base"`
what trains stays whole in every process, so gradients, optimizer, checkpoints and files are those of a run that
shards nothing. With `shard="all"` what trains within the layers lies in parts as well, and so do its gradients,
which are summed into the parts, and the optimizer's moments. Output head, final norm and whatever else lies outside
of the layers stay whole: the loss multiplies with the head in chunks, so it would be gathered again and again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.errors import ConfigError
from lorasmith.native import forget_pages, is_mapped, mapped_files
from lorasmith.train.config import ShardName
from lorasmith.train.parts import repeated_layers
from lorasmith.train.world import World


def shard_model(model: nn.Module, world: World, what: ShardName, *, trains_base: bool = False) -> str:
    """Spread weights of `model` over the processes, in place and for good; returns what to say of it.

    Args:
        what: `"base"` leaves what trains whole; `"all"` spreads it too, factors alone unless `trains_base`.
        trains_base: all of the base's own weights train. (A few that do beside factors, such as biases, stay whole.)

    Raises:
        ConfigError: there is no other process, or no list of layers, or layers that cannot be sharded.
    """
    if is_sharded(model):
        raise ConfigError("This base was sharded by a run before and stays so: load it again.")
    if world.size == 1:
        raise ConfigError(
            f'shard="{what}" spreads the base over processes, and there is one: start it with torchrun.'
        )
    layers = repeated_layers(model)
    if not layers:
        raise ConfigError(
            f'shard="{what}" needs a list of decoder layers, and this base has none. Use shard="none".'
        )
    odd = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if odd:
        raise ConfigError(
            f'shard="{what}" cannot spread {odd[0]} ({len(odd)} such), which is quantised. Use shard="none".'
        )
    from torch.distributed.device_mesh import init_device_mesh

    total = sum(p.numel() for p in model.parameters())
    mesh = init_device_mesh(world.device.type, (world.size,))
    stays = {
        p
        for name, p in model.named_parameters()
        if p.requires_grad
        and (what == "base" or not (trains_base or name.rpartition(".")[2].startswith("lora_")))
    }
    files = mapped_files()
    for module in [*layers, *_input_embeddings(model, stays)]:
        pages = [(p.data_ptr(), p.nbytes) for p in module.parameters() if p not in stays]
        _spread(module, mesh, stays)
        for place in pages:  # this process's part is a copy; the file's pages, read for it, would stay too
            if is_mapped(*place, files):
                forget_pages(*place)
    _spread(_body(model), mesh, {p for p in model.parameters() if not is_shard(p)})
    model.to(world.device)
    spread = sum(p.numel() for p in model.parameters() if is_shard(p))
    trained = "what trains, " if what == "base" else ""
    return (
        f"shard: {spread:,} of {total:,} weights ({spread / total:.0%}: {len(layers)} layers) are spread over "
        f"{world.size} processes; {trained}the head and the final norm are whole in each"
    )


def _spread(module: nn.Module, mesh: Any, stays: set[nn.Parameter]) -> None:
    """Give `module` to FSDP. Gradients of parts become their sums over the processes, in float32 at least."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    trained = {p.dtype for p in module.parameters() if p.requires_grad and p not in stays}
    if len(trained) > 1:
        raise ConfigError(
            f'shard="all" sums a layer\'s gradients together, and its trained weights have the dtypes '
            f'{", ".join(sorted(map(str, trained)))}. Use shard="base".'
        )
    narrow = any(torch.promote_types(dtype, torch.float32) != dtype for dtype in trained)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=stays, mp_policy=policy)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)  # a sum: the loss is divided already
    module.set_force_sum_reduction_for_comms(True)


def is_shard(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return hasattr(tensor, "to_local")  # a DTensor, without the second that importing it takes


def local(tensor: Tensor) -> Tensor:
    """What of `tensor` is in this process; it shares memory."""
    here: Tensor = tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return here


def local_bytes(tensor: Tensor) -> int:
    """Bytes of `tensor` in this process."""
    return local(tensor).nbytes


class Shards:
    """What trains and lies in parts, as tensors of this process's parts: these the optimizer updates.

    PyTorch's own tensors in parts are touched here only: computing with them would keep the process group alive in
    caches (see `world`), and costs more.

    Attributes:
        parameters: of all that trains, this process's part, or the whole where every process has it.
        replicated: those of which every process has the whole.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._shards = {name: p for name, p in trained.items() if is_shard(p)}
        self.replicated = [p for p in trained.values() if not is_shard(p)]
        self.parameters = {
            name: nn.Parameter(local(p.detach())) if name in self._shards else p
            for name, p in trained.items()
        }

    def __bool__(self) -> bool:
        return bool(self._shards)

    def take_gradients(self) -> None:
        """Hand over the gradients of the parts, summed over the processes by now."""
        for name, part in self._shards.items():
            self.parameters[name].grad = None if part.grad is None else local(part.grad)
            part.grad = None

    @torch.no_grad()
    def clip_grad_norm_(self, limit: float, world: World) -> float:
        """As torch's function of that name; the norm is that of all parts together."""
        if not self:
            return float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        parts = [self.parameters[name] for name in self._shards]
        norm = math.sqrt(world.total(_squares(parts))[0] + _squares(self.replicated))
        nn.utils.clip_grads_with_norm_(
            self.parameters.values(), limit, torch.tensor(norm, dtype=torch.float64)
        )
        return norm

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` by KEY/PARAMETER, those that belong to parts as parts of a whole; no memory is copied."""
        return {key: self._as_shard(key.partition("/")[2], tensor) for key, tensor in tensors.items()}

    def _as_shard(self, name: str, tensor: Tensor) -> Tensor:
        part: Any = self._shards.get(name)
        if part is None or tensor.ndim == 0:
            return tensor
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            tensor, part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
        )

    @contextmanager
    def gathered(self, model: nn.Module, world: World) -> Iterator[None]:
        """What trains is whole in the first process inside the `with`; every process must enter it."""
        places = {}
        for name, part in self._shards.items():
            rows = world.gather_rows(local(part.detach()), part.shape)
            if rows is not None:
                path, _, key = name.rpartition(".")
                places[name] = model.get_submodule(path), key
                setattr(*places[name], nn.Parameter(rows, requires_grad=part.requires_grad))
        try:
            yield
        finally:
            for name, place in places.items():
                setattr(*place, self._shards[name])


def _squares(parameters: Sequence[nn.Parameter]) -> float:
    """Sum over all gradients."""
    norms = (torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None)
    return math.fsum(float(norm) ** 2 for norm in norms)


UNSHARDED = Shards({})
"""Nothing lies in parts."""


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
    return any(map(is_shard, model.parameters()))


def _body(model: Any) -> nn.Module:
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    return body if isinstance(body, nn.Module) else model


def _input_embeddings(model: Any, stays: set[nn.Parameter]) -> list[nn.Module]:
    """The table of input embeddings, where it is the base's own and no head uses it too."""
    try:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    is_own = type(table) is nn.Embedding and table.weight is not getattr(head, "weight", None)
    return [table] if is_own and table.weight not in stays else []
