"""A GGUF LoRA file, as llama.cpp's `--lora` reads it.

llama.cpp computes y + (alpha / rank of the tensor) · lora_b @ (lora_a @ x) with its own tensor names. Its
converter reorders the rows of q and k of Llama-like models, so the rows of B are reordered alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasmith.errors import AdapterFileError, OutputError
from lorasmith.formats import sidecar
from lorasmith.formats.portable import Folded, make_portable
from lorasmith.formats.publish import publish_directory
from lorasmith.lora import Adapter

GGUF_NAME = "adapter.gguf"
GGUF_FILE_NAMES = (GGUF_NAME, sidecar.FILE_NAME)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """llama.cpp's name of an architecture, and whether its converter permutes q and k."""

    name: str
    permutes: bool = False


# Families whose embeddings are tied unless config.json says otherwise.
_TIED = ("gpt2", "gemma")
# convert_hf_to_gguf.py of 2026-11: architectures whose linear weights it renames one by one, and no more.
_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("llama", permutes=True),
    "MistralForCausalLM": _Architecture("llama", permutes=True),
    "Qwen2ForCausalLM": _Architecture("qwen2"),
    "Qwen3ForCausalLM": _Architecture("qwen3"),
    "GemmaForCausalLM": _Architecture("gemma"),
    "Gemma2ForCausalLM": _Architecture("gemma2"),
    "Gemma3ForCausalLM": _Architecture("gemma3"),
    "Phi3ForCausalLM": _Architecture("phi3"),
    "GPT2LMHeadModel": _Architecture("gpt2"),
}


def write_gguf(adapter: Adapter, path: str | Path, base_config: Mapping[str, Any]) -> Folded:
    """Write `adapter.gguf` and its sidecar into the directory `path`, at once or not at all.

    Scaling is folded into B, ranks are padded, alpha is the rank; tensors are float32.

    Args:
        base_config: the base's `config.json`: architecture, layers, heads.

    Raises:
        AdapterFileError: llama.cpp has no place for the architecture or a module; biases.
        OutputError: `path` cannot be written, or holds something else.
    """
    path = Path(path)
    architecture = _architecture(base_config)
    folded = make_portable(adapter)
    tensors = gguf_tensors(folded.adapter, base_config)

    def fill(directory: Path) -> None:
        _write(directory / GGUF_NAME, architecture.name, folded.adapter, tensors)
        digest = hashlib.sha256((directory / GGUF_NAME).read_bytes()).hexdigest()
        note = sidecar.sidecar_text(folded.adapter.digest, adapter.provenance | {"file_sha256": digest})
        (directory / sidecar.FILE_NAME).write_text(note, encoding="utf-8")

    publish_directory(path, fill, replaceable=GGUF_FILE_NAMES)
    return folded


def gguf_tensors(adapter: Adapter, base_config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """llama.cpp's tensor name → (lora_a (rank, in), lora_b (out, rank)), float32.

    Raises:
        AdapterFileError: with every module that has no name there.
    """
    names = _names(adapter, base_config)
    permutes = _architecture(base_config).permutes
    tensors = {}
    for path, f in adapter.factors.items():
        B = f.B.detach().cpu().float()
        if permutes and (heads := _heads(path, base_config)):
            B = permute_rows(B, heads)
        tensors[names[path]] = (f.A.detach().cpu().float().contiguous(), B.contiguous())
    return tensors


def permute_rows(B: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to pairs: Hugging Face's rotary layout to llama.cpp's.

    Raises:
        AdapterFileError: the rows do not divide into heads of even size.
    """
    if B.shape[0] % (2 * heads):
        raise AdapterFileError(
            f"export --to gguf: {B.shape[0]} rows of q or k do not divide into {heads} heads of even size; "
            "is this the base that the adapter was trained on?"
        )
    halves = B.reshape(heads, 2, B.shape[0] // heads // 2, B.shape[1])
    return halves.transpose(1, 2).reshape(B.shape)


def _architecture(base_config: Mapping[str, Any]) -> _Architecture:
    listed = base_config.get("architectures") or [None]
    found = _ARCHITECTURES.get(listed[0]) if isinstance(listed, list) else None
    if found is None:
        raise AdapterFileError(
            f"export --to gguf: the base is {listed!r:.80}; known here are {', '.join(_ARCHITECTURES)}.\n"
            "  Others may rearrange weights in llama.cpp's converter: export with --to portable and use "
            "its convert_lora_to_gguf.py."
        )
    return found


def _names(adapter: Adapter, base_config: Mapping[str, Any]) -> dict[str, str]:
    import gguf

    wanted = _architecture(base_config).name
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    table = gguf.get_tensor_name_map(architecture, _count(base_config, "num_hidden_layers", "n_layer"))
    found = {path: table.get_name(f"{path}.weight", try_suffixes=(".weight",)) for path in adapter.factors}
    faults = [
        f"{path} has no counterpart in llama.cpp's {wanted}" for path, name in found.items() if not name
    ]
    if base_config.get("tie_word_embeddings", wanted.startswith(_TIED)) and "output.weight" in found.values():
        faults.append(
            "lm_head is tied to the embeddings in this base, and llama.cpp then has no tensor for it"
        )
    if faults:
        more = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise AdapterFileError("export --to gguf:\n  " + "\n  ".join(faults[:10]) + more)
    return {path: str(name) for path, name in found.items()}


def _heads(path: str, base_config: Mapping[str, Any]) -> int:
    """How many heads the rows of this module belong to; 0 where they are not permuted."""
    keys = {"q_proj": ("num_attention_heads",), "k_proj": ("num_key_value_heads", "num_attention_heads")}
    wanted = keys.get(path.rpartition(".")[2])
    return 0 if wanted is None else _count(base_config, *wanted)


def _count(base_config: Mapping[str, Any], *keys: str) -> int:
    """The first of these numbers that the base's config holds.

    Raises:
        AdapterFileError: none of them is there as a positive whole number.
    """
    values = [base_config[key] for key in keys if base_config.get(key) is not None]
    if not values or type(values[0]) is not int or values[0] < 1:
        raise AdapterFileError(
            f"export --to gguf: the base's config.json gives no whole number as {' or '.join(keys)}"
        )
    return int(values[0])


def _write(
    file: Path, architecture: str, adapter: Adapter, tensors: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.config.rank))
        writer.add_string("lorasmith.content_digest", adapter.digest)
        for name, (A, B) in tensors.items():
            writer.add_tensor(f"{name}.lora_a", A.numpy())
            writer.add_tensor(f"{name}.lora_b", B.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error}") from error
    finally:
        writer.close()
