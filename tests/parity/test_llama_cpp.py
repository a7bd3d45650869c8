"""llama.cpp itself runs the exported GGUF. Skipped unless `llama-cpp-python` is installed (seven minutes to build)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorasmith.bases import load_base
from lorasmith.formats import write_gguf
from lorasmith.inject import eject, extract, inject
from lorasmith.lora import LoRAConfig
from tests.support import llama_cpp as support
from tests.support.base import write_tiny_base
from tests.support.models import randomise
from tests.support.tolerance import close

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPTS = [[5, 9, 12], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]


def compare(base_name: str, folder: Path, *, size: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of (llama.cpp with the GGUF, our injected model, llama.cpp's base)."""
    base = load_base(base_name, dtype="fp32")
    support.write_base(base.model, folder / "base.gguf")
    close(
        support.logits(llama_cpp, folder / "base.gguf", PROMPTS), our_logits(base.model), torch.bfloat16
    )  # the GGUF of the test is a good one
    inject(base.model, LoRAConfig(rank=4, alpha=6, rank_pattern={"down_proj": 3}), seed=1)
    adapter = randomise(extract(base.model), size=size)
    eject(base.model)
    inject(base.model, adapter)
    config = json.loads((base.directory / "config.json").read_text())
    write_gguf(adapter, folder / "lora", config)
    theirs = support.logits(llama_cpp, folder / "base.gguf", PROMPTS, folder / "lora" / "adapter.gguf")
    plain = support.logits(llama_cpp, folder / "base.gguf", PROMPTS)
    return theirs, our_logits(base.model), plain


@torch.no_grad()
def our_logits(model) -> torch.Tensor:
    return torch.stack([model(torch.tensor([p])).logits[0, -1] for p in PROMPTS])


def test_a_tiny_base_and_a_strong_adapter(tmp_path):
    write_tiny_base(tmp_path / "base")
    theirs, ours, plain = compare(str(tmp_path / "base"), tmp_path, size=0.3)
    close(theirs, ours, torch.float32)
    assert (plain - ours).abs().max() > 100 * (theirs - ours).abs().max()


@pytest.mark.base
def test_the_built_in_base(tmp_path):
    theirs, ours, plain = compare("smollm2-135m", tmp_path, size=0.02)
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    divergence = (q * (q.log() - p.log())).sum(-1)
    moved = (q * (q.log() - plain.double().log_softmax(-1))).sum(-1)
    print(
        f"KL to ours {divergence.tolist()}, of the base {moved.tolist()}, logits {(theirs - ours).abs().max()}"
    )
    assert (theirs.argmax(-1) == ours.argmax(-1)).all()
    assert divergence.max() < 1e-6
    assert moved.min() > 1e3 * divergence.max()
