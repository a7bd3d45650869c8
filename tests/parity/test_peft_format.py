"""PEFT's files are read as PEFT means them, and ours are read by PEFT as we mean them."""

from __future__ import annotations

import json
import re

import peft
import pytest
import torch

from lorasmith.formats import check_coverage, read_adapter, read_header, write_adapter
from lorasmith.lora import Adapter, Factors, LoRAConfig, delta
from tests.support.models import tiny_causal_lm
from tests.support.tolerance import close

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # a random model has no name, so PEFT cannot look for its vocabulary size
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
CONV1D = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but:UserWarning")

LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "list": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}),
    "regex": (
        "llama",
        {"r": 3, "lora_alpha": 16, "target_modules": r"model\.layers\.\d+\.(mlp\.up|self_attn\.v)_proj"},
    ),
    "all-linear": ("llama", {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 5, "lora_alpha": 7, "target_modules": LLAMA_ALL, "use_rslora": True}),
    "gaussian": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ),
    "layers": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "layers-pattern": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "exclude": ("llama", {"r": 4, "target_modules": LLAMA_ALL, "exclude_modules": ["layers.0.mlp.up_proj"]}),
    "head": ("llama", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": LLAMA_ALL,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
            "alpha_pattern": {"k_proj": 3, r"layers.0.self_attn.o_proj": 5.5},
            "use_rslora": True,
        },
    ),
    "bias-lora-only": ("qwen2", {"r": 4, "target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "bias-all": ("qwen2", {"r": 4, "target_modules": ["q_proj"], "bias": "all"}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-bias": ("gpt2", {"r": 4, "target_modules": ["c_fc"], "fan_in_fan_out": True, "bias": "all"}),
}
cases = pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=CASES.keys())


def peft_model(family: str, settings, *, seed: int = 1):
    model = peft.get_peft_model(tiny_causal_lm(family), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def layers_of(model) -> dict[str, torch.nn.Module]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {n.removeprefix("base_model.model."): m for n, m in layers.items()}


def assert_same_function(model, adapter: Adapter) -> None:
    """Each module's delta, each bias, and nothing on either side that the other lacks."""
    layers = layers_of(model)
    assert layers.keys() == adapter.factors.keys()
    for path, layer in layers.items():
        expected = layer.get_delta_weight("default")
        ours = delta(adapter.factors[path])
        close(ours.T if layer.fan_in_fan_out else ours, expected, torch.float32)
        assert layer.scaling["default"] == adapter.factors[path].scaling
        assert ours.abs().max() > 100 * 1e-5
    state = model.state_dict()
    for path, bias in adapter.biases.items():
        name = f"base_model.model.{path}" + (".base_layer.bias" if path in adapter.factors else ".bias")
        assert torch.equal(state[name], bias)


def save(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)


@cases
def test_peft_saves_and_we_read(tmp_path, family, settings):
    model = peft_model(family, settings)
    save(model, tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft")
    assert_same_function(model, adapter)
    has_bias = {n.removesuffix(".base_layer.bias").removesuffix(".bias") for n, p in trained_biases(model)}
    assert {f"base_model.model.{p}" for p in adapter.biases} == has_bias
    assert adapter.provenance == {}


def trained_biases(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")]


@cases
@CONV1D
def test_we_write_and_peft_loads_it_whole(tmp_path, family, settings):
    model = peft_model(family, settings)
    save(model, tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft")
    write_adapter(adapter, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny_causal_lm(family), tmp_path / "ours")
    assert_same_function(loaded, adapter)
    ids = torch.arange(12).reshape(2, 6)
    close(loaded.eval()(ids).logits, model(ids).logits, torch.float32)
    config = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    fresh = peft.get_peft_model(tiny_causal_lm(family), config)
    result = peft.set_peft_model_state_dict(
        fresh, peft.load_peft_weights(str(tmp_path / "ours"), device="cpu")
    )
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key] == []


@cases
def test_coverage_of_peft_files_is_complete(tmp_path, family, settings):
    model = peft_model(family, settings)
    save(model, tmp_path / "peft")
    shapes = {n: tuple(p.shape) for n, p in tiny_causal_lm(family).named_parameters(remove_duplicate=False)}
    coverage = check_coverage(read_header(tmp_path / "peft"), shapes)
    assert coverage.is_complete, str(coverage)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=CONV1D)])
