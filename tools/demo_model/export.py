"""Writes a trained checkpoint as a Hugging Face Llama 4 directory in bfloat16:

`python -m tools.demo_model.export --run build/demo --out python/puna/demo`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from puna.chat_template import DEFAULT_TEMPLATE
from tools.demo_model.model import SHAPES, DemoModel, Shape
from tools.demo_model.tokenizer import special_ids, tokenizer_config


def named_tensors(model: DemoModel) -> dict[str, Tensor]:
    """The model's own weights under the names and in the layouts of transformers."""
    named: dict[str, Tensor] = {
        "language_model.model.embed_tokens.weight": model.embedding.weight,
        "language_model.model.norm.weight": model.norm.weight,
        "language_model.lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.blocks):
        layer = f"language_model.model.layers.{i}."
        named[layer + "input_layernorm.weight"] = block.input_norm.weight
        named[layer + "post_attention_layernorm.weight"] = block.post_norm.weight
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            named[f"{layer}self_attn.{part}.weight"] = getattr(block.attention, part).weight
        experts = block.experts
        gate, up = experts.shared_gate_up.weight.chunk(2, 0)
        ffn = layer + "feed_forward."
        named[ffn + "router.weight"] = experts.router.weight
        named[ffn + "experts.gate_up_proj"] = experts.gate_up
        named[ffn + "experts.down_proj"] = experts.down
        named[ffn + "shared_expert.gate_proj.weight"] = gate
        named[ffn + "shared_expert.up_proj.weight"] = up
        named[ffn + "shared_expert.down_proj.weight"] = experts.shared_down.weight
    vision = model.vision
    named["vision_model.class_embedding"] = vision.class_embedding
    named["vision_model.positional_embedding_vlm"] = vision.positions
    named["vision_model.patch_embedding.linear.weight"] = vision.patch_embedding.weight
    norms = {"layernorm_pre": vision.pre_norm, "layernorm_post": vision.post_norm}
    linears = {}
    for i, block in enumerate(vision.blocks):
        layer = f"model.layers.{i}."
        norms[layer + "input_layernorm"] = block.input_norm
        norms[layer + "post_attention_layernorm"] = block.post_norm
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linears[f"{layer}self_attn.{part}"] = getattr(block, part)
        linears[layer + "mlp.fc1"], linears[layer + "mlp.fc2"] = block.fc1, block.fc2
    for name, module in (norms | linears).items():
        named[f"vision_model.{name}.weight"] = module.weight
        named[f"vision_model.{name}.bias"] = module.bias
    named["vision_model.vision_adapter.mlp.fc1.weight"] = vision.adapter_fc1.weight
    named["vision_model.vision_adapter.mlp.fc2.weight"] = vision.adapter_fc2.weight
    named["multi_modal_projector.linear_1.weight"] = vision.projector.weight
    return {name: tensor.detach() for name, tensor in named.items()}


def config(shape: Shape) -> dict[str, object]:
    """config.json, as transformers 5 writes it."""
    special = special_ids()
    text = {
        "model_type": "llama4_text",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "intermediate_size_mlp": 2 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 10485760,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 1,
        "num_local_experts": shape.experts,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layer_interval": shape.nope_interval,
        "attention_chunk_size": shape.chunk,
        "attn_temperature_tuning": True,
        "floor_scale": shape.floor_scale,
        "attn_scale": shape.attn_scale,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "bos_token_id": special["<|begin_of_text|>"],
        "eos_token_id": [special["<|end_of_text|>"], special["<|eom|>"], special["<|eot|>"]],
        "pad_token_id": special["<|finetune_right_pad|>"],
    }
    vision = {
        "model_type": "llama4_vision_model",
        "hidden_size": shape.vision_hidden,
        "hidden_act": "gelu",
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "num_channels": 3,
        "intermediate_size": 4 * shape.vision_hidden,
        "vision_output_dim": shape.vision_output,
        "projector_input_dim": shape.vision_output,
        "projector_output_dim": shape.vision_output,
        "image_size": shape.image_size,
        "patch_size": shape.patch,
        "norm_eps": 1e-5,
        "pixel_shuffle_ratio": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "dtype": "bfloat16",
        "image_token_index": special["<|patch|>"],
        "boi_token_index": special["<|image_start|>"],
        "eoi_token_index": special["<|image_end|>"],
        "text_config": text,
        "vision_config": vision,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="xs")
    parser.add_argument("--run", type=Path, required=True, help="the --out of training")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    special = special_ids()
    model = DemoModel(shape, special["<|patch|>"])
    state = torch.load(options.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.bfloat16().contiguous() for name, value in named_tensors(model).items()}
    weights = save(weights, metadata={"format": "pt"})
    (options.out / "model.safetensors").write_bytes(weights)
    settings = config(shape)
    generation = {
        "bos_token_id": special["<|begin_of_text|>"],
        "eos_token_id": settings["text_config"]["eos_token_id"],  # type: ignore[index]
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    contents = {
        "config.json": settings,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, content in contents.items():
        (options.out / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copy(options.run / "tokenizer.model", options.out)
    (options.out / "chat_template.jinja").write_text(DEFAULT_TEMPLATE)


if __name__ == "__main__":
    main()
