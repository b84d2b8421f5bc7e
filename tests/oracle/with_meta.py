"""The tiny models in Meta's own llama-models package. Needs torch, llama-models and pydantic.

Meta's code is written for several GPUs. On one CPU each of the parallel layers that it takes from
fairscale is torch's plain layer, so plain layers stand in for them and fairscale is not needed.
Only whole prompts can be compared: its decoding has no chunk mask.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from .reference import moe_layers, rope_layers


def _plain(kind: type[nn.Module]) -> Any:
    """A layer of fairscale's name and arguments on one device."""

    def make(inputs: int, outputs: int, bias: bool = True, **_: Any) -> nn.Module:
        return kind(inputs, outputs) if kind is nn.Embedding else kind(inputs, outputs, bias=bias)

    return make


def _single_device() -> dict[str, types.ModuleType]:
    """What Meta's code imports of fairscale, for a world of one device."""
    root = "fairscale.nn.model_parallel"
    layers = types.ModuleType(f"{root}.layers")
    vars(layers).update(
        ColumnParallelLinear=_plain(nn.Linear),
        RowParallelLinear=_plain(nn.Linear),
        VocabParallelEmbedding=_plain(nn.Embedding),
    )
    initialize = types.ModuleType(f"{root}.initialize")
    vars(initialize)["get_model_parallel_world_size"] = lambda: 1
    mappings = types.ModuleType(f"{root}.mappings")
    vars(mappings)["reduce_from_model_parallel_region"] = lambda x: x
    # `import a.b.c as name` reads the attributes of the parents.
    parallel = types.ModuleType(root)
    parallel.initialize = initialize  # type: ignore[attr-defined]
    neural = types.ModuleType("fairscale.nn")
    neural.model_parallel = parallel  # type: ignore[attr-defined]
    fairscale = types.ModuleType("fairscale")
    fairscale.nn = neural  # type: ignore[attr-defined]
    modules = (fairscale, neural, parallel, layers, initialize, mappings)
    return {module.__name__: module for module in modules}


_stand_ins = _single_device()
_hidden = {name: sys.modules.pop(name) for name in _stand_ins if name in sys.modules}
sys.modules.update(_stand_ins)
try:
    from llama_models.llama4.args import ModelArgs, MoEArgs, Size, VisionArgs
    from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput
    from llama_models.llama4.model import Transformer
    from llama_models.llama4.vision import encoder

    importlib.import_module("llama_models.llama4.vision.embedding")  # Transformer asks for it later
finally:
    for _name in _stand_ins:
        del sys.modules[_name]
    sys.modules.update(_hidden)

_TEXT_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.q_proj.": ".attention.wq.",
    ".self_attn.k_proj.": ".attention.wk.",
    ".self_attn.v_proj.": ".attention.wv.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
    "model.layers.": "layers.",
}
_VISION_NAMES = {
    "multi_modal_projector.linear_1.": "vision_projection.",
    "vision_model.vision_adapter.mlp.fc1.": "vision_embeddings.vision_adapter.mlp.c_fc.",
    "vision_model.vision_adapter.mlp.fc2.": "vision_embeddings.vision_adapter.mlp.c_proj.",
    "vision_model.model.layers.": "vision_model.transformer.resblocks.",
    "vision_model.patch_embedding.linear.": "vision_model.conv1._linear.",
    ".layernorm_pre.": ".ln_pre.",
    ".layernorm_post.": ".ln_post.",
    ".input_layernorm.": ".ln_1.",
    ".post_attention_layernorm.": ".ln_2.",
    ".self_attn.q_proj.": ".attn.wq.",
    ".self_attn.k_proj.": ".attn.wk.",
    ".self_attn.v_proj.": ".attn.wv.",
    ".self_attn.o_proj.": ".attn.wo.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    "vision_model.": "vision_embeddings.vision_encoder.",
}


