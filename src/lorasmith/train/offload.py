"""What a step need not hold in memory: activations until their backward pass, layers until they compute.

Nothing that is computed changes by it, to the bit: what comes back is what was put away.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.bases import home
from lorasmith.errors import ConfigError, OutputError
from lorasmith.native import forget_pages, is_mapped, mapped_files
from lorasmith.quantised import quantisation_of
from lorasmith.train.parts import repeated_layers

SMALLEST_BYTES = 1 << 16
"""Smaller tensors stay: they weigh little and cost as much to move."""


class ActivationFile:
    """Bytes in a nameless file; its space is used anew whenever nothing is kept any more."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise OutputError(f"offload: {folder} cannot be written: {error}. Set LORASMITH_HOME.") from error
        self.folder, self.kept, self.end, self.largest = folder, 0, 0, 0

    def put(self, flat: Tensor) -> int:
        """Write a tensor of bytes; returns where."""
        start, view = self.end, memoryview(flat.numpy().data)
        try:
            while len(view):
                written = os.pwrite(self._file.fileno(), view, self.end)
                view, self.end = view[written:], self.end + written
        except OSError as error:
            raise OutputError(f"offload: activations cannot be kept in {self.folder}: {error}.") from error
        self.kept, self.largest = self.kept + 1, max(self.largest, self.end)
        return start

    def get(self, flat: Tensor, start: int) -> None:
        """Fill a tensor of bytes from there."""
        view = memoryview(flat.numpy().data)
        while len(view):
            count = os.preadv(self._file.fileno(), [view], start)
            if not count:
                raise OutputError(f"offload: the file of activations in {self.folder} was cut short.")
            view, start = view[count:], start + count

    def release(self) -> None:
        """One tensor less is kept."""
        self.kept -= 1
        if not self.kept:
            self.end = 0

    def close(self) -> None:
        """The file goes."""
        self._file.close()


class _Away:
    """A tensor that is in the file."""

    def __init__(self, tensor: Tensor, file: ActivationFile) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.file, self.start = file, file.put(_bytes(tensor))

    def back(self) -> Tensor:
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        self.file.get(_bytes(made), self.start)
        return made

    def __del__(self) -> None:
        if hasattr(self, "start"):
            self.file.release()


@contextmanager
def activations_away(model: nn.Module, folder: Path | None = None) -> Iterator[ActivationFile | None]:
    """What autograd saves inside the `with` waits in a file (CPU) or in the machine's memory (GPU).

    Weights, small tensors and those whose elements share memory stay where they are.
    Yields the file, or None on a GPU.
    """
    device = next(model.parameters()).device
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    file = ActivationFile(folder or home() / "offload") if device.type == "cpu" else None

    def pack(tensor: Tensor) -> Any:
        stays = tensor.untyped_storage().data_ptr() in own or tensor.nbytes < SMALLEST_BYTES
        if stays or tensor.device != device or not _is_dense(tensor):
            return tensor
        return tensor.to("cpu") if file is None else _Away(tensor.detach(), file)

    def unpack(kept: Any) -> Tensor:
        return kept.back() if isinstance(kept, _Away) else kept.to(device)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield file
    finally:
        if file is not None:
            file.close()


@contextmanager
def layers_away(model: nn.Module) -> Iterator[int]:
    """The weights of each decoder layer are in memory only while it computes, forward or backward, inside the `with`.

    They are pages of the base's file: the kernel reads them when they are used, and they are given back
    after. Yields the bytes that come and go.

    Raises:
        ConfigError: the weights are not pages of a file.
    """
    ranges, layers = mapped_files(), repeated_layers(model)
    pages = [_pages(layer, ranges) for layer in layers]
    if not layers or not all(pages):
        raise ConfigError(
            'offload="weights" lets layers leave memory that are pages of the base\'s file. Here they are not: on Linux '
            "and a CPU, load the base in the dtype of its file and without --quantize."
        )
    handles = []
    for layer, places in zip(layers, map(_Pages, pages), strict=True):
        handles.append(layer.register_forward_pre_hook(places.before, with_kwargs=True))
        handles.append(layer.register_forward_hook(places.after))
    try:
        yield sum(size for places in pages for _, size in places)
    finally:
        for handle in handles:
            handle.remove()


def is_paging(hook: Any) -> bool:
    """Whether this hook of a module only lets pages go, and so changes nothing that the module computes."""
    return isinstance(getattr(hook, "__self__", None), _Pages)


@dataclass(frozen=True)
class _Pages:
    """The pages of one layer, as address and size of each weight."""

    places: list[tuple[int, int]]

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of the layer's forward pass: the gradient of its input is the last thing that its backward pass makes."""
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor) and x.requires_grad:
            x.register_hook(self.forget)  # type: ignore[no-untyped-call]

    def after(self, *_: Any) -> None:
        """Its forward pass is over."""
        self.forget()

    def forget(self, _: Tensor | None = None) -> None:
        """Let them go."""
        for place in self.places:
            forget_pages(*place)


def _pages(layer: nn.Module, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Address and size of each frozen weight that is mapped from a file; none if one is not, or is quantised."""
    if quantisation_of(layer) is not None:
        return []
    frozen = [p for name, p in layer.named_parameters() if "lora_" not in name and not p.requires_grad]
    if any(p.ndim > 1 and not is_mapped(p.data_ptr(), p.nbytes, ranges) for p in frozen):
        return []
    return [(p.data_ptr(), p.nbytes) for p in frozen if is_mapped(p.data_ptr(), p.nbytes, ranges)]


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in whatever order."""
    step = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor, as bytes in their order."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
