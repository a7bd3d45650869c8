"""Examples in one row see only themselves, and a packed step is the same step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.data import Example, Row, pack, shared_length
from lorasmith.errors import ConfigError
from lorasmith.inject import extract, inject, switch
from lorasmith.lora import LoRAConfig
from lorasmith.train.batch import Batch, Layout, choose_layout, collate
from lorasmith.train.forward import Forward
from tests.support.models import VOCAB, randomise, tiny_causal_lm
from tests.support.tolerance import close


def example(ids: list[int], supervised: list[bool] | None = None) -> Example:
    """Every token but the first carries loss unless `supervised` says otherwise."""
    mask = np.array([True] * len(ids) if supervised is None else supervised, dtype=np.bool_)
    mask[0] = False
    return Example(np.array(ids, dtype=np.int32), mask, line=1)


def prompted(prompt: list[int], answer: list[int]) -> Example:
    return example(prompt + answer, [False] * len(prompt) + [True] * len(answer))


SHARED = [7, 3, 9, 1, 5, 2]
EXAMPLES = [
    prompted(SHARED, [11, 12]),
    prompted(SHARED, [13]),
    prompted(SHARED, [11, 12]),  # the first one again
    prompted([*SHARED[:4], 20, 21], [22, 23, 24]),
    prompted(SHARED, [11, 12, 14, 15]),  # the first one is its beginning
    example([40, 41, 42, 43, 44]),
    example([40, 41, 42, 50]),  # a shared beginning that carries loss
    prompted([60], [61]),
]


def pairs(examples: list[Example], indices: list[int]) -> list[tuple[tuple[int, ...], int]]:
    """(what is seen, what is predicted) of every supervised token."""
    return sorted(
        (tuple(examples[i].tokens[:k].tolist()), int(examples[i].tokens[k]))
        for i in indices
        for k in np.nonzero(examples[i].supervised)[0]
    )


def visible(row: Row) -> np.ndarray:
    """[a, b]: slot b lies on the path of slot a."""
    slots = np.arange(len(row))
    return (slots[None] <= slots[:, None]) & (slots[:, None] < row.ends[None])


def check_rows(rows: list[Row], examples: list[Example], indices: list[int]) -> None:
    found = []
    leaves = set()
    for row in rows:
        seen = visible(row)
        for slot in range(len(row)):
            path = np.nonzero(seen[slot])[0]
            assert path[-1] == slot
            assert row.positions[path].tolist() == list(range(len(path)))
            assert int(row.positions[slot]) == len(path) - 1
            leaves.add(tuple(row.tokens[path].tolist()))
        for source, target in zip(row.sources, row.targets, strict=True):
            found.append((tuple(row.tokens[seen[source]].tolist()), int(target)))
    # Each supervised token is predicted once, from exactly the tokens before it in its example.
    assert sorted(found) == pairs(examples, indices)
    # Every example lies in some row as a whole path, and no path leads out of the examples.
    wholes = {tuple(examples[i].tokens.tolist()) for i in indices}
    assert wholes <= leaves
    assert leaves <= {whole[: k + 1] for whole in wholes for k in range(len(whole))}


def brute_force_tree(row: Row) -> np.ndarray:
    """Visibility from the positions alone: in depth-first order a slot's parent is the last one a step up."""
    n = len(row)
    seen = np.zeros((n, n), dtype=np.bool_)
    for slot in range(n):
        seen[slot, slot] = True
        if row.positions[slot]:
            parent = max(s for s in range(slot) if row.positions[s] == row.positions[slot] - 1)
            seen[slot] |= seen[parent]
    return seen


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("row_slots", [1, 9, 20, 1000])
def test_each_path_is_an_example(share, row_slots):
    indices = [6, 0, 1, 2, 3, 4, 5, 7]
    rows = pack(EXAMPLES, indices, row_slots=row_slots, share_prefixes=share)
    check_rows(rows, EXAMPLES, indices)
    for row in rows:
        assert np.array_equal(visible(row), brute_force_tree(row))


