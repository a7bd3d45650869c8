"""What fits a budget, what is measured on the probe, and how sizes are written."""

from __future__ import annotations

import pytest
import torch

from lorasmith.cli.options import parse_bytes
from lorasmith.errors import BudgetError, ConfigError
from lorasmith.inject import inject
from lorasmith.lora import LoRAConfig
from lorasmith.train.attention import causal_attention
from lorasmith.train.budget import Use, fit, measure_use, saved_bytes
from tests.support.models import VOCAB, tiny_causal_lm

USE = Use(1000, {"none": 100, "mlp": 40, "layers": 10})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 2**33),
        ("500MB", 5 * 10**8),
        ("1.5 gib", 3 * 2**29),
        ("2e9", 2 * 10**9),
        ("64K", 2**16),
        ("7", 7),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "8 gigs", "1.2.3M", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="8GiB"):
        parse_bytes(text)


def test_room_for_everything_keeps_everything():
    found = fit(USE, 10**9, batch_tokens=2048, longest=300)
    assert (found.recompute, found.batch_tokens, found.peak_bytes) == ("none", 2048, 1000 + 204800)


def test_smaller_batches_come_before_recomputation_and_both_before_failure():
    order = []
    for budget in range(250_000, 0, -500):
        try:
            found = fit(USE, budget, batch_tokens=2048, longest=300)
        except BudgetError as error:
            message = str(error)
            break
        assert found.peak_bytes <= budget
        if (found.recompute, found.batch_tokens) not in order:
            order.append((found.recompute, found.batch_tokens))
    assert order[:2] == [("none", 2048), ("none", 1024)]
    assert order[-1] == ("layers", 300)
    assert "the least that this run takes" in message


def test_a_row_is_never_cut():
    assert fit(USE, 10**9, batch_tokens=512, longest=700).batch_tokens == 700


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(10, requires_grad=True) * 1.0
    with saved_bytes(torch.nn.Module()) as found:
        x.exp() * x  # saves exp's output and x
    assert found == [2 * 10 * 4]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_choice_keeps_less_than_the_one_before(family):
    assert causal_attention is not None
    model = tiny_causal_lm(family)
    inject(model, LoRAConfig(rank=2), seed=0)
    ids = torch.randint(0, VOCAB, (2, 32))

    def loss_of():
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum()

    use = measure_use(model, loss_of, slots=64, kernels="auto")
    sizes = list(use.per_token_bytes.values())
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert ("mlp" in use.per_token_bytes) == (family == "llama")
