"""The interoperability matrix: layer kinds × options, from PEFT to lorasmith and back, same outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith.errors import LoraSmithError
from lorasmith.formats import read_adapter, write_adapter
from lorasmith.inject import extract, inject
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
        pattern=names[0], lacks=DEEP + lacks,
    )  # fmt: skip


def extra(ours: dict[str, Any], theirs: dict[str, Any], *, tied: bool = False) -> Kind:
    make = lambda: tiny_causal_lm("llama", tie_word_embeddings=tied)  # noqa: E731
    return Kind(
        make, ids, dict(targets=["q_proj"]) | ours, dict(target_modules=["q_proj"]) | theirs, has_bias=False,
        pattern="q_proj", lacks=DEEP,
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
        lambda: tiny_causal_lm("gemma3"), ids, dict(targets=["embed_tokens"]),
        dict(target_modules=["embed_tokens"]), lacks=("lora-bias", *DEEP), has_bias=False,
        pattern="embed_tokens",
    ),
    "conv1d": layer(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 4, 9),
    "conv2d": layer(lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), 4, 5, 6),
    "conv2d-point": layer(lambda: nn.Conv2d(4, 6, 1, bias=False), 4, 5, 6, has_bias=False),
    "conv2d-same": layer(lambda: nn.Conv2d(4, 6, 3, padding="same"), 4, 5, 6),
    "conv3d": layer(lambda: nn.Conv3d(4, 6, (2, 3, 1), stride=2, padding=(0, 1, 0)), 4, 4, 5, 3),
    "conv2d-groups": layer(
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), 4, 5, 6, lacks=("dora", "dora-rslora")
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
CELLS = [(kind, option) for kind in KINDS for option in OPTIONS]
matrix = pytest.mark.parametrize(("name", "option"), CELLS, ids=[f"{k}-{o}" for k, o in CELLS])


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


@matrix
def test_theirs_in_ours_and_back(name, option, tmp_path):
    kind, chosen = KINDS[name], OPTIONS[option](KINDS[name])
    if option in kind.lacks:
        pytest.skip("PEFT has no such thing")
    x, dtype = input_of(kind, chosen.base_dtype), chosen.base_dtype
    base = base_of(kind, dtype)
    before = output(base, x)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=6, **kind.theirs, **chosen.theirs), autocast_adapter_dtype=False
    ).eval()
    shake(model, chosen.file_dtype)
    expected = output(model, x)
    assert (expected.float() - before.float()).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "theirs")
    cast_file(tmp_path / "theirs" / "adapter_model.safetensors", chosen.file_dtype)

    adapter = read_adapter(tmp_path / "theirs")
    ours = base_of(kind, dtype)
    inject(ours, adapter)
    close(output(ours, x), expected, dtype)

    write_adapter(extract(ours), tmp_path / "ours", dtype=chosen.file_dtype)
    if chosen.file_dtype is None:
        assert read_adapter(tmp_path / "ours").digest == extract(ours).digest
    close(output(peft_load(base_of(kind, dtype), tmp_path / "ours"), x), expected, dtype)


def make_and_write(model: nn.Module, config: LoRAConfig, folder) -> None:
    inject(model, config)
    write_adapter(extract(model), folder)


@matrix
def test_ours_in_theirs(name, option, tmp_path):
    kind, chosen = KINDS[name], OPTIONS[option](KINDS[name])
    config = LoRAConfig(**(dict(rank=4, alpha=6) | kind.ours | chosen.ours))
    x, dtype = input_of(kind, chosen.base_dtype), chosen.base_dtype
    ours = base_of(kind, dtype)
    before = output(ours, x)
    if option == "bfloat16-base" and option in kind.lacks:
        pytest.skip("see DEEP")
    if option == "lora-bias" and option in kind.lacks:
        with pytest.raises(LoraSmithError, match="bias inside"):
            make_and_write(ours, config, tmp_path / "ours")
        return
    if option.startswith("dora"):
        pytest.skip("DoRA is imported, not made here")
    inject(ours, config)
    assert torch.equal(output(ours, x), before)
    shake(ours, chosen.file_dtype)
    expected = output(ours, x)
    assert (expected.float() - before.float()).abs().max() > 1e-2
    write_adapter(extract(ours), tmp_path / "ours", dtype=chosen.file_dtype)
    if chosen.file_dtype is None:
        assert read_adapter(tmp_path / "ours").digest == extract(ours).digest
    close(output(peft_load(base_of(kind, dtype), tmp_path / "ours"), x), expected, dtype)
