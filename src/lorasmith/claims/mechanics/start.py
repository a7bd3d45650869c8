"""The start is the base, bit for bit; and the base stays what it was while LoRA trains."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorasmith.claims.claim import Claim, Holds, Measured, Setting
from lorasmith.drawing import BLUE, GREY, ORANGE, TEAL, label, panels
from lorasmith.inject import eject, inject, lora_layers
from lorasmith.lora import LoRAConfig

STEPS, LR = 10, 1e-3
CONFIGS = {
    "q and v, rank 4": LoRAConfig(rank=4, alpha=32, targets=r".*\.(q_proj|v_proj)"),
    "all linear, rank 16": LoRAConfig(rank=16, alpha=32),
}
DTYPES = ("fp32", "bf16")


def random_ids(model: nn.Module, rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids, (rows, length)."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def measure_identity(setting: Setting) -> Measured:
    """Logits against the base's, and the first gradients."""
    key = {
        "claim": "identity",
        "version": 1,
        "configs": list(CONFIGS),
        "dtypes": list(DTYPES),
        "ids": [2, 48],
    }
    rows = setting.cached(key, lambda: list(_starts(setting)))
    exact = all(r["different logits"] == 0 and r["A: nonzero gradients"] == 0 for r in rows)
    moves = all(r["B: modules with a gradient"] == r["modules"] for r in rows)
    counted = sum(r["logits"] for r in rows)
    said = (
        f"{sum(r['different logits'] for r in rows)} of {counted:,} logits differ from the base's over "
        f"{len(rows)} starts; at step one {sum(r['A: nonzero gradients'] for r in rows)} elements of A have a gradient that is not zero, and B "
        f"has one in {sum(r['B: modules with a gradient'] for r in rows)} of {sum(r['modules'] for r in rows)} modules. "
        "Exact, so without an interval."
    )
    return Measured(Holds.YES if exact and moves else Holds.NO, said, {"logits": counted}, rows)


def _starts(setting: Setting) -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        model = setting.load(dtype).model
        ids = random_ids(model, 2, 48)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        for name, config in CONFIGS.items():
            inject(model, config, seed=0)
            yield {"start": name, "dtype": dtype, **_start(model, config, ids, expected)}
            eject(model)


def _start(model: nn.Module, config: LoRAConfig, ids: Tensor, expected: Tensor) -> dict[str, Any]:
    layers = lora_layers(model)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    loss_of(model, ids).backward()  # type: ignore[no-untyped-call]
    grad_a = [layer.lora_A.grad for layer in layers.values()]
    grad_b = [layer.lora_B.grad for layer in layers.values()]
    return {
        "modules": len(layers),
        "logits": logits.numel(),
        "different logits": int((logits != expected).sum()),
        "A is random": all(float(layer.lora_A.detach().std()) > 0 for layer in layers.values()),
        "B is zero": not any(bool(layer.lora_B.detach().any()) for layer in layers.values()),
        "scaling is alpha / rank": all(
            layer.factors.scaling == config.alpha / config.rank for layer in layers.values()
        ),
        "A: nonzero gradients": sum(int(g.count_nonzero()) for g in grad_a if g is not None),
        "B: modules with a gradient": sum(g is not None and bool(g.any()) for g in grad_b),
        "norm of B's gradient": sum(float(g.square().sum()) for g in grad_b if g is not None) ** 0.5,
    }


def draw_identity(found: Measured, path: Path) -> None:
    """Different logits, and the gradients of A and B, by start."""
    names = [f"{r['start']}, {r['dtype']}" for r in found.rows]
    with panels(path, 2, width=4.5, height=2.6) as (left, right):
        left.barh(names, [r["different logits"] for r in found.rows], color=ORANGE)
        left.set_xlim(0, max(1, *(r["different logits"] for r in found.rows)))
        for k, row in enumerate(found.rows):
            left.text(0.02, k, f"{row['different logits']} of {row['logits']:,}", va="center", fontsize=8)
        label(left, "logits that differ from the base's")
        right.barh(names, [r["norm of B's gradient"] for r in found.rows], color=TEAL)
        right.set_yticks([])
        for k, row in enumerate(found.rows):
            right.text(
                0, k, f"  of A: {row['A: nonzero gradients']} nonzero", va="center", fontsize=8, color="white"
            )
        label(right, "norm of B's gradient at step one")


