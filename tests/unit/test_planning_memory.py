"""Predicted bytes against autograd's own count of what it keeps, and against the paper's GPT-3 row."""

from __future__ import annotations

import pytest
import torch

from lorasmith.inject import group_shared_inputs, inject, lora_layers
from lorasmith.lora import LoRAConfig
from lorasmith.planning import (
    Computing,
    Pass,
    Shapes,
    Trained,
    decoder_of,
    full_memory,
    hundred_tasks_bytes,
    logit_chunk,
    lora_memory,
    saved_by_layer,
    saved_bytes,
)
from lorasmith.train import Forward, TrainConfig, computing_of
from lorasmith.train.batch import Batch
from lorasmith.train.loss import chunk_tokens_for
from lorasmith.train.policy import computing
from tests.support.models import tiny_causal_lm

ROWS, LENGTH = 3, 16


def batch(*, masked: bool) -> Batch:
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 60
    sources = torch.arange(0, ROWS * LENGTH, 2)
    if not masked:
        return Batch(ids, None, None, sources, sources % 60)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].repeat(ROWS, 1, 1, 1)
    return Batch(ids, torch.arange(LENGTH)[None].repeat(ROWS, 1), mask, sources, sources % 60)


def autograd_keeps(model, trained: Trained, p: Pass) -> int:
    """Bytes of every storage that one forward pass saves, weights aside, each counted once."""
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.numel() > 1:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address comes twice
        return t

    body = Forward(model)
    hidden = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = body.parts.body(
            batch(masked=p.is_masked).input_ids, **body._mask_arguments(batch(masked=p.is_masked))
        )
    assert hidden is not None  # its graph lives until here
    return sum(size for size, _ in kept.values())


def trained_model(family, method, dtype, targets):
    model = tiny_causal_lm(family, dtype=dtype)
    if method == "full":
        return model.requires_grad_(True), Trained(None)
    inject(model, LoRAConfig(rank=3, targets=targets))
    group_shared_inputs(model, lambda: model(input_ids=torch.arange(4)[None]))
    return model, Trained({path: layer.factors.rank for path, layer in lora_layers(model).items()})


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "method", "targets"),
    [
        ("llama", "lora", "all-linear"),
        ("llama", "lora", ("q_proj", "v_proj")),
        ("llama", "lora", ("down_proj",)),
        ("llama", "full", None),
        ("qwen2", "lora", "all-linear"),
        ("qwen3", "lora", "all-linear"),
        ("qwen3", "full", None),
        ("gpt2", "lora", "all-linear"),
    ],
)
def test_saved_bytes_are_what_autograd_keeps(family, method, targets, dtype, masked):
    model, trained = trained_model(family, method, dtype, targets)
    p = Pass(ROWS, LENGTH, ROWS * LENGTH // 2, masked)
    predicted = saved_bytes(decoder_of(model), trained, p, Computing())
    found = autograd_keeps(model, trained, p)
    assert found <= predicted <= 1.03 * found  # tables and masks that this model's last layer does not keep


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "layers"])
@pytest.mark.parametrize(
    ("family", "method", "kernels", "dtype"),
    [
        ("llama", "lora", "auto", torch.float32),
        ("llama", "lora", "auto", torch.bfloat16),
        ("llama", "full", "auto", torch.bfloat16),
        ("qwen3", "lora", "auto", torch.bfloat16),
        ("llama", "lora", "plain", torch.bfloat16),
        ("gpt2", "lora", "auto", torch.float32),
    ],
)
def test_saved_bytes_of_a_run_are_what_autograd_keeps(family, method, kernels, dtype, recompute, masked):
    model, trained = trained_model(family, method, dtype, "all-linear")
    settings = TrainConfig(kernels=kernels, recompute=recompute)
    how = computing_of(model, settings, dtype)
    assert how.is_block == (kernels == "auto" and family != "gpt2")
    p = Pass(ROWS, LENGTH, ROWS * LENGTH // 2, masked)
    predicted = saved_bytes(decoder_of(model), trained, p, how)
    with computing(model, kernels=kernels, recompute=recompute, flops=0, warm_up=lambda: None):
        found = autograd_keeps(model, trained, p)
    assert found <= predicted * 1.0001
    assert predicted <= 1.06 * found + 64 * p.slots * dtype.itemsize


def test_layers_below_the_first_adapter_keep_nothing():
    model = tiny_causal_lm("llama", num_hidden_layers=4)
    inject(model, LoRAConfig(rank=3, layers=[3]))
    trained = Trained(dict.fromkeys(lora_layers(model), 3))
    p = Pass(ROWS, LENGTH, 24)
    layers = [sum(layer.values()) for layer in saved_by_layer(decoder_of(model), trained, p, Computing())]
    assert layers[:3] == [0, 0, 0]
    assert autograd_keeps(model, trained, p) <= saved_bytes(decoder_of(model), trained, p, Computing())


@pytest.mark.parametrize("vocabulary", [64, 49152, 256_000])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_the_chunk_of_logits_is_the_one_that_training_takes(vocabulary, itemsize):
    assert logit_chunk(vocabulary, itemsize) == chunk_tokens_for(vocabulary, itemsize)


def test_the_papers_gpt3_row_from_first_principles():
    """GPT-3 175B: 96 layers of width 12,288; W_q and W_v adapted at r = 4; 2 bytes a number.

    LoRA keeps w; Adam on all weights keeps w, m, v (3 copies) and the gradient (4 copies). The paper's
    1.2 TB lies between those two, and its 350 GB is w alone.
    """
    params = 175_255_800_000  # table 4
    linears = {f"layers.{i}.{name}": (12288, 12288) for i in range(96) for name in ("q", "v")}
    shapes = Shapes(params, 2, linears)
    lora, full = lora_memory(shapes, LoRAConfig(rank=4), master_bytes=2), full_memory(shapes)

    assert lora.trainable_params == 2 * 96 * 4 * (12288 + 12288) == 18_874_368
    assert full.trainable_params / lora.trainable_params == pytest.approx(9287, abs=2)  # "10,000 times"
    assert lora.weights_bytes / 1e9 == pytest.approx(350, abs=1)  # "350 GB"
    assert lora.checkpoint_bytes / 2**20 == pytest.approx(36.0, abs=0.1)  # "35 MB", of 350 GB
    assert full.checkpoint_bytes / 1e9 == pytest.approx(350, abs=1)
    copies = [full.weights_bytes + full.optimizer_bytes + k * full.gradient_bytes for k in (0, 1)]
    assert copies[0] < 1.2e12 < copies[1]  # 1.05 and 1.40 TB
    state = lora.adapter_bytes + lora.gradient_bytes + lora.optimizer_bytes
    assert state < 0.001 * lora.weights_bytes  # so training needs the 350 GB and little more
    assert 1 - (lora.weights_bytes + state) / copies[0] == pytest.approx(2 / 3, abs=0.01)  # "up to 2/3"
    assert hundred_tasks_bytes(shapes, lora) / 1e9 == pytest.approx(354, abs=1)  # "354 GB"
    assert hundred_tasks_bytes(shapes, full) / 1e12 == pytest.approx(35, abs=0.1)  # against "35 TB"
