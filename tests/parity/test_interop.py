"""The interoperability matrix: layer kinds × options, from PEFT to lorasmith and back, same outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith.errors import AdapterFileError
from lorasmith.formats import check_coverage, check_values, read_adapter, read_header, write_adapter
from lorasmith.inject import extract, inject, merge
from lorasmith.lora import LoRAConfig
from tests.support.layers import MixtureBlock, Named
from tests.support.models import TinyMLP, tiny_causal_lm
from tests.support.tolerance import close

pytestmark = [
    # PEFT's own advice about each of these, and its calls to names that transformers has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@dataclass(frozen=True)
class Kind:
    """One kind of layer: a model that has it, an input, and how either side names it."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    ours: dict[str, Any]
    theirs: dict[str, Any]
    lacks: tuple[str, ...] = ()
    has_bias: bool = True
    merges: bool = True
    pattern: str = ""


MOE = ["experts.gate_up_proj", "experts.down_proj"]
NO_BRANCH = ("lora-bias", "dora", "dora-rslora")
# the roundings of several layers in bfloat16 add up to more than one; single layers show the same
DEEP = ("bfloat16-base",)


def layer(make: Callable[[], nn.Module], *size: int, **keywords: Any) -> Kind:
    named = dict(targets=["layer"]), dict(target_modules=["layer"])
    return Kind(lambda: Named(make()), lambda: torch.randn(2, *size), *named, pattern="layer", **keywords)


def ids() -> Tensor:
    return torch.arange(10).view(2, 5)


def lm(*names: str, tied: bool, lacks: tuple[str, ...] = ()) -> Kind:
    make = lambda: tiny_causal_lm("llama", tie_word_embeddings=tied)  # noqa: E731
    return Kind(
        make, ids, dict(targets=list(names)), dict(target_modules=list(names)), has_bias=False,
        pattern=names[0], lacks=DEEP + lacks, merges=not tied,
    )  # fmt: skip


def extra(ours: dict[str, Any], theirs: dict[str, Any], *, tied: bool = False) -> Kind:
    make = lambda: tiny_causal_lm("llama", tie_word_embeddings=tied)  # noqa: E731
    return Kind(
        make, ids, dict(targets=["q_proj"]) | ours, dict(target_modules=["q_proj"]) | theirs, has_bias=False,
        pattern="q_proj", lacks=DEEP, merges=not tied,
    )  # fmt: skip