def measure_frozen(setting: Setting) -> Measured:
    """Ten steps of LoRA, and of full fine-tuning for contrast."""
    length = 32 if setting.quick else 128
    key = {"claim": "frozen", "version": 1, "steps": STEPS, "lr": LR, "ids": [2, length]}
    rows = setting.cached(key, lambda: [_train(setting, method, length) for method in ("LoRA", "full")])
    lora, full = rows
    frozen = lora["base tensors changed"] == 0 and lora["base gradients"] == 0
    small = lora["optimizer bytes"] == 2 * lora["trained bytes"]
    seen = full["base tensors changed"] > 0  # else the checksums could not see a change
    said = (
        f"After {STEPS} steps {lora['base tensors changed']} of {lora['base tensors']} base tensors have another checksum, "
        f"{lora['base gradients']} had a gradient, and Adam's moments take {lora['optimizer bytes'] / 1e6:.1f} MB, "
        f"{lora['optimizer bytes'] / lora['trained bytes']:g} times the adapter. The same steps of full fine-tuning change "
        f"{full['base tensors changed']} tensors and keep {full['optimizer bytes'] / 1e6:,.0f} MB. Exact."
    )
    return Measured(Holds.YES if frozen and small and seen else Holds.NO, said, {}, rows)


def _train(setting: Setting, method: str, length: int) -> dict[str, Any]:
    model = setting.load("fp32").model
    names = set(model.state_dict())
    before = checksums(model, names)
    if method == "LoRA":
        inject(model, CONFIGS["all linear, rank 16"], seed=0)
    else:
        model.requires_grad_(True)
    own = {name: p for name, p in model.named_parameters() if name in names}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, random_ids(model, 2, length, seed=step % 2))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        gradients = sum(p.grad is not None for p in own.values())
        optimizer.zero_grad()
    after = checksums(model, names)
    state = [t for values in optimizer.state.values() for t in values.values()]
    return {
        "method": method,
        "base tensors": len(before),
        "base tensors changed": sum(after[n] != before[n] for n in before),
        "base gradients": gradients,
        "trained bytes": sum(p.nbytes for p in trained),
        "optimizer bytes": sum(t.nbytes for t in state if t.ndim),  # without Adam's step counters
        "loss, first": losses[0],
        "loss, last": losses[-1],
    }


def checksums(model: nn.Module, names: set[str]) -> Mapping[str, str]:
    """sha256 of the bytes of each of these tensors."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name in names:
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            found[name] = hashlib.sha256(raw).hexdigest()
    return found


def draw_frozen(found: Measured, path: Path) -> None:
    """Tensors changed and bytes of the optimizer, LoRA and full."""
    names = [r["method"] for r in found.rows]
    with panels(path, 2, width=4.5, height=2.2) as (left, right):
        for panel, key, unit, title in (
            (left, "base tensors changed", 1, f"base tensors changed by {STEPS} steps"),
            (right, "optimizer bytes", 1e6, "Adam's moments, MB"),
        ):
            values = [r[key] / unit for r in found.rows]
            panel.barh(names, values, color=[TEAL, BLUE])
            for k, value in enumerate(values):
                panel.text(value, k, f" {value:,.0f}", va="center", fontsize=9)
            panel.set_xlim(0, 1.15 * max(*values, 1))
            label(panel, title)
        left.axvline(found.rows[0]["base tensors"], color=GREY, linewidth=1)


IDENTITY = Claim(
    id="identity-at-start",
    title="Training starts from the base, exactly",
    claim="A starts random and B zero, so ΔW = BA is zero when training begins; ΔW is scaled by α/r.",
    source="Hu et al. 2021, §4.1",
    design="Fresh factors on q and v (rank 4) and on every linear layer (rank 16), in fp32 and in bf16; 2 × 48 random tokens. "
    "Every logit is compared with the base's bit for bit; then one backward pass, the gradients of all A and B counted. "
    "Holds if no logit differs, no element of any A has a gradient, and B has one in every module.",
    expected="0 logits differ; the gradient of A is 0 (it is a multiple of B), that of B is not",
    measure=measure_identity,
    draw=draw_identity,
)
FROZEN = Claim(
    id="frozen-base",
    title="The base is frozen",
    claim="W0 is frozen and gets no gradient; only A and B train, so the optimizer keeps state for them alone.",
    source="Hu et al. 2021, §4.1 and §4.2",
    design=f"{STEPS} AdamW steps (learning rate {LR:g}, fp32) on 2 rows of random tokens (32 each, in the full design 128), once with LoRA "
    "on every linear layer (rank 16), once in full. sha256 of every base tensor before and after. Holds if LoRA changes no "
    "checksum, leaves no gradient on the base, and keeps exactly twice the adapter's bytes in Adam's moments, "
    "while full fine-tuning does change checksums.",
    expected="0 base tensors change; optimizer state = 2 × adapter",
    measure=measure_frozen,
    draw=draw_frozen,
)