def test_a_plain_row_is_the_examples_end_to_end():
    (row,) = pack(EXAMPLES, [1, 7, 5], row_slots=100, share_prefixes=False)
    chosen = [EXAMPLES[i] for i in (1, 7, 5)]
    assert row.tokens.tolist() == [t for e in chosen for t in e.tokens.tolist()]
    assert row.positions.tolist() == [*range(7), *range(2), *range(5)]
    assert row.ends.tolist() == [7] * 7 + [9] * 2 + [14] * 5
    assert row.sources.tolist() == [5, 7, 9, 10, 11, 12]
    assert row.targets.tolist() == [13, 61, 41, 42, 43, 44]


def test_a_tree_row_by_hand():
    # 1 2 3 and 1 2 4 5 and 1 2 4 5: slots 1 2 3 4 5, forks after the second.
    examples = [example([1, 2, 4, 5]), example([1, 2, 3]), example([1, 2, 4, 5])]
    (row,) = pack(examples, [0, 1, 2], row_slots=100, share_prefixes=True)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5]
    assert row.positions.tolist() == [0, 1, 2, 2, 3]
    assert row.ends.tolist() == [5, 5, 3, 5, 5]
    assert row.sources.tolist() == [0, 1, 0, 1, 3, 0, 1, 3]
    assert row.targets.tolist() == [2, 3, 2, 4, 5, 2, 4, 5]


def test_a_tree_computes_each_shared_beginning_once():
    (row,) = pack(EXAMPLES, range(len(EXAMPLES)), row_slots=1000, share_prefixes=True)
    beginnings = {tuple(e.tokens[: k + 1].tolist()) for e in EXAMPLES for k in range(len(e))}
    assert len(row) == len(beginnings)


def test_shared_length():
    a, b = example([1, 2, 3]), example([1, 2, 4, 5])
    assert shared_length(a, b) == shared_length(b, a) == 2
    assert shared_length(a, a) == 3
    assert shared_length(a, example([1, 2, 3, 9])) == 3
    assert shared_length(a, example([2])) == 0


random_examples = st.lists(
    st.lists(st.integers(0, 2), min_size=2, max_size=9).flatmap(
        lambda ids: st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).map(
            lambda mask: example(ids, mask)
        )
    ),
    min_size=1,
    max_size=9,
)


@given(random_examples, st.integers(1, 40), st.booleans(), st.randoms(use_true_random=False))
def test_any_set_of_examples(examples, row_slots, share, random):
    indices = list(range(len(examples)))
    random.shuffle(indices)
    rows = pack(examples, indices, row_slots=row_slots, share_prefixes=share)
    check_rows(rows, examples, indices)
    for row in rows:
        assert np.array_equal(visible(row), brute_force_tree(row))


