"""Stands in for llama.cpp's convert_hf_to_gguf.py: the same arguments, a real GGUF file, but of Qwen3 alone."""

import json
import sys
from pathlib import Path

import gguf
from safetensors.torch import load_file

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def name_of(tensor):
    if tensor in ENDS:
        return ENDS[tensor]
    _, _, layer, rest = tensor.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


folder, (outfile, outtype) = Path(sys.argv[1]), (sys.argv[3], sys.argv[5])
config = json.loads((folder / "config.json").read_text("utf-8"))
if config["model_type"] != "qwen3":
    sys.exit(f"Model {config['architectures'][0]} is not supported")
writer = gguf.GGUFWriter(outfile, "qwen3")
writer.add_name("stand-in")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_key_length(config["head_dim"])
writer.add_value_length(config["head_dim"])
writer.add_rope_freq_base(config["rope_theta"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
kind = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
for file in sorted(folder.glob("*.safetensors")):
    for name, tensor in load_file(file).items():
        own = kind[outtype] if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name_of(name), gguf.quants.quantize(tensor.float().numpy(), own), raw_dtype=own)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