KINDS = {
    "linear": Kind(
        TinyMLP, lambda: torch.randn(3, 12), dict(targets=["up", "head"]),
        dict(target_modules=["up", "head"]), pattern="head",
    ),
    "conv1d-transposed": Kind(
        lambda: tiny_causal_lm("gpt2"), ids, dict(targets=["c_attn", "c_fc"]),
        dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), pattern="c_fc", lacks=DEEP,
    ),
    "embedding": lm("embed_tokens", tied=False, lacks=("lora-bias",)),
    "embedding-and-head": lm("embed_tokens", "lm_head", tied=False, lacks=("lora-bias",)),
    "head": lm("lm_head", tied=False),
    "tied-embedding": lm("embed_tokens", tied=True, lacks=("lora-bias",)),
    "tied-head": lm("lm_head", tied=True),
    "tied-both": lm("lm_head", "embed_tokens", tied=True, lacks=("lora-bias",)),
    "scaled-embedding": Kind(
        lambda: tiny_causal_lm("gemma3", tie_word_embeddings=False), ids, dict(targets=["embed_tokens"]),
        dict(target_modules=["embed_tokens"]), lacks=("lora-bias", *DEEP), has_bias=False,
        pattern="embed_tokens",
    ),
    "conv1d": layer(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 4, 9),
    "conv2d": layer(lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), 4, 5, 6),
    "conv2d-point": layer(lambda: nn.Conv2d(4, 6, 1, bias=False), 4, 5, 6, has_bias=False),
    "conv2d-same": layer(lambda: nn.Conv2d(4, 6, 3, padding="same"), 4, 5, 6),
    "conv3d": layer(lambda: nn.Conv3d(4, 6, (2, 3, 1), stride=2, padding=(0, 1, 0)), 4, 4, 5, 3),
    "conv2d-groups": layer(
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), 4, 5, 6, lacks=("dora", "dora-rslora"), merges=False,
    ),
    "experts": Kind(
        MixtureBlock, lambda: torch.randn(3, 6), dict(targets=(), target_parameters=MOE),
        dict(target_modules=[], target_parameters=MOE), lacks=NO_BRANCH, pattern="experts.down_proj",
    ),
    "experts-transposed": Kind(
        lambda: MixtureBlock(is_transposed=True), lambda: torch.randn(3, 6),
        dict(targets=["proj"], target_parameters=MOE[:1]),
        dict(target_modules=["proj"], target_parameters=MOE[:1]), lacks=NO_BRANCH, pattern="proj",
    ),
    "experts-mixtral": Kind(
        lambda: tiny_causal_lm("mixtral"), ids, dict(targets=["q_proj"], target_parameters=MOE),
        dict(target_modules=["q_proj"], target_parameters=MOE), lacks=NO_BRANCH + DEEP, has_bias=False,
        pattern="q_proj",
    ),
    # q and v of a fused q, k, v; PEFT has no name for that, and reads it as one pair with zeros
    "fused-parts": Kind(
        lambda: tiny_causal_lm("gpt2"), ids,
        dict(targets=["c_attn"], parts={"c_attn": [(0, 32), (64, 96)]}), {}, pattern="c_attn", lacks=DEEP,
    ),
    "saved-head-and-norm": extra(
        dict(modules_to_save=["lm_head", "model.norm"]), dict(modules_to_save=["lm_head", "model.norm"])
    ),
    "saved-tied-head": extra(dict(modules_to_save=["lm_head"]), dict(modules_to_save=["lm_head"]), tied=True),
    "token-rows": extra(
        dict(trainable_tokens={"embed_tokens": [1, 7]}), dict(trainable_token_indices=[1, 7])
    ),
    "token-rows-tied": extra(
        dict(trainable_tokens={"embed_tokens": [7, 2]}), dict(trainable_token_indices={"embed_tokens": [7, 2]}),
        tied=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """Settings on either side, on top of those of the kind."""

    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    base_dtype: torch.dtype = torch.float32
    file_dtype: torch.dtype | None = None


def patterns(kind: Kind) -> Option:
    same = dict(rank_pattern={kind.pattern: 2}, alpha_pattern={kind.pattern: 5.0})
    return Option(same, same)


OPTIONS: dict[str, Callable[[Kind], Option]] = {
    "plain": lambda _: Option(),
    "rslora": lambda _: Option(dict(rslora=True), dict(use_rslora=True)),
    "patterns": patterns,
    "patterns-rslora": lambda k: Option(
        patterns(k).ours | dict(rslora=True), patterns(k).theirs | dict(use_rslora=True)
    ),
    "bias-all": lambda _: Option(dict(bias="all"), dict(bias="all")),
    "bias-lora-only": lambda _: Option(dict(bias="lora_only"), dict(bias="lora_only")),
    "lora-bias": lambda _: Option(dict(lora_bias=True), dict(lora_bias=True)),
    "dropout-0": lambda _: Option(dict(dropout=0.0), dict(lora_dropout=0.0)),
    "init-normal": lambda _: Option(dict(init="normal"), dict(init_lora_weights="gaussian")),
    "bfloat16-base": lambda _: Option(base_dtype=torch.bfloat16),
    "bfloat16-file": lambda _: Option(file_dtype=torch.bfloat16),
    "dora": lambda _: Option({}, dict(use_dora=True)),
    "dora-rslora": lambda _: Option(dict(rslora=True), dict(use_dora=True, use_rslora=True)),
}
CELLS = [(k, o) for k in KINDS for o in OPTIONS if o not in KINDS[k].lacks]
THEIRS = [(k, o) for k, o in CELLS if KINDS[k].theirs]
OURS = [(k, o) for k, o in CELLS if not o.startswith("dora")]  # DoRA is imported, not made here


def matrix(cells: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "option"), cells, ids=[f"{k}-{o}" for k, o in cells])


def base_of(kind: Kind, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return kind.make().to(dtype).eval()


def input_of(kind: Kind, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    x = kind.x()
    return x.to(dtype) if x.is_floating_point() else x


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, Tensor) else y.logits


@torch.no_grad()
def shake(model: nn.Module, file_dtype: torch.dtype | None) -> None:
    """Move every tensor that trains, so that nothing is at its start, to a value that the file can hold."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            moved = parameter + noise.to(parameter.dtype)
            parameter.copy_(moved.to(file_dtype or moved.dtype))


def cast_file(file, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        tensors = load_file(file).items()
        save_file(
            {n: t if ".base_layer." in n else t.to(dtype) for n, t in tensors},
            file,
            metadata={"format": "pt"},
        )


def peft_load(base: nn.Module, folder) -> nn.Module:
    """PEFT's loader, which says nothing about keys that it does not know; so they are asked for."""
    loaded = peft.PeftModel.from_pretrained(base, folder)
    state = peft.load_peft_weights(str(folder), device="cpu")
    result = peft.set_peft_model_state_dict(loaded, state)
    assert result.unexpected_keys == []
    missing = [key for key in result.missing_keys if "lora_" in key or "tokens_delta" in key]
    # a head tied to trained rows shows them under a second name
    assert [key for key in missing if "lm_head.token_adapter" not in key] == []
    return loaded.eval()


@matrix(THEIRS)
def test_theirs_in_ours_and_back(name, option, tmp_path):
    kind, chosen = KINDS[name], OPTIONS[option](KINDS[name])
    x, dtype = input_of(kind, chosen.base_dtype), chosen.base_dtype
    base = base_of(kind, dtype)
    before = output(base, x)
    config = peft.LoraConfig(r=4, lora_alpha=6, **kind.theirs, **chosen.theirs)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    shake(model, chosen.file_dtype)
    expected = output(model, x)
    assert (expected.float() - before.float()).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "theirs")
    cast_file(tmp_path / "theirs" / "adapter_model.safetensors", chosen.file_dtype)

    ours, adapter = base_of(kind, dtype), read_adapter(tmp_path / "theirs")
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    coverage = check_coverage(read_header(tmp_path / "theirs"), shapes)
    assert coverage.is_complete, str(coverage)
    assert check_values(adapter) == []
    inject(ours, adapter)
    close(output(ours, x), expected, dtype)

    write_adapter(extract(ours), tmp_path / "ours", dtype=chosen.file_dtype)
    if chosen.file_dtype is None:
        assert read_adapter(tmp_path / "ours").digest == extract(ours).digest
    close(output(peft_load(base_of(kind, dtype), tmp_path / "ours"), x), expected, dtype)

    if kind.merges and (kind.has_bias or option != "lora-bias"):
        plain = base_of(kind, dtype)
        merge(plain, adapter)
        close(output(plain, x), expected, dtype)


