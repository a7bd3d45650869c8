"""How a run computes, chosen once from the model and the machine: kernels, recomputation, memory.

Everything that changes speed, memory or last bits without changing what is computed is settled here
and printed. The choice depends on the run's settings and the machine, never on a measured time, so
a resumed run makes the same one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorasmith.bases import attention, home
from lorasmith.inject import LoRALayer
from lorasmith.quantised import quantisation_of
from lorasmith.train.attention import causal_attention
from lorasmith.train.config import KernelsName, OffloadName, RecomputeName
from lorasmith.train.elementwise import operations
from lorasmith.train.fast import fast_layers
from lorasmith.train.offload import activations_away
from lorasmith.train.parts import repeated_layers
from lorasmith.train.shard import is_sharded

LONG_RUN_FLOPS = 2e14
"""Where compiling (some 25 s) is small beside the run: about ten minutes at 300 GFLOP/s."""
COMPILE_LIMIT_S = 180
KERNELS_KEPT = 192
"""More than one pass of a decoder layer needs: of fewer, each layer would throw out what the next one uses."""


@dataclass(frozen=True)
class Policy:
    """The choice, with the reason for each part."""

    kernels: KernelsName
    recompute: RecomputeName
    operations: str
    lines: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What may change the last bits of a result."""
        return {"kernels": self.kernels, "recompute": self.recompute, "operations": self.operations}


@contextmanager
def computing(
    model: nn.Module,
    *,
    kernels: KernelsName,
    recompute: RecomputeName,
    flops: float,
    warm_up: Callable[[], Any],
    keep_freed: bool = True,
    offload: OffloadName = "none",
) -> Iterator[Policy]:
    """Let `model` compute by the chosen kernels inside the `with`; it is as before afterwards.

    Args:
        kernels: "auto", or what must be tried: "block", "inductor" or "plain".
        recompute: what is computed again in the backward pass instead of kept.
        flops: of the whole run, for the choice of whether to compile.
        warm_up: one forward and backward pass, for what must be compiled first.
        keep_freed: freed memory stays for the next step, which is faster; else it goes back at once, as a
            budget wants it and a sharded base, whose layers come and go.
        offload: what waits outside of memory until it is used; weights do so already (`layers_away`).
    """
    with ExitStack() as stack:
        stack.callback(_manage_heap(keep_freed=keep_freed))
        device = next(model.parameters()).device
        lines = [f"threads: {torch.get_num_threads()}" if device.type == "cpu" else f"device: {device}"]
        ops = operations(next(model.parameters()).dtype, device).name
        count = 0
        if kernels in ("auto", "block"):
            keep = {"none": "all", "mlp": "no-mlp", "layers": "input"}[recompute]
            count = stack.enter_context(fast_layers(model, keep=keep))  # type: ignore[arg-type]
        chosen: KernelsName = "block"
        if count:
            lines.append(
                f"kernels: block (proved on a probe for {count} of {len(repeated_layers(model))} layers; "
                f"between the products: {ops})"
            )
        else:
            tried = kernels == "auto" and (flops >= LONG_RUN_FLOPS or device.type == "cuda")
            compiles = kernels == "inductor" or tried
            chosen, said = _by_layers(stack, model, recompute, warm_up if compiles else None)
            lines += said
        others = len(repeated_layers(model)) - count if chosen == "block" else 0
        if others > 0 and device.type == "cpu" and stack.enter_context(attention(model, causal_attention)):
            lines.append(f"attention of the {others} other layers: by tiles")
        if recompute != "none":
            what = "gate and up" if (recompute, chosen) == ("mlp", "block") else "each decoder layer"
            what += f" of the block's, the {others} other layers keep everything" if others > 0 else ""
            lines.append(f"recompute: {what}, again in the backward pass")
        lines += _offloaded(stack, model, offload)
        yield Policy(chosen, recompute, ops, tuple(lines))


