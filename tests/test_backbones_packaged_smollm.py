"""GGUF -> transformers folder, on a one-block Llama written with the `gguf` package (extra `demo`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from revelio.backbones import packaged_smollm

gguf: Any = pytest.importorskip("gguf")


def as_eight_bits(weight: np.ndarray) -> np.ndarray:
    """Q8_0 by its definition: every 32 numbers share a half-precision scale of their largest / 127."""
    blocks = weight.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return (np.round(blocks / scale) * scale.astype(np.float16)).reshape(weight.shape)


def write_gguf(model: Any, path: Path) -> None:
    """A one-block Llama in GGUF: rotary halves interleaved, as llama.cpp keeps q and k."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abcdefghij", "Ġ", "ĠĠ"]
    words += [f"<unused{i}>" for i in range(config.vocab_size - len(words))]
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    block = "model.layers.0."

    def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
        halves = weight.reshape(heads, 2, -1, weight.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))

    attention = block + "self_attn."
    tensors = {
        "token_embd": state["model.embed_tokens.weight"],
        "output_norm": state["model.norm.weight"],
        "blk.0.attn_norm": state[block + "input_layernorm.weight"],
        "blk.0.ffn_norm": state[block + "post_attention_layernorm.weight"],
        "blk.0.attn_q": interleaved(state[attention + "q_proj.weight"], config.num_attention_heads),
        "blk.0.attn_k": interleaved(state[attention + "k_proj.weight"], config.num_key_value_heads),
        "blk.0.attn_v": state[attention + "v_proj.weight"],
        "blk.0.attn_output": state[attention + "o_proj.weight"],
        "blk.0.ffn_gate": state[block + "mlp.gate_proj.weight"],
        "blk.0.ffn_up": state[block + "mlp.up_proj.weight"],
        "blk.0.ffn_down": state[block + "mlp.down_proj.weight"],
    }
    for name, array in tensors.items():
        if name == "blk.0.ffn_up":
            kind = gguf.GGMLQuantizationType.Q8_0
            quantised = gguf.quants.quantize(array, kind)
            writer.add_tensor(f"{name}.weight", quantised, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_converted_gguf_is_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        source = LlamaForCausalLM(config).eval()
    write_gguf(source, tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    packaged_smollm.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert LlamaConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    tokens = torch.tensor([[1, 5, 9, 20, 3]])
    up: Any = source.model.layers[0].mlp.up_proj
    with torch.no_grad():
        up.weight.copy_(torch.from_numpy(as_eight_bits(up.weight.numpy().copy())))
        for parameter in source.parameters():
            parameter.copy_(parameter.bfloat16())
        assert torch.equal(found(tokens).logits, source(tokens).logits)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    words = tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"])
    assert words == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