def _state(tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The tensors under Meta's names and in Meta's layout."""
    state = {}
    for name, values in tensors.items():
        tensor = torch.from_numpy(values)
        text = name.startswith(("language_model.", "model.", "lm_head."))
        meta = name.removeprefix("language_model.")
        for theirs, metas in (_TEXT_NAMES if text else _VISION_NAMES).items():
            meta = meta.replace(theirs, metas)
        if meta.endswith("router.weight"):
            state[meta.replace("router.weight", "router_DE")] = tensor.T
        elif meta.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=-1)
            state[meta.replace("gate_up_proj", "w1")] = gate
            state[meta.replace("gate_up_proj", "w3")] = up
        else:
            state[meta.replace("experts.down_proj", "experts.w2")] = tensor
    return state


def _arguments(config: Mapping[str, Any], length: int) -> ModelArgs:
    text = config.get("text_config", config)
    layers, rope = text["num_hidden_layers"], text["rope_parameters"]
    scaled = rope["rope_type"] == "llama3"
    # Meta's formula has these two built in.
    assert not scaled or rope["original_max_position_embeddings"] == 8192
    assert not scaled or rope["low_freq_factor"] == 1
    interval = text["no_rope_layer_interval"] if not all(rope_layers(text)) else None
    experts = moe_layers(text)
    step = experts[0] + 1 if experts else 0
    assert experts == (list(range(step - 1, layers, step)) if step else [])
    vision = config.get("vision_config")
    return ModelArgs(
        dim=text["hidden_size"],
        n_layers=layers,
        n_heads=text["num_attention_heads"],
        n_kv_heads=text["num_key_value_heads"],
        vocab_size=text["vocab_size"],
        # Meta computes the widths as 8/3 * dim * ffn_dim_multiplier, rounded up to a multiple, and
        # half of that for experts.
        multiple_of=text["intermediate_size"],
        ffn_dim_multiplier=0.5,
        ffn_exp=4.0,
        norm_eps=text["rms_norm_eps"],
        attention_chunk_size=text["attention_chunk_size"],
        rope_theta=rope["rope_theta"],
        use_scaled_rope=scaled,
        rope_scaling_factor=rope.get("factor"),
        rope_high_freq_factor=rope.get("high_freq_factor"),
        nope_layer_interval=interval,
        use_qk_norm=text["use_qk_norm"],
        attn_temperature_tuning=bool(text["attn_temperature_tuning"]),
        floor_scale=text["floor_scale"],
        attn_scale=text["attn_scale"],
        moe_args=MoEArgs(
            num_experts=text["num_local_experts"],
            top_k=text["num_experts_per_tok"],
            interleave_moe_layer_step=step,
        )
        if experts
        else None,
        vision_args=VisionArgs(
            image_size=Size(height=vision["image_size"], width=vision["image_size"]),
            patch_size=Size(height=vision["patch_size"], width=vision["patch_size"]),
            dim=vision["hidden_size"],
            n_layers=vision["num_hidden_layers"],
            n_heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
            output_dim=vision["vision_output_dim"],
            pixel_shuffle_ratio=vision["pixel_shuffle_ratio"],
        )
        if vision
        else None,
        max_batch_size=1,
        max_seq_len=length,
    )


@torch.inference_mode()
def logits(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    pixel_values: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [tokens, vocabulary], the whole prompt in one pass."""
    torch.set_num_threads(1)
    here = mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor)
    # Its vision layers keep caches too, of a size that is built in.
    with here, mock.patch.object(encoder, "ENCODER_MAX_BATCH_SIZE", 8):
        model = Transformer(_arguments(config, len(tokens)))
    model = model.float().eval()  # Meta makes the vision encoder in bfloat16
    model.load_state_dict(_state(tensors), strict=True)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    images = None
    if pixel_values is not None:
        vision = model.vision_embeddings
        tiles = torch.from_numpy(pixel_values)[:, None]
        rows = vision.vision_adapter(vision.vision_encoder(tiles)).flatten(0, 1)
        places = ids == config["image_token_index"]
        embedding = torch.zeros(1, len(tokens), rows.shape[-1])
        embedding[places] = rows
        images = MaskedEmbedding(embedding, places[..., None])
    return model(TransformerInput(ids, 0, images)).logits[0].numpy()
