"""A tiny random model for every class of experts in transformers."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from support.model_zoo import randomise_vectors
from transformers import PreTrainedConfig, PreTrainedModel

VERSION = (5, 24)  # of transformers, whose classes are listed
VOCAB = 64

# Sizes of text models, by all the names that configurations have for them. A configuration takes
# those that it has fields for; a family's own settings come on top.
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "initializer_range": 0.2, "sliding_window": 8,
    "projector_hidden_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    # experts and routers
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24,
    "shared_experts_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    # latent attention, and its index: with few heads many keys would tie at a score of zero
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 8,
    # linear attention, state spaces and hyper-connections
    "linear_conv_kernel_dim": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": 8,
    "linear_num_heads": 4, "short_conv_kernel_size": 3, "hc_mult": 2, "hc_sinkhorn_iters": 2,
}  # fmt: skip
# The same for encoders of pictures and sound, which text alone never reaches.
ENCODER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_heads": 2, "depth": 1, "out_hidden_size": 32, "image_size": 16, "patch_size": 4,
    "embed_dim": 16, "mlp_dim": 16, "num_position_embeddings": 16, "d_model": 16,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32,
    "downsample_hidden_size": 16, "text_hidden_size": 32, "projection_intermediate_size": 16,
    "projection_hidden_dim": 16, "output_channels": 16, "downsample_channels": [16, 32],
    "max_image_size": 16, "mlp_ratio": 1.0, "position_embedding_size": 16,
    "num_key_value_heads": 2, "head_dim": 8, "adapter_in_dim": 16, "adapter_out_dim": 32,
    "adapter_input_size": 16, "mlp_layer_types": ["sparse"], "num_local_experts": 4,
    "moe_intermediate_size": 24, "n_mel_bins": 4, "mel_vocab_size": 4, "projector_hidden_size": 16,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED = {"layer_types": ["linear_attention", "indexed_attention"]}
HYBRID = {"layer_types": ["hybrid_sliding", "hybrid"]}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
INKLING = {
    "d_rel": 4, "rel_extent": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "sliding_window_size": 8,
}  # fmt: skip


def _mrope(*sections: int) -> dict:
    """Return settings of a rotary embedding in three dimensions."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(sections),
            "partial_rotary_factor": 1.0,
        }
    }


@dataclass(frozen=True)
class Family:
    """A class of experts, and a tiny model that has it.

    Attributes:
        experts: the class of the experts in transformers.
        model: the class of the model.
        settings: of the configuration, on top of ``TEXT``; those of a part are a dict of its own.
        special: what sets its layers apart from Mixtral's, if anything.
        takes_ids: False: its forward takes embeddings alone.
    """

    experts: str
    model: str
    settings: dict = field(default_factory=dict)
    special: str = ""
    takes_ids: bool = True

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.model)


