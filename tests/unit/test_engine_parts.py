"""Sampling, text, prompts, cache, prefix reuse and the registry, each alone."""

from __future__ import annotations

import threading

import pytest
import torch

from lorasmith.engine import Request
from lorasmith.engine.cache import KVCache, KVShape
from lorasmith.engine.prefix import Owner, PrefixCache
from lorasmith.engine.prompts import encode_prompt
from lorasmith.engine.registry import Registry
from lorasmith.engine.sampling import Sampler, choose
from lorasmith.engine.slots import GroupSpec, Slots
from lorasmith.engine.text import TextStream
from lorasmith.errors import AdapterFileError, ConfigError, DataError, UnknownAdapterError
from lorasmith.formats import write_adapter
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.tokenizer import ByteTokenizer


def adapter(seed: int = 0, rank: int = 2) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 2, generator=g), torch.randn(2, rank, generator=g)
    return Adapter(LoRAConfig(rank=rank, alpha=rank, targets=["x"]), {"x": Factors(A, B, 1.0)})


# Requests ----------------------------------------------------------------------------------------


def test_every_bad_setting_of_a_request_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        Request("x", max_tokens=0, temperature=-1, top_p=0, top_k=0, seed=0.5, stop=("",))
    for name in ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop"):
        assert name in str(error.value)


def test_a_single_stop_text_is_not_taken_as_letters():
    assert Request("x", stop="end").stop == ("end",)


# Prompts -----------------------------------------------------------------------------------------


def test_prompts_of_every_form():
    chat, plain = ByteTokenizer(), ByteTokenizer(chat=False)
    rendered = chat.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    expected = chat.encode(rendered, add_special_tokens=False)
    assert encode_prompt("hi", chat, 300) == expected
    assert encode_prompt([{"role": "user", "content": "hi"}], chat, 300) == expected
    assert encode_prompt("hi", plain, 300) == [104, 105]
    assert encode_prompt([5, 6], None, 300) == [5, 6]
    assert encode_prompt(torch.tensor([5, 6]), None, 300) == [5, 6]


@pytest.mark.parametrize("prompt", ["", [], [1, 400], [-1], [1.5], [True]])
def test_prompts_that_cannot_be_used_are_refused(prompt):
    with pytest.raises(DataError):
        encode_prompt(prompt, ByteTokenizer(chat=False), 300)


def test_a_text_needs_a_tokenizer_and_messages_need_a_template():
    with pytest.raises(DataError, match="no tokenizer"):
        encode_prompt("hi", None, 300)
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt([{"role": "user", "content": "hi"}], ByteTokenizer(chat=False), 300)


# Sampling ----------------------------------------------------------------------------------------


def draws(request: Request, logits: torch.Tensor, count: int) -> list[int]:
    sampler = Sampler.of(request)
    return [choose(logits[None], [sampler])[0].token for _ in range(count)]


def test_greedy_takes_the_largest_and_seeds_repeat():
    logits = torch.tensor([0.1, 2.0, 1.9, -1.0])
    assert draws(Request([1]), logits, 3) == [1, 1, 1]
    request = Request([1], temperature=1.0, seed=7)
    assert draws(request, logits, 20) == draws(request, logits, 20)
    assert len(set(draws(request, logits, 50))) > 1


def test_each_rows_stream_is_its_own():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    request = Request([1], temperature=1.0, seed=3)
    together = [Sampler.of(request) for _ in range(3)]
    alone = Sampler.of(request)
    for _ in range(5):
        assert choose(logits, together)[1].token == choose(logits[1:2], [alone])[0].token


def test_top_k_and_top_p_leave_out_what_they_should():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert set(draws(Request([1], temperature=1.0, seed=0, top_k=2), logits, 200)) == {0, 1}
    assert set(draws(Request([1], temperature=1.0, seed=0, top_p=0.4), logits, 50)) == {0}
    assert set(draws(Request([1], temperature=1.0, seed=0, top_p=0.81), logits, 400)) == {0, 1, 2}


