"""Prefix tuning and prompt tuning compute what PEFT's do, from the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from lorasmith.baselines import MethodOptions, make_method
from lorasmith.baselines.prefix import PrefixNetwork
from tests.support.models import tiny_causal_lm, tokens
from tests.support.tolerance import close

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported.*"),
]
N = 5


def in_peft(model, kind: str, **options):
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=N, **options)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@torch.no_grad()
def test_prefix(family):
    """PEFT keeps, for each virtual token, key and value of each layer, one after the other."""
    model, ids = tiny_causal_lm(family), tokens()
    theirs = in_peft(model, "PrefixTuningConfig")
    table = theirs.prompt_encoder["default"].embedding.weight.normal_()
    layers, heads = 2, table.shape[1] // (4 * 8)
    made = make_method("prefix", MethodOptions(virtual_tokens=N).resolved("prefix"))
    pairs = table.view(N, layers, 2, heads, 8).permute(1, 2, 3, 0, 4)
    made.apply(
        model,
        {f"layers.{k}.{part}": pairs[k, i] for k in range(layers) for i, part in enumerate(("key", "value"))},
    )
    close(model(ids).logits, theirs(ids).logits, torch.float32)
    assert (model(ids).logits - theirs.get_base_model()(ids).logits).abs().max() > 0.01


@torch.no_grad()
def test_the_network_of_a_prefix():
    """With as many key heads as heads PEFT's network has the paper's sizes."""
    model = tiny_causal_lm(num_key_value_heads=4)
    theirs = in_peft(model, "PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=12)
    encoder = theirs.prompt_encoder["default"]
    ours = PrefixNetwork(N, 32, 12, [(4, 8, 8)] * 2)
    ours.load_state_dict(encoder.state_dict())
    expected = encoder(torch.arange(N)).view(N, 2, 2, 4, 8)
    for layer, (key, value) in enumerate(ours()):
        close(key, expected[:, layer, 0].transpose(0, 1), torch.float32)
        close(value, expected[:, layer, 1].transpose(0, 1), torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_prompt(family):
    model, ids = tiny_causal_lm(family), tokens()
    theirs = in_peft(model, "PromptTuningConfig")
    embeddings = theirs.prompt_encoder["default"].embedding.weight.normal_()
    made = make_method("prompt", MethodOptions(virtual_tokens=N).resolved("prompt"))
    made.apply(model, {"embeddings": embeddings})
    close(model(ids).logits, theirs(ids).logits[:, N:], torch.float32)
    assert (model(ids).logits - theirs.get_base_model()(ids).logits).abs().max() > 0.01