def _by_layers(
    stack: ExitStack, model: nn.Module, recompute: RecomputeName, warm_up: Callable[[], Any] | None
) -> tuple[KernelsName, list[str]]:
    """The base's own layers, compiled if there is a `warm_up`: what was chosen, and lines that say so."""
    lines = []
    if recompute != "none":
        stack.enter_context(_recomputed(model))
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and stack.enter_context(attention(model, causal_attention)):
        lines.append("attention: by tiles (matrix products; keys never repeated)")
    if warm_up is None:
        why_not = "not asked, or the run is short"
    elif is_sharded(model):
        why_not = "compiled layers need their weights whole, and the base is sharded"
    elif quantisation_of(model):
        why_not = "compiled layers need weights, and the base is quantised"
    else:
        why_not = stack.enter_context(_compiled(model, warm_up))
    if why_not:
        return "plain", [*lines, f"kernels: plain ({why_not})"]
    return "inductor", [*lines, "kernels: inductor (each decoder layer compiled)"]


def _offloaded(stack: ExitStack, model: nn.Module, offload: OffloadName) -> list[str]:
    """Lines that say what waits outside of memory; from here on activations do."""
    lines = []
    if offload in ("weights", "all"):
        frozen = (p for layer in repeated_layers(model) for p in layer.parameters() if not p.requires_grad)
        size = sum(p.nbytes for p in frozen) / 2**30
        lines.append(f"offload: {size:.2f} GiB of weights, read from the base's file layer by layer")
    if offload in ("activations", "all"):
        file = stack.enter_context(activations_away(model))
        place = "the machine's memory" if file is None else f"a file in {file.folder}"
        lines.append(f"offload: activations wait in {place}")
    return lines


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Each decoder layer keeps its input alone and is computed again in the backward pass."""
    verbs = {on: "enable" if on else "disable" for on in (True, False)}
    switches = [
        getattr(model, f"activation_checkpointing_{verb}", None)  # its name since transformers 5.1
        or getattr(model, f"gradient_checkpointing_{verb}")
        for verb in verbs.values()
    ]
    switches[0]({"use_reentrant": False})
    # transformers makes the embeddings' output require a gradient; only re-entrant recomputation needs it.
    model.disable_input_require_grads()
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and not m.training]
    for module in switched:  # they recompute in training mode alone; their layers stay as they are
        module.training = True
    try:
        yield
    finally:
        switches[1]()
        for module in switched:
            module.training = False


@contextmanager
def _compiled(model: nn.Module, warm_up: Callable[[], Any]) -> Iterator[str]:
    """Decoder layers through inductor. Yields why not, or an empty string where they are.

    One graph serves all layers and all shapes; what must be compiled is compiled by `warm_up`, within
    `COMPILE_LIMIT_S`, and kept in the cache folder.
    """
    layers = repeated_layers(model)
    if any(isinstance(m, LoRALayer) and m.lora_dropout for m in model.modules()):
        yield "dropout draws a seed, which a compiled graph cannot"
        return
    if not layers or not _has_compiler(next(model.parameters()).device):
        yield "no compiler" if layers else "no repeated layers to compile"
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "inductor"))
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        said = ""
        try:
            with _limited(COMPILE_LIMIT_S):
                warm_up()
        except Exception as error:  # whatever a compiler says, the plain way still computes
            said = f"compiling failed, so not compiled: {str(error).splitlines()[0][:100] if str(error) else error!r}"
            for layer in layers:
                layer._compiled_call_impl = None
        yield said
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def _has_compiler(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 0)
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after `seconds`; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def limit_kept_kernels() -> None:
    """Let oneDNN keep `KERNELS_KEPT` compiled products instead of 1,024; it reads this once, at its first one.

    Each shape of a product is compiled and kept with its scratch. Packed rows differ from step to step, and
    memory then grew by 30-80 MB a step up to a gigabyte (measured: dev/LOG.md).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))


def _manage_heap(*, keep_freed: bool) -> Callable[[], Any]:
    """Keep freed memory for the next step, or give each large block back when it is freed; returns what undoes it.

    glibc maps every large tensor anew and gives it back when freed; the kernel then clears each page
    again, which takes 15 % of a training step (measured: dev/LOG.md). Kept, blocks of many sizes leave
    holes that grow from step to step.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return lambda: None
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    mallopt(mmap_threshold, 1 << 30 if keep_freed else 1 << 18)
    mallopt(trim_threshold, (1 << 31) - 1 if keep_freed else 128 << 10)
    mallopt(top_pad, 64 << 20 if keep_freed else 128 << 10)

    def restore() -> None:
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 128 << 10)
        mallopt(top_pad, 128 << 10)
        trim(0)

    return restore