def test_sampled_shares_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    found = torch.tensor(draws(Request([1], temperature=1.0, seed=1), logits, 3000)).bincount(minlength=3)
    torch.testing.assert_close(found / 3000, torch.tensor([0.6, 0.3, 0.1]), atol=0.04, rtol=0)


def test_logprob_is_before_temperature_and_nan_is_seen():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    samplers = [Sampler.of(Request([1], logprobs=True)), Sampler.of(Request([1]))]
    first, second = choose(logits, samplers)
    assert first.logprob == pytest.approx(float(logits[0].log_softmax(0)[1]))
    assert first.error is None
    assert "finite" in (second.error or "")


# Text --------------------------------------------------------------------------------------------


def stream_all(text: str, stop: tuple[str, ...] = (), merges: tuple[str, ...] = ()) -> tuple[list[str], str]:
    tokenizer = ByteTokenizer(merges=merges)
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(stream.add(token))
        if stream.is_stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream.text


@pytest.mark.parametrize("text", ["hello", "naïve café – 日本語 🙂", "a<|im_end|>b"])
def test_pieces_join_to_the_text_and_no_character_is_broken(text):
    pieces, whole = stream_all(text)
    assert "".join(pieces) == whole == text.replace("<|im_end|>", "")
    assert all("�" not in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["END", "E", "lo E"])
def test_stop_texts_are_found_across_tokens_and_never_sent(stop):
    pieces, whole = stream_all("hello END more", (stop, "zzz"))
    assert "".join(pieces) == whole == "hello END more".split(stop)[0]


def test_a_stop_text_that_does_not_come_is_sent_in_the_end():
    pieces, whole = stream_all("abc EN", ("END",))
    assert "".join(pieces) == whole == "abc EN"
    assert pieces[-1] == "EN"


def test_a_stop_text_inside_one_token_cuts_that_token():
    _, whole = stream_all("aXYb", ("Y",), merges=("XYb",))
    assert whole == "aX"


# Cache and prefix --------------------------------------------------------------------------------


def cache(rows: int = 3) -> KVCache:
    made = KVCache(KVShape(((2, 3),) * 2, ((2, 3),) * 2, torch.float32, torch.device("cpu")), rows)
    made.limit(1 << 20, 1000)
    return made


def test_growing_keeps_what_was_written_and_limit_counts_bytes():
    kv = cache()
    kv.keys[1][2, 5] = 7.0
    kv.reserve(300)
    assert kv.capacity >= 300
    assert torch.all(kv.keys[1][2, 5] == 7.0)
    kv.limit(kv.shape.bytes_per_token * kv.max_rows * 50, 1000)
    assert kv.max_tokens == 50


def test_prefix_is_found_only_by_the_same_owner_and_tokens():
    kv, prefix = cache(), PrefixCache(1 << 20, block_tokens=4)
    tokens = list(range(10))
    for tensor in (*kv.keys, *kv.values):
        tensor[0].normal_()
    owner = Owner("base", "digest", "tenant")
    prefix.save(owner, tokens, kv, 0)
    assert prefix.restore(owner, tokens, kv, 1) == 8
    assert torch.equal(kv.keys[0][0, :8], kv.keys[0][1, :8])
    assert prefix.restore(owner, [*range(4), 99, *range(5, 10)], kv, 1) == 4
    assert prefix.restore(owner, list(range(8)), kv, 1) == 4  # one token must be left to compute
    for other in (
        Owner("base", None, "tenant"),
        Owner("base", "other", "tenant"),
        Owner("base", "digest", "x"),
        Owner("basedigest", "", "tenant"),
        Owner("other", "digest", "tenant"),
    ):
        assert prefix.restore(other, tokens, kv, 1) == 0


def test_prefix_memory_is_bounded():
    kv = cache()
    block = kv.shape.bytes_per_token * 4
    prefix = PrefixCache(2 * block, block_tokens=4)
    for start in range(5):
        prefix.save(Owner("b", None, ""), list(range(start, start + 4)), kv, 0)
        assert prefix.num_bytes <= 2 * block
    assert PrefixCache(0).restore(Owner("b", None, ""), list(range(200)), kv, 0) == 0


# Registry ----------------------------------------------------------------------------------------


