"""Activations in a file, layers in theirs: the same bits, and less in memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasmith.bases import load_base
from lorasmith.errors import ConfigError, OutputError
from lorasmith.inject import inject
from lorasmith.lora import LoRAConfig
from lorasmith.planning import Computing, Pass, Trained, decoder_of, saved_bytes
from lorasmith.train import TrainConfig, train
from lorasmith.train import offload as room
from lorasmith.train.offload import ActivationFile, activations_away, layers_away
from tests.support.base import write_tiny_base
from tests.support.models import tiny_causal_lm, tokens

RECORDS = [{"prompt": f"{c}{c} is", "completion": f" {c.upper()}{i}."} for i, c in enumerate("abcdefgh")]
SETTINGS = TrainConfig(lr=0.02, batch_size=4, epochs=4, seed=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "SMALLEST_BYTES", 1)
    monkeypatch.setenv("LORASMITH_HOME", str(tmp_path / "home"))


def adapter_of(place: Path, out: Path, settings: TrainConfig, **options) -> bytes:
    base = load_base(place, dtype="fp32")
    train(base, RECORDS, LoRAConfig(rank=2, dropout=0.1), settings, out=out, quiet=True, **options)
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kernels", ["block", "plain"])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_the_adapter_is_the_same_to_the_bit(place, tmp_path, kernels, recompute):
    settings = replace(SETTINGS, kernels=kernels, recompute=recompute)
    wanted = adapter_of(place, tmp_path / "plain", settings)
    for offload in ("activations", "weights", "all"):
        found = adapter_of(place, tmp_path / offload, replace(settings, offload=offload))
        assert found == wanted, offload


def test_a_run_may_go_on_without_what_it_began_with(place, tmp_path):
    wanted = adapter_of(place, tmp_path / "whole", replace(SETTINGS, save_every=1))
    stopped = replace(SETTINGS, save_every=1, offload="all")

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapter_of(place, tmp_path / "run", stopped, on_step=stop)
    assert adapter_of(place, tmp_path / "run", replace(stopped, offload="none"), resume=True) == wanted


def test_activations_are_in_the_file_and_its_space_is_used_again(tmp_path):
    model = tiny_causal_lm()
    inject(model, LoRAConfig(rank=2))
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    with activations_away(model, tmp_path) as file:
        sizes = []
        for _ in range(2):
            loss = model(tokens()).logits.sum()
            kept, end = file.kept, file.end
            assert kept > 10
            assert not _tensors_of(loss.grad_fn, own)
            loss.backward()
            del loss
            assert (file.kept, file.end) == (0, 0)
            sizes.append((kept, end))
        assert sizes[0] == sizes[1]
    assert not list(tmp_path.iterdir())


def _tensors_of(node, own: set[int]) -> list[torch.Tensor]:
    """Tensors, not the model's own, that autograd's nodes hold as such."""
    seen, found, waiting = set(), [], [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_raw_saved"):
                saved = getattr(node, name)
                for one in saved if isinstance(saved, (list, tuple)) else [saved]:
                    found += [one] if isinstance(getattr(one, "data", None), torch.Tensor) else []
        waiting += [n for n, _ in node.next_functions]
    return [t for t in found if t.data.untyped_storage().data_ptr() not in own]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(2, 0, 1)[:, :1],
        lambda x: x[..., ::2],
        lambda x: x[:, :1].expand(-1, 5, -1),
        lambda x: x.bfloat16(),
        lambda x: x[:0],
    ],
)
def test_any_layout_comes_back_as_it_was(tmp_path, make):
    x = make(torch.randn(3, 4, 6)).detach()
    saved = []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x)
            return x * scale

        @staticmethod
        def backward(ctx, g):
            saved.extend(ctx.saved_tensors)
            return None, g.sum()

    with activations_away(tiny_causal_lm(), tmp_path):
        Keeps.apply(x, torch.ones((), requires_grad=True)).sum().backward()
    assert torch.equal(saved[0], x)
    assert saved[0].stride() == x.stride()


def resident_kib(file: Path) -> int:
    """Of the mapping of one file, in this process."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(file) in block.splitlines()[0]:
            return int(re.search(r"Rss:\s+(\d+)", block)[1])
    raise AssertionError(f"{file} is not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux tells what is resident")
def test_layers_are_in_memory_only_while_they_compute(tmp_path):
    folder = write_tiny_base(tmp_path / "wide", hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    model = load_base(folder, dtype="fp32").model
    inject(model, LoRAConfig(rank=2))
    file, layers = folder / "model.safetensors", list(model.model.layers)
    seen: list[int] = []
    model(tokens()).logits.sum().backward()
    whole = resident_kib(file)
    of_layers = (
        sum(p.nbytes for layer in layers for n, p in layer.named_parameters() if "lora_" not in n) // 1024
    )
    with layers_away(model) as size:
        assert size // 1024 == of_layers
        model(tokens())  # everything leaves
        probes = [m.register_forward_pre_hook(lambda *_: seen.append(resident_kib(file))) for m in layers]
        model(tokens()).logits.sum().backward()
        seen.append(resident_kib(file))
        for probe in probes:
            probe.remove()
    # A fault brings some pages around it, so a layer takes somewhat more than its size.
    assert whole > 0.9 * of_layers
    assert max(seen) < whole - of_layers / 2


def test_what_is_no_page_of_a_file_is_refused(place, tmp_path):
    with pytest.raises(ConfigError, match=r'offload="weights".*dtype of its file'):
        layers_away(tiny_causal_lm()).__enter__()
    base = load_base(place, dtype="fp32", quantize="nf4")
    with pytest.raises(ConfigError, match="without --quantize"):
        train(
            base,
            RECORDS,
            LoRAConfig(rank=2),
            replace(SETTINGS, offload="all"),
            out=tmp_path / "run",
            quiet=True,
        )
    full = replace(SETTINGS, offload="all", method="full")
    with pytest.raises(ConfigError, match='offload="all" reads frozen weights again'):
        train(load_base(place, dtype="fp32"), RECORDS, None, full, out=tmp_path / "full", quiet=True)
    with pytest.raises(ConfigError, match="offload='disk'"):
        TrainConfig(offload="disk")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="LORASMITH_HOME"):
        ActivationFile(tmp_path / "file" / "offload")


def test_planning_keeps_one_layer_of_what_waits_elsewhere():
    decoder = decoder_of(tiny_causal_lm(num_hidden_layers=8))
    trained, p = Trained(dict.fromkeys(decoder.linears, 2)), Pass(4, 64, 100)
    here, away = (
        saved_bytes(decoder, trained, p, Computing(True, True, keeps_activations=k)) for k in (True, False)
    )
    assert away < here / 4