FAMILIES = {
    "afmoe": Family("AfmoeExperts", "AfmoeForCausalLM", SLIDING),
    "aria": Family("AriaExperts", "AriaTextForCausalLM"),
    "axk1": Family("AXK1Experts", "AXK1ForCausalLM", special="latent attention"),
    "axk2": Family("AXK2Experts", "AXK2ForCausalLM", special="latent attention with an index"),
    "bailing_hybrid": Family(
        "BailingHybridExperts",
        "BailingHybridForCausalLM",
        LINEAR | DENSE_FIRST,
        "linear and latent attention",
    ),
    "beam": Family("BeamExperts", "BeamForCausalLM", SLIDING | DENSE_FIRST),
    "cohere2_moe": Family("Cohere2MoeExperts", "Cohere2MoeForCausalLM", SLIDING),
    "deepseek_ocr2": Family(
        "DeepseekOcr2TextExperts",
        "DeepseekOcr2ForConditionalGeneration",
        {"text_config": DENSE_FIRST},
        "multimodal",
    ),
    "deepseek_v2": Family("DeepseekV2Experts", "DeepseekV2ForCausalLM", special="latent attention"),
    "deepseek_v3": Family("DeepseekV3Experts", "DeepseekV3ForCausalLM", special="latent attention"),
    "deepseek_v32": Family(
        "DeepseekV32Experts", "DeepseekV32ForCausalLM", special="latent attention with an index"
    ),
    "deepseek_v4": Family(
        "DeepseekV4Experts",
        "DeepseekV4ForCausalLM",
        {
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "mlp_layer_types": ["hash_moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "o_groups": 2,
            "o_lora_rank": 8,
        },
        "compressed attention, hyper-connections, a router by token id",
    ),
    "diffusion_gemma": Family(
        "DiffusionGemmaTextExperts",
        "DiffusionGemmaForBlockDiffusion",
        {
            "text_config": SLIDING | {"global_head_dim": 16},
            "canvas_length": 12,
        },
        "diffusion: the decoder sees a random canvas, not the ids",
    ),
    "dots1": Family("Dots1Experts", "Dots1ForCausalLM"),
    "dots3_note": Family(
        "Dots3NoteExperts", "Dots3NoteForCausalLM", special="latent attention with an index"
    ),
    "ernie4_5_moe": Family("Ernie4_5_MoeExperts", "Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeMoeExperts",
        "Ernie4_5_VLMoeForConditionalGeneration",
        {"text_config": DENSE_FIRST | {"moe_intermediate_size": [24, 24]} | _mrope(1, 1, 2)},
        "multimodal, with experts of its own for pictures",
    ),
    "exaone_moe": Family("ExaoneMoeExperts", "ExaoneMoeForCausalLM", SLIDING),
    "flex_olmo": Family("FlexOlmoExperts", "FlexOlmoForCausalLM"),
    "flint": Family("FlintExperts", "FlintForCausalLM", SLIDING | {"mlp_only_layers": []}),
    "gemma4": Family(
        "Gemma4TextExperts",
        "Gemma4ForCausalLM",
        SLIDING
        | {
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "global_head_dim": 16,
        },
        "a second embedding table, for each layer",
    ),
    "glm4_moe": Family("Glm4MoeExperts", "Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteExperts", "Glm4MoeLiteForCausalLM", special="latent attention"
    ),
    "glm4v_moe": Family(
        "Glm4vMoeTextExperts",
        "Glm4vMoeForConditionalGeneration",
        {"text_config": _mrope(1, 1, 2)},
        "multimodal",
    ),
    "glm5_next": Family(
        "Glm5NextTextExperts",
        "Glm5NextForConditionalGeneration",
        {"text_config": INDEXED | SPARSE | {"index_kpool": 2, "qk_rope_head_dim": 0}},
        "multimodal; linear and latent attention, hyper-connections",
    ),
    "glm_moe_dsa": Family(
        "GlmMoeDsaExperts", "GlmMoeDsaForCausalLM", special="latent attention with an index"
    ),
    "gpt_oss": Family("GptOssExperts", "GptOssForCausalLM", SLIDING),
    "granitemoe": Family("GraniteMoeExperts", "GraniteMoeForCausalLM"),
    "granitemoe_swa": Family("GraniteMoeSWAExperts", "GraniteMoeSWAForCausalLM", SLIDING),
    "granitemoehybrid": Family(
        "GraniteMoeHybridExperts",
        "GraniteMoeHybridForCausalLM",
        LINEAR | {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
        "Mamba layers",
    ),
    "granitemoeshared": Family("GraniteMoeSharedExperts", "GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Experts", "HunYuanMoEV1ForCausalLM"),
    "hy_v3": Family("HYV3Experts", "HYV3ForCausalLM"),
    "hy_v4": Family(
        "HYV4Experts",
        "HYV4ForCausalLM",
        special="latent attention with an index, hyper-connections",
    ),
    "hy_v4_vl": Family(
        "HYV4VLExperts",
        "HYV4VLForConditionalGeneration",
        {"text_config": _mrope(2, 1, 1)},
        "multimodal; latent attention with an index, hyper-connections",
    ),
    "inkling": Family(
        "InklingExperts",
        "InklingForCausalLM",
        INKLING | HYBRID | DENSE_FIRST | {"logits_mup_width_multiplier": 1.0},
        "short convolutions",
    ),
    "inkling2": Family(
        "Inkling2Experts",
        "Inkling2ForCausalLM",
        INKLING | HYBRID | {"n_layers_per_attn_res_block": 1},
        "short convolutions, attention over layers",
    ),
    "inkling2_loop": Family(
        "Inkling2LoopExperts",
        "Inkling2LoopForCausalLM",
        INKLING
        | {
            "num_hidden_layers": 3,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
            "loop_num_passes": 2,
            "loop_gate_rank": 4,
        },
        "short convolutions, attention over layers, layers that run several times",
    ),
    "jamba": Family(
        "JambaExperts",
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "Mamba layers",
    ),
    "kimi_linear": Family(
        "KimiLinearExperts",
        "KimiLinearForCausalLM",
        LINEAR | SPARSE,
        "linear and latent attention",
    ),
    "kolibri1": Family("Kolibri1Experts", "Kolibri1ForCausalLM", SLIDING),
    "laguna": Family("LagunaExperts", "LagunaForCausalLM", SLIDING),
    "lara_mini": Family("LaraMiniExperts", "LaraMiniForCausalLM", special="linear attention"),
    "lfm2_moe": Family(
        "Lfm2MoeExperts",
        "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
        "convolutions in place of attention",
    ),
    "mellum": Family("MellumExperts", "MellumForCausalLM", SLIDING),
    "mimo_v2_flash": Family("MiMoV2FlashExperts", "MiMoV2FlashForCausalLM", SLIDING),
    "minimax": Family("MiniMaxExperts", "MiniMaxForCausalLM", LINEAR, "linear attention"),
    "minimax_m2": Family("MiniMaxM2Experts", "MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Family(
        "MiniMaxM3VLExperts",
        "MiniMaxM3VLForCausalLM",
        {
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_n_heads": 2,
            "index_block_size": 2,
            "index_topk_blocks": 2,
            "rotary_dim": 4,
        },
        "attention with an index",
    ),
    "mistral4": Family("Mistral4Experts", "Mistral4ForCausalLM", special="latent attention"),
    "mistral_large4": Family(
        "MistralLarge4TextExperts",
        "MistralLarge4ForConditionalGeneration",
        special="multimodal; latent attention with an index",
    ),
    "mixtral": Family("MixtralExperts", "MixtralForCausalLM"),
    "muse_spark": Family(
        "MuseSparkExperts",
        "MuseSparkForConditionalGeneration",
        {
            "text_config": SLIDING | SPARSE | {"moe_hidden_size": 16},
            "audio_config": {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1]},
            "out_hidden_size": 16,
            "projector_hidden_size": 16,
        },
        "multimodal; experts on rows of another width",
    ),
    "nemotron_h": Family(
        "NemotronHExperts",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        "Mamba, attention and experts in layers of their own",
    ),
    "olmoe": Family("OlmoeExperts", "OlmoeForCausalLM"),
    "openai_privacy_filter": Family(
        "OpenAIPrivacyFilterExperts",
        "OpenAIPrivacyFilterForTokenClassification",
        special="labels tokens; no language model has these experts",
    ),
    "phimoe": Family("PhimoeExperts", "PhimoeForCausalLM"),
    "qwen2_moe": Family("Qwen2MoeExperts", "Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Family("Qwen3_5MoeExperts", "Qwen3_5MoeForCausalLM", LINEAR, "linear attention"),
    "qwen3_moe": Family("Qwen3MoeExperts", "Qwen3MoeForCausalLM"),
    "qwen3_next": Family("Qwen3NextExperts", "Qwen3NextForCausalLM", LINEAR, "linear attention"),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeThinkerTextExperts",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {"vision_start_token_id": 151652},
        special="multimodal; the part that writes text",
    ),
    "qwen3_omni_moe_talker": Family(
        "Qwen3OmniMoeTalkerTextExperts",
        "Qwen3OmniMoeTalkerForConditionalGeneration",
        {
            "text_config": {"shared_expert_intermediate_size": 24},
            "spatial_merge_size": 2,
            "thinker_hidden_size": 32,
        },
        "multimodal; the part that speaks, from what the thinker embedded",
        takes_ids=False,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeTextExperts", "Qwen3VLMoeForConditionalGeneration", special="multimodal"
    ),
    "qwen4_exp": Family(
        "Qwen4ExpTextExperts",
        "Qwen4ExpForCausalLM",
        INDEXED
        | {
            "ple_layer_ids": [1],
            "ple_embed_dim": 8,
            "ngram_vocab_size_base": 100,
            "heads_per_ngram": 2,
            "split_ngram_parts": 2,
            "make_ngram_vocab_size_divisible_by": 8,
            "hc_lowrank": 8,
            "hc_count": 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
            "eos_token_id": VOCAB - 1,  # its tables of n-grams need one
        },
        "linear attention, attention with an index, tables of n-grams, hyper-connections",
    ),
    "solar_open": Family("SolarOpenExperts", "SolarOpenForCausalLM"),
    "unlimited_ocr": Family(
        "UnlimitedOcrTextExperts",
        "UnlimitedOcrForConditionalGeneration",
        {"text_config": DENSE_FIRST},
        "multimodal",
    ),
    "zaya": Family(
        "ZayaExperts",
        "ZayaForCausalLM",
        {
            "num_experts_per_tok": 1,
            "router_hidden_size": 16,
            "layer_types": ["hybrid", "hybrid_sliding"],
        },
        "a router of several layers, which may choose no expert",
    ),
}


# Models of the same classes that read pictures too: the same text model, as their `text_config`.
FAMILIES |= {
    f"{name}_multimodal": Family(
        FAMILIES[name].experts,
        model,
        {"text_config": FAMILIES[name].settings},
        "; ".join(filter(None, ("multimodal", FAMILIES[name].special))),
    )
    for name, model in {
        "aria": "AriaForConditionalGeneration",
        "dots3_note": "Dots3NoteForConditionalGeneration",
        "gemma4": "Gemma4ForConditionalGeneration",
        "inkling": "InklingForConditionalGeneration",
        "inkling2": "Inkling2ForConditionalGeneration",
        "inkling2_loop": "Inkling2LoopForConditionalGeneration",
        "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
        "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
        "qwen4_exp": "Qwen4ExpForConditionalGeneration",
    }.items()
}


def classes_of_transformers() -> set[str]:
    """Return the classes of experts whose implementation transformers lets one choose."""
    folder = Path(transformers.__file__).parent / "models"
    pattern = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
    pages = folder.glob("*/modeling_*.py")
    return {name for page in pages for name in pattern.findall(page.read_text())}


def make_family(name: str, *, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
    """Make the tiny model of a family, in eval mode; it always has the same weights.

    ``settings`` of the configuration go before those of the family.
    """
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.model_class(
        _sized(family.model_class.config_class, family.settings | settings, TEXT)
    )
    _randomise(model, family.experts)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def inputs_of(name: str, model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of a model's forward for these ids."""
    if FAMILIES[name].takes_ids:
        return {"input_ids": ids}
    return {"inputs_embeds": model.get_input_embeddings()(ids)}


@torch.no_grad()
def _randomise(model: PreTrainedModel, experts: str) -> None:
    """Draw what the class leaves at a constant, so that a path that omits it fails.

    Some classes start routers and biases at zero, and one leaves experts uninitialised. A bias that
    corrects a router's choice is a buffer.
    """
    randomise_vectors(model, std=0.1)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            stacked = parameter.ndim > 1
            if stacked and (type(module).__name__ == experts or parameter.std() == 0):
                parameter.normal_(std=0.2)
    for name, buffer in model.named_buffers():
        if "bias" in name and buffer.is_floating_point():
            buffer.normal_(std=0.1)


def _sized(config_class: type, settings: dict, sizes: dict) -> PreTrainedConfig:
    """Make a configuration, and those of its parts, with the sizes that it has fields for."""
    names = {each.name for each in dataclasses.fields(config_class)}
    own = {name: size for name, size in sizes.items() if name in names}
    if "kv_lora_rank" in names:
        own["num_key_value_heads"] = own["num_attention_heads"]  # latent attention has no groups
    own |= settings
    for part in config_class.sub_configs:
        default = getattr(config_class(), part)
        if default is not None:
            text = sizes is TEXT and part in ("text_config", "code_predictor_config")
            part_sizes = TEXT if text else ENCODER
            own[part] = _sized(type(default), settings.get(part, {}), part_sizes)
    return config_class(**own)
