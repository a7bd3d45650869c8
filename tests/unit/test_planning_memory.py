"""Predicted bytes against autograd's own count of what it keeps, and against the paper's GPT-3 row."""

from __future__ import annotations

import pytest
import torch

from lorasmith.errors import BudgetError
from lorasmith.inject import group_shared_inputs, inject, lora_layers
from lorasmith.lora import LoRAConfig
from lorasmith.planning import (
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
from lorasmith.train import Forward
from lorasmith.train.batch import Batch
from lorasmith.train.loss import chunk_tokens_for
from lorasmith.train.preflight import preflight
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
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        body.parts.body(
            batch(masked=p.is_masked).input_ids, **body._mask_arguments(batch(masked=p.is_masked))
        )
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
    predicted = saved_bytes(decoder_of(model), trained, p, recompute=False)
    found = autograd_keeps(model, trained, p)
    assert found <= predicted <= 1.03 * found  # tables and masks that this model's last layer does not keep


def test_recomputed_layers_keep_their_inputs_only():
    model, trained = trained_model("llama", "lora", torch.float32, "all-linear")
    p, d = Pass(ROWS, LENGTH, 8), decoder_of(model)
    kept = saved_bytes(d, trained, p, recompute=True)
    layers = sum(sum(layer.values()) for layer in saved_by_layer(d, trained, p))
    assert saved_bytes(d, trained, p, recompute=False) - layers == kept - 2 * 4 * p.slots * d.width


def test_layers_below_the_first_adapter_keep_nothing():
    model = tiny_causal_lm("llama", num_hidden_layers=4)
    inject(model, LoRAConfig(rank=3, layers=[3]))
    trained = Trained(dict.fromkeys(lora_layers(model), 3))
    p = Pass(ROWS, LENGTH, 24)
    layers = [sum(layer.values()) for layer in saved_by_layer(decoder_of(model), trained, p)]
    assert layers[:3] == [0, 0, 0]
    assert autograd_keeps(model, trained, p) <= saved_bytes(decoder_of(model), trained, p, recompute=False)


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


def test_a_run_that_cannot_fit_is_refused(monkeypatch):
    from lorasmith.data import Example, steps
    from lorasmith.planning import machine
    from lorasmith.train import Layout, TrainConfig

    model, _ = trained_model("llama", "lora", torch.float32, "all-linear")
    ids = torch.arange(40).numpy().astype("int32")
    examples = [Example(ids, ids >= 20, 1) for _ in range(6)]
    plan = steps(examples, batch_size=2, epochs=1, seed=0)

    def run() -> str:
        return preflight(
            model, TrainConfig(), Layout("none", ""), examples, plan, total=len(plan), keeps_best=False
        )

    assert run().startswith("plan: peak ")
    monkeypatch.setattr(machine, "usable_memory", lambda: (1000, "left under the cgroup limit of 1.0 GiB"))
    monkeypatch.setattr(machine, "resident_bytes", lambda anonymous=False: 0)
    with pytest.raises(BudgetError, match=r"(?s)needs about .* GiB.*cgroup limit.*lower batch_tokens"):
        run()
