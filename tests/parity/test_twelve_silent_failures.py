"""Twelve ways in which adapters fail without a word, as users of other tools reported them.

Each is reproduced with PEFT where PEFT itself is silent, and shown refused or reported by lorasmith.
Where another runtime is the silent one, its rule is applied here as its source states it.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorasmith.engine import Engine, Request
from lorasmith.errors import AdapterFileError, TargetError
from lorasmith.formats import check_coverage, check_values, read_adapter, read_header, write_adapter
from lorasmith.inject import eject, extract, inject, lora_layers, merge, unmerge
from lorasmith.lora import Adapter, Factors, LoRAConfig
from tests.support.engines import tiny_base
from tests.support.models import bits, make_adapter, same_bits, tiny_causal_lm, tokens
from tests.support.tolerance import TOLERANCE, close

peft = pytest.importorskip("peft")
WEIGHTS = "adapter_model.safetensors"


@contextlib.contextmanager
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails if PEFT warns or logs a warning inside. A deprecation is no word about the adapter."""
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught if not issubclass(w.category, FutureWarning | DeprecationWarning)]
    assert not said
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR", "CRITICAL")]


def wrapped(folder: Path | None = None, **config) -> nn.Module:
    """The tiny base in PEFT, with random B; saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config
        model = peft.get_peft_model(
            tiny_causal_lm("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **options)
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if folder is not None:
            model.save_pretrained(folder)
    return model.eval()


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / WEIGHTS
    save_file({k.replace(old, new): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def problems(folder: Path, model: nn.Module) -> set[str]:
    return {p.kind for p in check_coverage(read_header(folder), shapes(model)).problems}


def base_logits() -> torch.Tensor:
    return tiny_causal_lm("llama")(tokens()).logits


@pytest.mark.filterwarnings("ignore")
def test_01_a_target_that_matches_nothing(tmp_path, caplog):
    with silence(caplog):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_porj"])
        model = peft.get_peft_model(tiny_causal_lm("llama"), config)
    assert not any("v_p" in name for name, _ in model.named_parameters() if "lora_" in name)
    with pytest.raises(TargetError, match=r'"v_porj" matched no module.*did you mean "v_proj"|v_porj'):
        inject(tiny_causal_lm("llama"), LoRAConfig(rank=4, targets=["q_proj", "v_porj"]))
    model.save_pretrained(tmp_path / "a")
    assert "unmatched-target" in problems(tmp_path / "a", tiny_causal_lm("llama"))


@pytest.mark.filterwarnings("ignore")
def test_02_renamed_keys_load_as_nothing(tmp_path, caplog):
    wrapped(tmp_path / "a")
    rename(tmp_path / "a", ".self_attn.", ".attention.")
    model = peft.get_peft_model(
        tiny_causal_lm("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    with silence(caplog):
        model.load_adapter(str(tmp_path / "a"), adapter_name="renamed")
    model.set_adapter("renamed")
    assert torch.equal(model.eval()(tokens()).logits, base_logits())
    base = tiny_causal_lm("llama")
    assert {"not-in-base", "missing-factors"} <= problems(tmp_path / "a", base)
    with pytest.raises(AdapterFileError, match=r"nothing was attached[\s\S]*no such module"):
        inject(base, read_adapter(tmp_path / "a"))


@pytest.mark.filterwarnings("ignore")
def test_03_a_prefix_that_does_not_match_is_answered_by_the_base(tmp_path, caplog):
    wrapped(tmp_path / "a")
    rename(tmp_path / "a", "base_model.model.model.", "base_model.model.model.language_model.")
    model = wrapped()
    with silence(caplog):
        model.load_adapter(str(tmp_path / "a"), adapter_name="prefixed")
    model.set_adapter("prefixed")
    assert torch.equal(model.eval()(tokens()).logits, base_logits())
    coverage = check_coverage(read_header(tmp_path / "a"), shapes(tiny_causal_lm("llama")))
    assert "the base has model.layers.0.self_attn.q_proj" in str(coverage)
    engine = Engine(tiny_base())
    with pytest.raises(AdapterFileError, match=r"does not fit|no such module"):
        engine.add_adapter("prefixed", tmp_path / "a")
    assert "prefixed" not in engine.adapters


class Experts(nn.Module):
    """A stacked parameter that is used without a linear layer, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.expand(2, -1, -1), self.up_proj).sum(0)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.head = Experts(), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(x))


