"""The engine on real tiny decoders: a mixed batch gives each row what it gets alone."""

from __future__ import annotations

import pytest
import torch

from lorasmith.engine import Engine, Request
from lorasmith.engine.llama import why_not_fast
from lorasmith.errors import AdapterFileError, BudgetError, ConfigError, DataError, UnknownAdapterError
from lorasmith.formats import write_adapter
from lorasmith.inject import merged
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.engines import engine_of, greedy, make_adapter, mixed_adapters, some_requests, tiny_base
from tests.support.models import VOCAB, tokens
from tests.support.tokenizer import ByteTokenizer
from tests.support.tolerance import close

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_each_merged_model_alone(family):
    base = tiny_base(family, dtype=torch.float64)
    adapters = mixed_adapters(base.model)
    engine = engine_of(base, adapters, max_rows=5)
    requests = some_requests(adapters)
    results = engine.generate(requests)
    engine.close()
    for request, result in zip(requests, results, strict=True):
        if request.adapter is None:
            expected = greedy(base.model, request)
        else:
            with merged(base.model, adapters[request.adapter]):
                expected = greedy(base.model, request)
        assert result.token_ids == expected
        assert result.finish_reason == "length"
        assert result.adapter_digest == (
            None if request.adapter is None else engine.adapters[request.adapter]
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runner", ["fast", "generic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logprobs_of_both_runners_are_those_of_the_merged_model(family, runner, dtype):
    base = tiny_base(family, dtype=dtype)
    if runner == "fast" and why_not_fast(base.model):
        pytest.skip("not of the Llama family")
    adapters = mixed_adapters(base.model)
    engine = engine_of(base, adapters, max_rows=4, runner=runner)
    requests = [
        Request(tokens(1, 7 + i, seed=i)[0].tolist(), adapter=name, max_tokens=3, logprobs=True)
        for i, name in enumerate([None, *adapters])
    ]
    results = engine.generate(requests)
    engine.close()
    reference = tiny_base(family, dtype=torch.float64)
    reference.model.load_state_dict(base.model.state_dict())
    for request, result in zip(requests, results, strict=True):
        ids = torch.tensor([[*request.prompt, *result.token_ids]])
        with torch.no_grad():
            if request.adapter is None:
                logits = reference.model(ids).logits[0]
            else:
                with merged(reference.model, adapters[request.adapter]):
                    logits = reference.model(ids).logits[0]
        lines = logits[len(request.prompt) - 1 : -1].log_softmax(-1)
        expected = lines.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        assert result.logprobs is not None
        scale = max(1.0, float(logits.abs().max()))  # a logprob carries the rounding of the largest logit
        wide = torch.float32 if dtype == torch.float64 else dtype  # logprobs are formed in float32
        close(torch.tensor(result.logprobs, dtype=torch.float64) / scale, expected / scale, wide)


def test_the_adapters_do_matter():
    base = tiny_base(dtype=torch.float64)
    adapters = mixed_adapters(base.model)
    engine = engine_of(base, adapters)
    prompt = tokens(1, 9)[0].tolist()
    answers = engine.generate([Request(prompt, adapter=a, max_tokens=12) for a in [None, *adapters]])
    assert len({r.token_ids for r in answers}) == len(answers)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's own call
def test_one_adapter_agrees_with_peft():
    import peft

    base = tiny_base(dtype=torch.float32)
    adapter = make_adapter(base.model, 3, rank=4, alpha=8, targets=["q_proj", "down_proj"])
    request = Request(tokens(1, 12)[0].tolist(), adapter="a", max_tokens=5, logprobs=True)
    engine = engine_of(base, {"a": adapter})
    result = engine.generate([request])[0]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(base.model, config).eval()
    state = {}
    for path, f in adapter.factors.items():
        state[f"base_model.model.{path}.lora_A.weight"] = f.A
        state[f"base_model.model.{path}.lora_B.weight"] = f.B
    peft.set_peft_model_state_dict(wrapped, state)
    ids = torch.tensor([[*request.prompt, *result.token_ids]])
    with torch.no_grad():
        lines = wrapped(ids).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    expected = lines.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
    close(torch.tensor(result.logprobs), expected, torch.float32)


# Prompts, stops, streaming -----------------------------------------------------------------------


def text_base(**options):
    return tiny_base(tokenizer=ByteTokenizer(chat=False), vocab_size=260, dtype=torch.float64, **options)


def test_stop_texts_end_an_answer_and_streamed_pieces_join_to_it():
    base = text_base()
    engine = Engine(base)
    free = engine.generate([Request([7, 8, 9], max_tokens=24, ignore_eos=True)])[0]
    raw = ByteTokenizer().decode(free.token_ids)
    letters = [c for c in raw if c.isascii() and c.isprintable()]
    stop = letters[min(2, len(letters) - 1)]
    events = []
    handle = engine.submit(
        Request([7, 8, 9], max_tokens=24, ignore_eos=True, stop=[stop]), on_token=events.append
    )
    while engine.step():
        pass
    result = handle.result(0)
    assert result.finish_reason == "stop"
    assert stop not in result.text
    assert "".join(e.text for e in events) == result.text == raw.split(stop)[0]
    assert events[-1].finish_reason == "stop"
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)