@given(random_examples, st.integers(1, 40))
def test_rows_come_out_about_as_long_as_asked(examples, row_slots):
    rows = pack(examples, range(len(examples)), row_slots=row_slots, share_prefixes=False)
    longest = max(map(len, examples))
    # Rows are evened out, which may lengthen one by half an example.
    assert all(len(row) <= max(row_slots + longest // 2, longest) for row in rows)


# ---------------------------------------------------------------- batches


def flat_paths(batch: Batch) -> list[tuple[tuple[int, ...], int]]:
    """What a batch predicts, read from its tensors alone."""
    rows, length = batch.input_ids.shape
    attention = batch.attention
    if attention is None:
        attention = torch.ones(length, length).tril().bool().expand(rows, 1, length, length)
    found = []
    for source, target in zip(batch.sources.tolist(), batch.targets.tolist(), strict=True):
        row, slot = divmod(source, length)
        path = attention[row, 0, slot].nonzero()[:, 0]
        if batch.positions is not None:
            assert batch.positions[row, path].tolist() == list(range(len(path)))
        else:
            assert path.tolist() == list(range(slot + 1))
        found.append((tuple(batch.input_ids[row, path].tolist()), target))
    return found


@pytest.mark.parametrize("packing", ["none", "plain", "tree"])
@pytest.mark.parametrize("batch_tokens", [1, 16, 30, 10_000])
def test_batches_hold_every_supervised_token_once(packing, batch_tokens):
    indices = list(range(len(EXAMPLES)))
    batches = Layout(packing, "").batches(EXAMPLES, indices, batch_tokens=batch_tokens)
    assert sorted(p for b in batches for p in flat_paths(b)) == pairs(EXAMPLES, indices)


@pytest.mark.parametrize("packing", ["none", "plain", "tree"])
@given(random_examples, st.integers(1, 40))
def test_batch_tokens_bounds_every_batch_of_more_than_one_row(packing, examples, batch_tokens):
    for batch in Layout(packing, "").batches(examples, range(len(examples)), batch_tokens=batch_tokens):
        assert batch.slots == batch.input_ids.numel()
        assert batch.slots <= batch_tokens or batch.input_ids.shape[0] == 1


def test_padding_sees_itself_alone_and_nobody_sees_it():
    rows = [pack(EXAMPLES, chosen, row_slots=100, share_prefixes=False)[0] for chosen in ([0, 5], [1, 7])]
    batch = collate(rows)
    assert [len(row) for row in rows] == [13, 9]
    padding = torch.arange(13) >= 9
    for row, seen in zip(rows, batch.attention[:, 0], strict=True):
        assert np.array_equal(seen[: len(row), : len(row)].numpy(), visible(row))
    assert torch.equal(batch.attention[1, 0][padding], torch.eye(13).bool()[padding])
    assert not batch.attention[1, 0][~padding][:, padding].any()


# ---------------------------------------------------------------- the choice


def same_prompt(n: int) -> list[Example]:
    return [prompted(list(range(40)), [40 + i]) for i in range(n)]


def test_what_is_asked_is_done():
    for packing in ("none", "plain", "tree"):
        layout = choose_layout(packing, EXAMPLES, [[0, 1]], can_mask=True, dropout=0.0)
        assert layout == Layout(packing, "as asked")
    assert choose_layout("none", EXAMPLES, [[0]], can_mask=False, dropout=0.0).packing == "none"


@pytest.mark.parametrize("packing", ["plain", "tree"])
def test_packing_is_refused_where_it_would_mix_examples(packing):
    with pytest.raises(ConfigError, match="does not keep two sequences in one row apart"):
        choose_layout(packing, EXAMPLES, [[0, 1]], can_mask=False, dropout=0.0)


def test_auto_shares_beginnings_when_that_computes_fewer_slots():
    layout = choose_layout("auto", same_prompt(8), [list(range(8))], can_mask=True, dropout=0.0)
    assert layout.packing == "tree"
    # None: 8 rows of 41. Tree: 40 shared slots and 8 of their own.
    assert layout.reason.startswith(f"{8 * 41 / 48:.2f}x fewer slots than padding")
    assert "shared beginnings are computed once" in layout.reason


def test_auto_packs_side_by_side_under_dropout():
    mixed = [*same_prompt(2), *(prompted([50 + i], [60]) for i in range(6))]
    layout = choose_layout("auto", mixed, [list(range(8))], can_mask=True, dropout=0.1)
    assert layout.packing == "plain"
    assert layout.reason.startswith(f"{8 * 41 / (2 * 41 + 6 * 2):.2f}x fewer")
    assert "dropout forbids sharing beginnings" in layout.reason


def test_auto_does_not_pack_for_nothing():
    different = [prompted([i, *range(20)], [1]) for i in range(8)]
    layout = choose_layout("auto", different, [list(range(8))], can_mask=True, dropout=0.0)
    assert (layout.packing, "1.00x fewer" in layout.reason) == ("none", True)


def test_auto_does_not_pack_a_model_that_cannot_be_masked():
    layout = choose_layout("auto", same_prompt(8), [list(range(8))], can_mask=False, dropout=0.0)
    assert layout.packing == "none"
    assert "attention mask" in layout.reason


# ---------------------------------------------------------------- through a model

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2"]


def adapted(family: str):
    model = tiny_causal_lm(family, dtype=torch.float64)
    inject(model, LoRAConfig(rank=3))
    switch(model, randomise(extract(model)))
    return model


@pytest.fixture
def all_in_float64(monkeypatch):
    """transformers computes its norms and softmax in float32 whatever the model's dtype; here it does not."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def normed(x: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    for norm in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(norm, "forward", lambda self, x: self.weight * normed(x, self.variance_epsilon))
    monkeypatch.setattr(Gemma2RMSNorm, "forward", lambda self, x: (1 + self.weight) * normed(x, self.eps))
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def loss_and_gradients(model, packing: str, batch_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    forward = Forward(model)
    assert forward.parts is not None
    model.zero_grad(set_to_none=True)
    batches = Layout(packing, "").batches(EXAMPLES, range(len(EXAMPLES)), batch_tokens=batch_tokens)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = forward.loss_sum(batch)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.usefixtures("all_in_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_step_equals_the_unpacked_one(family):
    model = adapted(family)
    # Unpacked and one at a time, by the model's own loss: nothing of ours but LoRA.
    model.zero_grad(set_to_none=True)
    truth = torch.zeros((), dtype=torch.float64)
    for e in EXAMPLES:
        ids = torch.from_numpy(e.tokens.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        kept = torch.from_numpy(e.supervised[1:])
        loss = torch.nn.functional.cross_entropy(logits[kept], ids[0, 1:][kept], reduction="sum")
        loss.backward()
        truth += loss.detach()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    size = max(g.abs().max() for g in expected.values())
    for packing in ("none", "plain", "tree"):
        for batch_tokens in (16, 10_000):
            total, found = loss_and_gradients(model, packing, batch_tokens)
            close(total, truth, torch.float64)
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                assert expected[name].any()
                close(gradient / size, expected[name] / size, torch.float64)


def test_gemma_is_given_an_additive_mask_and_the_window_is_respected():
    model = tiny_causal_lm("gemma2")
    forward = Forward(model)
    assert forward.wants_additive_mask
    assert forward.can_mask(16)
    assert not forward.can_mask(17)  # its sliding window
    assert Forward(tiny_causal_lm("llama")).can_mask(17)


def test_a_model_that_ignores_the_mask_is_found_out():
    model = tiny_causal_lm("llama")
    inner = model.model.forward
    # Without the positions too, for transformers would tell the sequences apart by their restart.
    model.model.forward = lambda input_ids, use_cache, **_: inner(input_ids, use_cache=use_cache)
    assert not Forward(model).can_mask(8)


@pytest.mark.usefixtures("all_in_float64")
@pytest.mark.parametrize("packing", ["plain", "tree"])
def test_a_changed_token_reaches_no_other_example(packing):
    model = adapted("llama")
    forward = Forward(model)
    examples = [prompted([1, 2, 3], [4, 5]), prompted([1, 2, 9, 8], [7]), prompted([30, 31], [32, 33])]

    def hidden_by_example(changed: list[Example]) -> list[Tensor]:
        (row,) = pack(changed, range(3), row_slots=100, share_prefixes=packing == "tree")
        (batch,) = Layout(packing, "").batches(changed, range(3), batch_tokens=100)
        with torch.no_grad():
            hidden = forward.parts.body(batch.input_ids, **forward._mask_arguments(batch))[0]
        paths = {tuple(row.tokens[seen].tolist()): np.nonzero(seen)[0] for seen in visible(row)}
        return [hidden[torch.from_numpy(paths[tuple(e.tokens.tolist())])] for e in changed]

    before = hidden_by_example(examples)
    for k, e in enumerate(examples):
        for position in range(len(e)):
            ids = e.tokens.tolist()
            ids[position] = (ids[position] + 17) % VOCAB
            changed = [*examples]
            changed[k] = example(ids, e.supervised.tolist())
            after = hidden_by_example(changed)
            for other in range(3):
                if other != k:
                    close(after[other], before[other], torch.float64)
                else:
                    close(after[k][:position], before[k][:position], torch.float64)
                    assert (after[k][position:] - before[k][position:]).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("packing", ["plain", "tree"])
def test_the_mask_is_what_keeps_the_examples_apart(packing):
    model = adapted("gpt2")  # learned positions; rotary ones only count differences
    forward = Forward(model)
    (batch,) = Layout(packing, "").batches(EXAMPLES, range(len(EXAMPLES)), batch_tokens=10_000)
    with torch.no_grad():
        right = forward.loss_sum(batch)
        for name, wrong in (
            ("attention", torch.ones_like(batch.attention).tril()),
            ("positions", torch.arange(batch.input_ids.shape[1]).expand_as(batch.positions)),
        ):
            broken = Batch(**(vars(batch) | {name: wrong}))
            assert (forward.loss_sum(broken) - right).abs() > 1e-3


def test_a_shared_prefix_under_dropout_is_refused():
    with pytest.raises(ConfigError, match="would share their dropout mask"):
        choose_layout("tree", EXAMPLES, [[0, 1]], can_mask=True, dropout=0.1)
    assert choose_layout("plain", EXAMPLES, [[0, 1]], can_mask=True, dropout=0.1).packing == "plain"