def test_replacing_a_name_leaves_the_leased_generation_alone():
    registry = Registry(lambda _: None)
    first = registry.add("a", adapter(0))
    lease = registry.lease("a")
    second = registry.add("a", adapter(1))
    assert first != second
    assert registry.names() == {"a": second}
    assert lease.digest == first
    assert lease.adapter is not None
    registry.release(lease)
    with pytest.raises(UnknownAdapterError):
        registry.lease(first)


def test_an_adapter_edited_after_registration_changes_nothing():
    registry, mine = Registry(lambda _: None), adapter()
    digest = registry.add("a", mine)
    mine.factors["x"].B.zero_()
    lease = registry.lease("a")
    assert lease.adapter is not None
    assert lease.adapter.digest == digest


def test_equal_adapters_are_one_generation_and_a_digest_is_a_name():
    registry = Registry(lambda _: None)
    digest = registry.add("a", adapter())
    assert registry.add("b", adapter()) == digest
    assert registry.lease("a") is registry.lease(digest)
    registry.remove("a")
    assert registry.lease("b").digest == digest


def test_unknown_names_suggest_the_nearest():
    registry = Registry(lambda _: None)
    registry.add("invoices", adapter())
    with pytest.raises(UnknownAdapterError, match="invoices"):
        registry.lease("invoice")
    with pytest.raises(UnknownAdapterError):
        registry.remove("other")


def test_idle_adapters_leave_memory_and_come_back_but_never_while_leased(tmp_path):
    one = adapter(0).num_bytes
    registry = Registry(lambda _: None, max_bytes=2 * one)
    for i in range(4):
        write_adapter(adapter(i), tmp_path / str(i))
        registry.add(str(i), tmp_path / str(i))
    assert registry.resident_bytes <= 2 * one
    leases = [registry.lease(str(i)) for i in range(4)]
    assert all(lease.adapter is not None for lease in leases)
    for lease in leases:
        registry.release(lease)
    assert registry.resident_bytes <= 2 * one


def test_a_file_that_changed_after_eviction_is_refused(tmp_path):
    registry = Registry(lambda _: None, max_bytes=0)
    write_adapter(adapter(0), tmp_path / "a")
    registry.add("a", tmp_path / "a")
    write_adapter(adapter(1), tmp_path / "b")
    registry.add("b", tmp_path / "b")
    write_adapter(adapter(2), tmp_path / "a")
    with pytest.raises(AdapterFileError, match="changed"):
        registry.lease("a")


def test_leases_from_many_threads_balance():
    registry = Registry(lambda _: None)
    registry.add("a", adapter())

    def work() -> None:
        for _ in range(200):
            registry.release(registry.lease("a"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.lease("a").leases == 1


# Slots -------------------------------------------------------------------------------------------


def test_slots_write_only_what_is_missing_and_front_what_is_needed():
    registry = Registry(lambda _: None)
    generations = []
    for i in range(4):
        registry.add(str(i), adapter(i, rank=i + 1))
        generations.append(registry.lease(str(i)))
    slots = Slots([GroupSpec(("x",), 2, (2,))], torch.float32, torch.device("cpu"))
    slots.hold(generations)
    assert slots.writes == 4
    slots.hold(generations[:3])
    slots.hold(generations)
    assert slots.writes == 4
    slots.hold([generations[3]])
    routing = slots.route([generations[3], generations[3]])
    assert routing is not None
    assert (routing.first, routing.count, routing.width) == (0, 1, 2)
    assert slots.route([None, None]) is None


def test_a_dropped_slot_is_never_taken_for_the_base():
    registry = Registry(lambda _: None)
    registry.add("a", adapter(0))
    registry.add("b", adapter(1))
    a, b = registry.lease("a"), registry.lease("b")
    slots = Slots([GroupSpec(("x",), 2, (2,))], torch.float32, torch.device("cpu"))
    slots.hold([a, b])
    slots.drop(a)
    slots.hold([None, b])
    routing = slots.route([None, b])
    assert routing is not None
    zeros = slots.stacks[0].B[0][routing.slots[0]]
    assert torch.all(zeros == 0)
