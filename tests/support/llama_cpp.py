"""A base as GGUF, and its logits from llama.cpp: only for tests, and only where llama-cpp-python is installed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Row by row: llama.cpp rotates neighbours (2i, 2i + 1) where Hugging Face rotates (i, i + half)."""
    size = rows.shape[0] // heads
    order = [
        head * size + i + half * (size // 2)
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def write_base(model: Any, path: Path) -> None:
    """A llama model of transformers as a float32 GGUF without a vocabulary."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    state = {name: value.float() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    if not c.tie_word_embeddings:
        writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for layer in range(c.num_hidden_layers):
        for ours, theirs in PARTS.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleave(
                    weight, c.num_attention_heads if theirs == "attn_q" else c.num_key_value_heads
                )
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(library: Any, base: Path, prompts: list[list[int]], adapter: Path | None = None) -> Tensor:
    """Logits after each prompt's last token, (prompts, vocab), float32 arithmetic and cache, one thread."""
    library.llama_backend_init()
    library.llama_log_set(QUIET, ctypes.c_void_p(0))
    model_params = library.llama_model_default_params()
    model_params.use_extra_bufts = False
    model = library.llama_model_load_from_file(str(base).encode(), model_params)
    assert model
    params = library.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = 0
    lora = library.llama_adapter_lora_init(model, str(adapter).encode()) if adapter else None
    assert adapter is None or lora
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = []
    for prompt in prompts:
        context = library.llama_init_from_model(model, params)
        if lora:
            adapters, scales = (library.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
            assert library.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        tokens = (ctypes.c_int32 * len(prompt))(*prompt)
        assert library.llama_decode(context, library.llama_batch_get_one(tokens, len(prompt))) == 0
        rows.append(torch.tensor(library.llama_get_logits_ith(context, -1)[:size]))
        library.llama_free(context)
    library.llama_model_free(model)
    return torch.stack(rows)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def QUIET(level: int, text: bytes, data: Any) -> None: ...