@matrix(OURS)
def test_ours_in_theirs(name, option, tmp_path):
    kind, chosen = KINDS[name], OPTIONS[option](KINDS[name])
    x, dtype = input_of(kind, chosen.base_dtype), chosen.base_dtype
    ours = base_of(kind, dtype)
    before = output(ours, x)
    inject(ours, LoRAConfig(**({"rank": 4, "alpha": 6} | kind.ours | chosen.ours)))
    assert torch.equal(output(ours, x), before)
    shake(ours, chosen.file_dtype)
    expected = output(ours, x)
    assert (expected.float() - before.float()).abs().max() > 1e-2
    write_adapter(extract(ours), tmp_path / "ours", dtype=chosen.file_dtype)
    if chosen.file_dtype is None:
        assert read_adapter(tmp_path / "ours").digest == extract(ours).digest
    close(output(peft_load(base_of(kind, dtype), tmp_path / "ours"), x), expected, dtype)


SHIFTED = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-patterns": {
        "init_lora_weights": "pissa", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SHIFTED.values(), ids=SHIFTED.keys())
def test_an_adapter_that_took_a_part_of_the_base_comes_back_by_its_start(settings, tmp_path):
    base, x = tiny_causal_lm("llama"), ids()
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "k_proj", "v_proj"], **settings)
    model = peft.get_peft_model(base, config).eval()
    close(output(model, x), output(tiny_causal_lm("llama"), x), torch.float32)  # the start is the base
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = settings["init_lora_weights"]
    shake(model, None)
    expected = output(model, x)
    model.save_pretrained(tmp_path / "trained")

    with pytest.raises(AdapterFileError, match=r"changed the base before training.*initial=folder"):
        read_adapter(tmp_path / "trained")
    adapter = read_adapter(tmp_path / "trained", initial=tmp_path / "start")
    ours = tiny_causal_lm("llama")
    inject(ours, adapter)
    close(output(ours, x), expected, torch.float32)
    write_adapter(adapter, tmp_path / "plain")
    again = read_adapter(tmp_path / "plain")
    assert all(torch.equal(t, again.tensors()[n]) for n, t in adapter.tensors().items())
    # with rsLoRA the alpha for twice the rank is a product with √2, so a scaling may move by one ulp
    assert all(
        math.isclose(f.scaling, again.factors[p].scaling, rel_tol=2**-51) for p, f in adapter.factors.items()
    )
    close(output(peft_load(tiny_causal_lm("llama"), tmp_path / "plain"), x), expected, torch.float32)
    with pytest.raises(AdapterFileError, match="given twice"):
        read_adapter(tmp_path / "trained", initial=tmp_path / "trained")


def test_what_peft_converted_itself_is_plain(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(tiny_causal_lm("llama"), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    shake(model, None)
    expected = output(model, ids())
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ours = tiny_causal_lm("llama")
    inject(ours, read_adapter(tmp_path / "plain"))
    close(output(ours, ids()), expected, torch.float32)


REFUSED = [(k, "lora-bias") for k in KINDS if "lora-bias" in KINDS[k].lacks and k != "experts-mixtral"]


@matrix(REFUSED)
def test_what_peft_has_no_place_for_is_refused_here_too(name, option):
    kind = KINDS[name]
    with pytest.raises(ValueError, match="lora_bias"):
        peft.get_peft_model(base_of(kind, torch.float32), peft.LoraConfig(lora_bias=True, **kind.theirs))
    with pytest.raises(AdapterFileError, match="lora_bias"):
        inject(base_of(kind, torch.float32), LoRAConfig(lora_bias=True, **kind.ours))
