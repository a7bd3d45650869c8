"""The same adapter in PEFT and in lorasmith gives the same logits, written by either."""

from __future__ import annotations

import copy

import pytest
import torch

from lorasmith.formats import read_adapter, write_adapter
from lorasmith.inject import extract, inject
from lorasmith.lora import LoRAConfig
from tests.support.models import randomise, tiny_causal_lm, tokens
from tests.support.tolerance import close

# PEFT asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


CASES = {
    "plain": (dict(rank=4, alpha=8), dict(r=4, lora_alpha=8, target_modules="all-linear")),
    "rslora": (
        dict(rank=4, alpha=8, rslora=True, targets=["q_proj", "v_proj"]),
        dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    ),
    "patterns": (
        dict(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
        dict(
            r=4,
            lora_alpha=8,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"down_proj": 3},
            target_modules="all-linear",
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ours_in_peft(case, tmp_path):
    from peft import PeftModel

    ours, theirs = tiny_causal_lm("llama"), tiny_causal_lm("llama")
    inject(ours, LoRAConfig(**CASES[case][0]))
    adapter = randomise(extract(ours))
    write_adapter(adapter, tmp_path / "a")
    loaded = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    again = tiny_causal_lm("llama")
    base_logits = again(tokens()).logits
    inject(again, adapter)
    logits = again(tokens()).logits
    assert (logits - base_logits).abs().max() > 1e-2
    close(loaded(tokens()).logits, logits, torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_theirs_in_ours(case, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_causal_lm("llama")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **CASES[case][1])).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").unlink(missing_ok=True)
    expected = model(tokens()).logits
    inject(base, read_adapter(tmp_path / "a"))
    close(base(tokens()).logits, expected, torch.float32)