def test_adapters_of_our_own_making(tmp_path, family, rslora):
    """Ranks and scalings that no config of ours explains."""
    base = tiny_causal_lm(family)
    adapter = Adapter(LoRAConfig(rank=4, rslora=rslora), {})
    generator = torch.Generator().manual_seed(0)
    for number, (path, module) in enumerate(base.named_modules()):
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            out, width = (
                module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            )
            if path != "lm_head":
                rank = 1 + number % 5
                A, B = (torch.randn(s, generator=generator) for s in ((rank, width), (out, rank)))
                adapter.factors[path] = Factors(A, B, (1 + number % 3) / (rank**0.5 if rslora else rank))
    write_adapter(adapter, tmp_path / "ours", base_name=None)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert_same_function(loaded, adapter)


def test_we_write_no_setting_that_peft_does_not_know(tmp_path):
    adapter = Adapter(
        LoRAConfig(rank=1, exclude=("x",)), {"q": Factors(torch.ones(1, 2), torch.ones(2, 1), 32.0)}
    )
    write_adapter(adapter, tmp_path / "a")
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert values.keys() <= peft.LoraConfig().to_dict().keys()


def test_every_setting_of_pefts_defaults_is_accepted(tmp_path):
    """A new PEFT that writes a new key with a harmless default stays readable; the default is falsy."""
    from lorasmith.formats.peft_config import parse_config

    values = peft.LoraConfig(target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"]}
    values = json.loads(json.dumps(values))
    faults: list[str] = []
    assert parse_config(values, faults) is not None
    assert faults == []


def test_the_matching_rules_are_pefts():
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    from lorasmith.formats.peft_rules import PatternTable, TargetRules

    paths = [
        "q_proj",
        "model.layers.0.q_proj",
        "model.layers.11.mlp.q_proj",
        "h.1.attn.k",
        "layers.1.q_proj",
        "xq_proj",
    ]
    targets = [
        ("q_proj",),
        ("layers.0.q_proj", "k"),
        r".*q_proj",
        r"model\.layers\.\d+\.q_proj",
        tuple(paths),
    ]
    for target in targets:
        for exclude in ((), ("mlp.q_proj",), r".*mlp.*"):
            for layers, pattern in ((None, ()), ((0, 1), ()), ((1,), ("layers", "h"))):
                rules = TargetRules(target, exclude, layers, pattern)
                theirs = SimpleNamespace(
                    target_modules=target if isinstance(target, str) else set(target),
                    exclude_modules=exclude,
                    layers_to_transform=list(layers) if layers else None,
                    layers_pattern=list(pattern),
                    modules_to_save=None,
                    target_parameters=None,
                )
                for path in paths:
                    expected = check_target_module_exists(theirs, path)
                    is_selected = expected is True or isinstance(expected, re.Match)
                    assert rules.selects(path) == is_selected, (rules, path)
    for patterns in (
        {"q_proj": 1, "layers.0.q_proj": 2},
        {r"layers\.0\.q_proj": 2, "q_proj": 1},
        {"^q_proj": 3, ".*mlp.*": 4, "proj": 5},
        {"q.proj": 1, "q_proj": 2},
        {"k|q_proj": 6},
        {"zzz": 9},
    ):
        table = PatternTable(patterns)
        for path in paths:
            assert table.get(path, 0) == patterns.get(get_pattern_key(patterns.keys(), path), 0), (
                patterns,
                path,
            )