def test_an_end_of_turn_token_ends_the_answer_unless_ignored():
    base = tiny_base(dtype=torch.float64)
    prompt = tokens(1, 5)[0].tolist()
    free = Engine(base).generate([Request(prompt, max_tokens=8)])[0].token_ids
    base.stop_token_ids = (free[3],)
    first = free.index(free[3])
    stopped = Engine(base).generate([Request(prompt, max_tokens=8)])[0]
    assert (stopped.token_ids, stopped.finish_reason) == (free[:first], "stop")
    assert Engine(base).generate([Request(prompt, max_tokens=8, ignore_eos=True)])[0].token_ids == free


# Refusals ----------------------------------------------------------------------------------------


def test_too_long_is_refused_with_numbers_before_anything_runs():
    engine = Engine(tiny_base(), max_rows=2)
    assert engine.max_row_tokens == 128
    with pytest.raises(BudgetError, match=r"100 tokens.*50.*150.*128"):
        engine.submit(Request([1] * 100, max_tokens=50))
    small = Engine(tiny_base(), max_rows=2, kv_cache_bytes=40 * engine.runner.cache.shape.bytes_per_token)
    with pytest.raises(BudgetError, match="20"):
        small.generate([Request([1] * 15, max_tokens=6)])
    assert len(small.generate([Request([1] * 15, max_tokens=5)])[0].token_ids) == 5


def test_the_last_position_of_the_context_can_be_used():
    for family in ("llama", "gpt2"):
        engine = Engine(tiny_base(family), max_rows=2)
        long, short = engine.generate([Request([1] * 120, max_tokens=8), Request([2], max_tokens=3)])
        assert (long.finish_reason, len(long.token_ids)) == ("length", 8)
        assert short.finish_reason == "length"


def test_unknown_adapters_are_refused_and_leave_no_lease():
    base = tiny_base()
    engine = engine_of(base, {"mine": make_adapter(base.model, 0, rank=2)})
    with pytest.raises(UnknownAdapterError, match="mine"):
        engine.generate(
            [Request([1], adapter="mine", max_tokens=9), Request([1], adapter="mime", max_tokens=9)]
        )
    assert engine.registry.lease("mine").leases == 1


def test_a_full_queue_is_refused():
    engine = Engine(tiny_base(), max_waiting=1)
    engine.submit(Request([1], max_tokens=9))
    with pytest.raises(BudgetError, match="wait"):
        engine.submit(Request([1], max_tokens=9))


def test_what_cannot_be_served_is_refused():
    base = tiny_base("qwen2")
    engine = Engine(base)
    wrong = Adapter(LoRAConfig(rank=1), {"nowhere": Factors(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)})
    with pytest.raises(AdapterFileError, match="nowhere"):
        engine.add_adapter("b", wrong)
    with pytest.raises(DataError):
        engine.submit(Request([VOCAB]))
    with pytest.raises(ConfigError, match="Llama family"):
        Engine(tiny_base("gpt2"), runner="fast")
    with pytest.raises(ConfigError):
        Engine(base, deterministic=True, merge_after_steps=3)


# Adapters that come and go -----------------------------------------------------------------------