@pytest.mark.filterwarnings("ignore")
def test_04_expert_parameters_are_dropped(tmp_path):
    # vLLM and SGLang keep the linear layers' factors and drop these; nothing of a file may be left out.
    config = peft.LoraConfig(r=2, target_modules=["head"], target_parameters=["experts.up_proj"])
    model = peft.get_peft_model(Mixture(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "a")
    x = torch.randn(4, 6)
    expected, ours = model.eval()(x), Mixture()
    adapter, refusal = None, ""
    try:
        adapter = read_adapter(tmp_path / "a")
    except AdapterFileError as error:
        refusal = str(error)
    if adapter is None:
        assert "target_parameters" in refusal
    else:
        inject(ours, adapter)
        close(ours(x), expected, torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_05_an_adapter_that_changes_no_output(tmp_path, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        untrained = peft.get_peft_model(
            tiny_causal_lm("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"])
        )
        untrained.save_pretrained(tmp_path / "a")
    with silence(caplog):
        model = peft.PeftModel.from_pretrained(tiny_causal_lm("llama"), tmp_path / "a").eval()
    assert torch.equal(model(tokens()).logits, base_logits())
    assert [p.kind for p in check_values(read_adapter(tmp_path / "a"))] == ["no-effect"]


class Blocks(nn.Module):
    """Blocks under reentrant gradient checkpointing, whose input needs no gradient, and a head outside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.up, x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore")
def test_06_b_is_zero_after_training_with_gradient_checkpointing(tmp_path):
    model = peft.get_peft_model(Blocks(), peft.LoraConfig(r=2, target_modules=["up", "head"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
    trained = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert [n for n, p in trained.items() if not p.any()] == ["base_model.model.up.lora_B.default.weight"]
    model.save_pretrained(tmp_path / "a")
    found = check_values(read_adapter(tmp_path / "a"))
    assert [(p.kind, p.module) for p in found] == [("zero-factors", "up")]

    # Ours: checkpointing that needs no gradient of its input, so every B moves.
    ours = tiny_causal_lm("llama")
    inject(ours, LoRAConfig(rank=2))
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    ours(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(layer.lora_B.grad.any() for layer in lora_layers(ours).values())


@pytest.mark.filterwarnings("ignore")
def test_07_merging_some_and_deleting_the_merged(caplog):
    model = wrapped()
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.fill_(0.1)
    model.base_model.set_adapter(["default", "second"])
    both = model.eval()(tokens()).logits
    with silence(caplog):
        model.merge_adapter(["default"])
    assert (model(tokens()).logits - both).abs().max() > 0.01  # the second one is off, without a word
    # Deleting the merged one left its delta in the base; PEFT 0.21 refuses that by itself.

    ours = tiny_causal_lm("llama")
    before, first, second = bits(ours), make_adapter(ours, seed=1), make_adapter(ours, seed=2)
    inject(ours, first)
    expected = ours(tokens()).logits
    merge(ours, second)
    eject(ours)  # the injected one goes while the other is merged
    unmerge(ours)
    assert same_bits(ours, before)
    inject(ours, first)
    assert torch.equal(ours(tokens()).logits, expected)


@pytest.mark.parametrize("name", ["lora", "my_lora_A", "lora_B.weight", "base_model.model"])
def test_08_a_name_that_holds_lora(name):
    base = tiny_base()
    adapter = make_adapter(base.model)
    engine = Engine(base)
    engine.add_adapter("plain", adapter)
    engine.add_adapter(name, adapter)
    answers = [engine.generate([Request([1, 2, 3], adapter=n, max_tokens=6)])[0] for n in ("plain", name)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].adapter_digest == answers[1].adapter_digest == adapter.digest


@pytest.mark.filterwarnings("ignore")
def test_09_another_method_loads_as_nothing(tmp_path, caplog):
    lokr = peft.get_peft_model(tiny_causal_lm("llama"), peft.LoKrConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in lokr.named_parameters():
            if "lokr" in name:
                parameter.normal_()
    lokr.save_pretrained(tmp_path / "a")
    model = peft.get_peft_model(
        tiny_causal_lm("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"])
    ).eval()
    with silence(caplog):
        peft.set_peft_model_state_dict(model, load_file(tmp_path / "a" / WEIGHTS))
    assert torch.equal(model(tokens()).logits, base_logits())
    with pytest.raises(AdapterFileError, match="LOKR"):
        read_adapter(tmp_path / "a")


def under_foreign_rule(adapter: Adapter, scaling_of) -> torch.Tensor:
    """Logits of a runtime that takes A and B from the file and the scaling from a rule of its own."""
    factors = {p: Factors(f.A, f.B, scaling_of(f.rank)) for p, f in adapter.factors.items()}
    model = tiny_causal_lm("llama")
    inject(model, Adapter(adapter.config, factors))
    return model(tokens()).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "rule"),
    [
        pytest.param(
            dict(r=4, lora_alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 1}),
            lambda config, rank: config["lora_alpha"] / config["r"],
            id="10-vllm-ignores-rank-and-alpha-patterns",
        ),
        pytest.param(
            dict(r=4, lora_alpha=8, use_rslora=True),
            lambda config, rank: config["lora_alpha"] / config["r"],
            id="11-sglang-ignores-use-rslora",
        ),
        pytest.param(
            dict(r=4, lora_alpha=8, use_rslora=True, alpha_pattern={"q_proj": 1}),
            lambda config, rank: config["lora_alpha"] / rank,
            id="12-llama-cpp-divides-alpha-by-the-rank-of-the-tensor",
        ),
    ],
)
def test_scale_fields_that_a_reader_ignores(tmp_path, config, rule):
    expected = wrapped(tmp_path / "a", **config)(tokens()).logits
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    adapter = read_adapter(tmp_path / "a")
    foreign = under_foreign_rule(adapter, lambda rank: rule(written, rank))
    assert (foreign - expected).abs().max() > 100 * TOLERANCE[torch.float32][1]  # a wrong model, no message
    ours = tiny_causal_lm("llama")
    inject(ours, adapter)
    close(ours(tokens()).logits, expected, torch.float32)
    # Written by lorasmith and read by PEFT again, the fields still mean the same.
    write_adapter(extract(ours), tmp_path / "b")
    again = peft.PeftModel.from_pretrained(tiny_causal_lm("llama"), tmp_path / "b").eval()
    close(again(tokens()).logits, expected, torch.float32)