def test_replacing_and_removing_during_decode_changes_no_running_answer():
    base = tiny_base(dtype=torch.float64)
    adapters = mixed_adapters(base.model)
    engine = engine_of(base, adapters, max_rows=3)
    request = Request(tokens(1, 6)[0].tolist(), adapter="small", max_tokens=10)
    expected = engine.generate([request])[0]
    handle = engine.submit(request)
    engine.step()
    engine.add_adapter("small", adapters["large"])
    newer = engine.submit(request)
    engine.step()
    engine.remove_adapter("small")
    for name in ("partial", "pattern", "one-layer"):
        engine.submit(Request([1, 2], adapter=name, max_tokens=3))
    while engine.step():
        pass
    assert handle.result(0).token_ids == expected.token_ids
    assert handle.result(0).adapter_digest == expected.adapter_digest
    assert newer.result(0).adapter_digest == engine.adapters["large"]
    assert newer.result(0).token_ids != expected.token_ids


def test_more_adapters_than_rows_from_disk_with_little_memory(tmp_path):
    base = tiny_base(dtype=torch.float64)
    made = {f"a{i}": make_adapter(base.model, i, rank=1 + i % 4) for i in range(9)}
    engine = Engine(base, max_rows=2, adapter_bytes=3 * max(a.num_bytes for a in made.values()))
    for name, adapter in made.items():
        write_adapter(adapter, tmp_path / name)
        engine.add_adapter(name, tmp_path / name)
    assert engine.registry.resident_bytes < sum(a.num_bytes for a in made.values())
    for name, result in zip(
        made, engine.generate([Request([3, 1, 4], adapter=n, max_tokens=6) for n in made]), strict=True
    ):
        with merged(base.model, made[name]):
            assert result.token_ids == greedy(base.model, Request([3, 1, 4], max_tokens=6))


def test_many_are_added_at_once_or_none(tmp_path):
    base = tiny_base()
    paths = {}
    for i in range(6):
        paths[f"a{i}"] = tmp_path / f"a{i}"
        write_adapter(make_adapter(base.model, i, rank=2), paths[f"a{i}"])
    engine = Engine(base)
    assert engine.add_adapters(paths) == engine.adapters
    assert len(set(engine.adapters.values())) == 6
    other = Engine(base)
    with pytest.raises(AdapterFileError):
        other.add_adapters(paths | {"gone": tmp_path / "gone"})
    assert other.adapters == {}


def test_prefix_reuse_changes_no_answer_and_never_crosses_adapters_or_tenants():
    base = tiny_base(dtype=torch.float64)
    adapters = mixed_adapters(base.model)
    engine = engine_of(base, adapters)
    plain = engine_of(base, adapters, prefix_cache_bytes=0)
    prompt = tokens(1, 90)[0].tolist()
    for name in [None, *adapters, None, *adapters]:
        request = Request(prompt, adapter=name, max_tokens=5)
        assert engine.generate([request])[0].token_ids == plain.generate([request])[0].token_ids
    again = engine.generate([Request(prompt, adapter="small", max_tokens=1)])[0]
    assert again.reused_tokens == 64
    assert engine.generate([Request(prompt, adapter="small", tenant="x", max_tokens=1)])[0].reused_tokens == 0
    engine.add_adapter("small", adapters["large"])
    engine.remove_adapter("large")
    assert engine.generate([Request(prompt, adapter="small", max_tokens=1)])[0].reused_tokens == 64


def test_the_merged_path_is_left_exactly_when_another_adapter_comes():
    base = tiny_base(dtype=torch.float64)
    adapters = mixed_adapters(base.model)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    engine = engine_of(base, adapters, merge_after_steps=2)
    unmerged = engine_of(tiny_base(dtype=torch.float64), adapters)
    requests = [Request([5, 6, 7], adapter="small", max_tokens=9)]
    assert engine.generate(requests)[0].token_ids == unmerged.generate(requests)[0].token_ids
    assert engine.merged.current is not None
    mixed = [Request([5, 6, 7], adapter=name, max_tokens=4) for name in ["small", None, "large"]]
    got, expected = engine.generate(mixed), unmerged.generate(mixed)
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    assert engine.merged.current is None
    assert all(torch.equal(before[name], p) for name, p in base.model.named_parameters())
