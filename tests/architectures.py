"""Architectures of a few thousand random weights, made from configs: what they are called, a batch for each, and
what is known not to hold."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import plain_models
from tiny_models import DEEPSEEK, GPT2, KV, SIZE, TOKENS

Batch = dict[str, Any]
Draw = torch.Generator
VOCABULARY = 64

IDS = dict(input_ids=(2, 7))
SEQ2SEQ = IDS | dict(decoder_input_ids=(2, 5))
IMAGE = dict(pixel_values=(2, 3, 32, 32))
CONV = dict(target_kinds=("linear", "conv"))
WAVE = dict(input_values=(2, 800))
HEADS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=40, decoder_start_token_id=2,
)  # fmt: skip
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
VIT = SIZE | dict(image_size=32, patch_size=8)
TEXT = SIZE | TOKENS | dict(max_position_embeddings=40)
SPEECH = SIZE | dict(
    conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2, feat_extract_norm="layer", layerdrop=0.0, mask_time_prob=0.0,
    mask_feature_prob=0.0, classifier_proj_size=16,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MAMBA = dict(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=64, expand=2, conv_kernel=4)
MAMBA2 = dict(
    mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_expand=2, mamba_d_conv=4, mamba_n_groups=1,
    mamba_chunk_size=8,
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        name: the family, as users call it.
        cls: class of transformers, or of `plain_models`.
        config: fields of its config; None for a plain module.
        batch: argument -> shape; integers where the name says ids, normal values elsewhere.
        words: argument -> how to make it, where a shape does not say it.
        fields: fields of the adapter's config; none is the default plan.
        reaches: parts of the model of which the plan must adapt something (regular expressions).
        quick: part of the quick suite.
        conditional: target (regular expression) -> why it may do nothing on one batch.
        faults: check -> why it does not hold yet.
    """

    name: str
    group: str
    cls: str
    config: dict[str, Any] | None
    batch: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: IDS)
    words: dict[str, Callable[[Draw], Any]] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    reaches: tuple[str, ...] = ()
    quick: bool = False
    conditional: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


TABLE: dict[str, Architecture] = {}


def _enter(group: str, *rows: Architecture) -> None:
    for row in rows:
        assert row.name not in TABLE, row.name
        TABLE[row.name] = dataclasses.replace(row, group=group)


def A(name: str, cls: str, config: dict[str, Any] | None, batch: Mapping[str, tuple[int, ...]] = IDS, **more: Any):
    return Architecture(name, "", cls, config, batch, **more)


_enter(
    "decoders",
    A("llama", "LlamaForCausalLM", SIZE | KV, quick=True),
    A("mistral", "MistralForCausalLM", SIZE | KV | dict(sliding_window=4)),
    A("qwen2", "Qwen2ForCausalLM", SIZE | KV),
    A("qwen3", "Qwen3ForCausalLM", SIZE | KV | dict(head_dim=16)),
    A("gemma", "GemmaForCausalLM", SIZE | KV | dict(head_dim=8)),
    A("gemma2", "Gemma2ForCausalLM", SIZE | KV | dict(head_dim=8, sliding_window=4)),
    A("gemma3", "Gemma3ForCausalLM", SIZE | KV | dict(head_dim=8, sliding_window=4), quick=True),
    A("phi", "PhiForCausalLM", SIZE),
    A("phi3", "Phi3ForCausalLM", SIZE | KV),
    A("olmo", "OlmoForCausalLM", SIZE | KV),
    A("olmo2", "Olmo2ForCausalLM", SIZE | KV),
    A("cohere", "CohereForCausalLM", SIZE | KV),
    A("cohere2", "Cohere2ForCausalLM", SIZE | KV | dict(sliding_window=4)),
    A("starcoder2", "Starcoder2ForCausalLM", SIZE | KV),
    A("stablelm", "StableLmForCausalLM", SIZE | KV),
    A("gpt2", "GPT2LMHeadModel", GPT2, quick=True),
    A(
        "gpt_neo",
        "GPTNeoForCausalLM",
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            vocab_size=64,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
        ),
    ),
    A("gpt_neox", "GPTNeoXForCausalLM", SIZE),
    A("gptj", "GPTJForCausalLM", GPT2 | dict(rotary_dim=4)),
    A("gpt_bigcode", "GPTBigCodeForCausalLM", GPT2),
    A("codegen", "CodeGenForCausalLM", GPT2 | dict(rotary_dim=4)),
    A("opt", "OPTForCausalLM", HEADS | dict(ffn_dim=48, word_embed_proj_dim=32)),
    A("bloom", "BloomForCausalLM", dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    A(
        "bloom_slow",
        "BloomForCausalLM",
        dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=64, slow_but_exact=True, pretraining_tp=2),
    ),
    A("falcon", "FalconForCausalLM", HEADS),
    A("mpt", "MptForCausalLM", dict(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=32)),
    A("granite", "GraniteForCausalLM", SIZE | KV),
    A("glm4", "Glm4ForCausalLM", SIZE | KV | dict(head_dim=8)),
    A("nemotron", "NemotronForCausalLM", SIZE | KV),
    A("persimmon", "PersimmonForCausalLM", SIZE),
    A("xglm", "XGLMForCausalLM", dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, vocab_size=64)),
    A("biogpt", "BioGptForCausalLM", SIZE),
    A("smollm3", "SmolLM3ForCausalLM", SIZE | KV),
    A("exaone4", "Exaone4ForCausalLM", SIZE | KV | dict(sliding_window=4)),
    A("ctrl", "CTRLLMHeadModel", dict(n_embd=32, dff=48, n_layer=2, n_head=4, vocab_size=64)),
)
_enter(
    "mixtures of experts",
    A("mixtral", "MixtralForCausalLM", SIZE | KV | EXPERTS),
    A("qwen3_moe", "Qwen3MoeForCausalLM", SIZE | KV | EXPERTS | dict(head_dim=8)),
    A("qwen2_moe", "Qwen2MoeForCausalLM", SIZE | KV | EXPERTS | dict(shared_expert_intermediate_size=16), quick=True),
    A("deepseek_v2", "DeepseekV2ForCausalLM", SIZE | dict(num_key_value_heads=4) | DEEPSEEK),
    A("deepseek_v3", "DeepseekV3ForCausalLM", SIZE | dict(num_key_value_heads=4) | DEEPSEEK),
    A("olmoe", "OlmoeForCausalLM", SIZE | KV | EXPERTS),
    A(
        "phimoe",
        "PhimoeForCausalLM",
        SIZE | KV | EXPERTS,
    ),
    A("gpt_oss", "GptOssForCausalLM", SIZE | KV | EXPERTS | dict(head_dim=8, sliding_window=4)),
    A("granitemoe", "GraniteMoeForCausalLM", SIZE | KV | EXPERTS),
    A(
        "dbrx",
        "DbrxForCausalLM",
        dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=64,
            max_seq_len=32,
            attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
            ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
        ),
    ),
    A(
        "switch",
        "SwitchTransformersForConditionalGeneration",
        T5
        | dict(
            num_experts=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            router_jitter_noise=0.0,
        ),
        SEQ2SEQ,
        conditional={r"experts\.expert_\d": "no token of the batch chose this expert"},
    ),
)
_enter(
    "state-space and recurrent",
    A("mamba", "MambaForCausalLM", MAMBA | dict(time_step_rank=4)),
    A("falcon_mamba", "FalconMambaForCausalLM", MAMBA | dict(time_step_rank=4)),
    A("mamba2", "Mamba2ForCausalLM", MAMBA | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=8)),
    A(
        "jamba",
        "JambaForCausalLM",
        SIZE
        | KV
        | EXPERTS
        | dict(
            mamba_d_state=8,
            mamba_dt_rank=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            use_mamba_kernels=False,
        ),
    ),
    A("bamba", "BambaForCausalLM", SIZE | KV | MAMBA2 | dict(attn_layer_indices=[1])),
    A("falcon_h1", "FalconH1ForCausalLM", SIZE | KV | MAMBA2 | dict(head_dim=8, mamba_d_ssm=64)),
    A(
        "rwkv",
        "RwkvForCausalLM",
        dict(hidden_size=32, attention_hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64),
        words=dict(use_cache=lambda g: False),
    ),
    A(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        SIZE | dict(num_hidden_layers=3, lru_width=32, head_dim=8, num_key_value_heads=1, attention_window_size=8),
    ),
    A("lfm2", "Lfm2ForCausalLM", SIZE | KV | dict(layer_types=["conv", "full_attention"], block_multiple_of=8)),
    A(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        SIZE
        | KV
        | EXPERTS
        | dict(
            head_dim=8,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
)
_enter(
    "encoders",
    A("bert", "BertForSequenceClassification", SIZE, quick=True),
    A("roberta", "RobertaForMaskedLM", SIZE | dict(max_position_embeddings=40)),
    A("albert", "AlbertForMaskedLM", SIZE | dict(embedding_size=16)),
    A("distilbert", "DistilBertForMaskedLM", dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=64)),
    A("electra", "ElectraForPreTraining", SIZE | dict(embedding_size=16)),
    A(
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        SIZE | dict(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], type_vocab_size=0),
        quick=True,
    ),
    A("mpnet", "MPNetForMaskedLM", SIZE),
    A("modernbert", "ModernBertForMaskedLM", SIZE | dict(local_attention=4)),
    A("xlnet", "XLNetLMHeadModel", dict(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=64)),
    A(
        "funnel",
        "FunnelForMaskedLM",
        dict(block_sizes=[1, 1], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=48, vocab_size=64),
    ),
    A(
        "longformer",
        "LongformerForMaskedLM",
        SIZE | dict(attention_window=4, max_position_embeddings=40),
        dict(input_ids=(2, 8)),
        words=dict(global_attention_mask=lambda g: torch.tensor([[1] + [0] * 7] * 2)),
    ),
    A("big_bird", "BigBirdForMaskedLM", SIZE | dict(attention_type="original_full", max_position_embeddings=40)),
    A("fnet", "FNetForMaskedLM", SIZE),
    A("squeezebert", "SqueezeBertForSequenceClassification", SIZE | dict(embedding_size=32)),
    A(
        "mobilebert",
        "MobileBertForMaskedLM",
        SIZE | dict(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    ),
    A("esm", "EsmForMaskedLM", SIZE | dict(position_embedding_type="rotary", pad_token_id=0, mask_token_id=1)),
    A("layoutlm", "LayoutLMForTokenClassification", SIZE),
    A("tapas", "TapasModel", SIZE),
)
_enter(
    "encoder-decoders",
    A("t5", "T5ForConditionalGeneration", T5, SEQ2SEQ, quick=True, reaches=("encoder", "decoder")),
    A(
        "flan_t5",
        "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        SEQ2SEQ,
    ),
    A("umt5", "UMT5ForConditionalGeneration", T5, SEQ2SEQ),
    A("longt5", "LongT5ForConditionalGeneration", T5 | dict(local_radius=3), SEQ2SEQ),
    A("bart", "BartForConditionalGeneration", BART, SEQ2SEQ, quick=True, reaches=("encoder", "decoder")),
    A("mbart", "MBartForConditionalGeneration", BART, SEQ2SEQ),
    A("marian", "MarianMTModel", BART | dict(pad_token_id=0), SEQ2SEQ),
    A("pegasus", "PegasusForConditionalGeneration", BART, SEQ2SEQ),
    A("blenderbot", "BlenderbotForConditionalGeneration", BART, SEQ2SEQ),
    A("m2m_100", "M2M100ForConditionalGeneration", BART | dict(encoder_layerdrop=0.0, decoder_layerdrop=0.0), SEQ2SEQ),
    A(
        "led",
        "LEDForConditionalGeneration",
        BART | dict(attention_window=4, max_encoder_position_embeddings=40, max_decoder_position_embeddings=40),
        dict(input_ids=(2, 8), decoder_input_ids=(2, 5)),
        words=dict(global_attention_mask=lambda g: torch.tensor([[1] + [0] * 7] * 2)),
    ),
    A(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        dict(
            hidden_size=32,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=64,
            max_position_embeddings=40,
        ),
        SEQ2SEQ,
    ),
)
_enter(
    "vision",
    A("vit", "ViTForImageClassification", VIT, IMAGE, quick=True),
    A("deit", "DeiTForImageClassification", VIT, IMAGE),
    A("beit", "BeitForImageClassification", VIT | dict(use_relative_position_bias=True), IMAGE),
    A("dinov2", "Dinov2ForImageClassification", VIT | dict(mlp_ratio=2), IMAGE),
    A(
        "vit_mae",
        "ViTMAEForPreTraining",
        VIT
        | dict(
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
        ),
        IMAGE,
        words=dict(noise=lambda g: torch.rand(2, 16, generator=g)),
    ),
    A(
        "swin",
        "SwinForImageClassification",
        dict(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
        IMAGE,
        quick=True,
    ),
    A(
        "swinv2",
        "Swinv2ForImageClassification",
        dict(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
        IMAGE,
    ),
    A("convnext", "ConvNextForImageClassification", dict(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2), IMAGE),
    A(
        "resnet",
        "ResNetForImageClassification",
        dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck"),
        IMAGE,
        fields=CONV,
    ),
    A(
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        dict(depth_multiplier=0.25),
        IMAGE,
        fields=CONV | dict(target_names=(r"expand_1x1\.convolution", r"reduce_1x1\.convolution")),
    ),
    A(
        "segformer",
        "SegformerForSemanticSegmentation",
        dict(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        ),
        IMAGE,
    ),
    A(
        "pvt",
        "PvtForImageClassification",
        dict(
            image_size=32,
            num_encoder_blocks=2,
            depths=[1, 1],
            sequence_reduction_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[4, 2],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        IMAGE,
    ),
    A(
        "poolformer",
        "PoolFormerForImageClassification",
        dict(
            depths=[1, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            padding=[2, 1],
            num_encoder_blocks=2,
        ),
        IMAGE,
        fields=CONV,
    ),
    A(
        "levit",
        "LevitForImageClassification",
        dict(
            image_size=32,
            kernel_size=3,
            stride=2,
            padding=1,
            patch_size=16,
            hidden_sizes=[8, 16, 24],
            num_attention_heads=[1, 2, 3],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            down_ops=[["Subsample", 8, 1, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
        ),
        IMAGE,
        conditional={r"stages\.1\.layers\.2\.queries": "one token is left to look at"},
    ),
    A("yolos", "YolosForObjectDetection", VIT | dict(image_size=[32, 32], num_detection_tokens=5, num_labels=3), IMAGE),
    A(
        "detr",
        "DetrForObjectDetection",
        dict(
            use_timm_backbone=False,
            backbone=None,
            use_pretrained_backbone=False,
            backbone_config=dict(
                model_type="resnet",
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                out_features=["stage2"],
            ),
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_queries=5,
            num_labels=3,
        ),
        IMAGE,
        conditional={r"decoder\.layers\.0\.self_attn\.v_proj": "the queries of the first layer are zeros"},
    ),
    A(
        "sam",
        "SamModel",
        dict(
            vision_config=dict(
                hidden_size=32,
                output_channels=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
                mlp_dim=48,
                window_size=2,
                global_attn_indexes=[1],
                num_pos_feats=16,
            ),
            prompt_encoder_config=dict(
                hidden_size=32, image_size=32, patch_size=8, mask_input_channels=4, image_embedding_size=4
            ),
            mask_decoder_config=dict(
                hidden_size=32, mlp_dim=24, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16
            ),
        ),
        IMAGE,
        words=dict(input_points=lambda g: torch.rand(2, 1, 2, 2, generator=g) * 32),
        conditional={
            r"output_hypernetworks_mlps\.0\.": "several masks are asked for, and the first is that of a single one"
        },
    ),
    A(
        "dpt",
        "DPTForDepthEstimation",
        VIT
        | dict(
            is_hybrid=False,
            backbone_out_indices=[0, 1],
            num_hidden_layers=2,
            neck_hidden_sizes=[8, 16],
            reassemble_factors=[2, 1],
            fusion_hidden_size=16,
            neck_ignore_stages=[],
        ),
        IMAGE,
    ),
    A(
        "videomae",
        "VideoMAEForVideoClassification",
        VIT | dict(num_frames=4, tubelet_size=2, image_size=16),
        dict(pixel_values=(2, 4, 3, 16, 16)),
    ),
    A(
        "patchtst",
        "PatchTSTForPrediction",
        dict(
            num_input_channels=2,
            context_length=16,
            prediction_length=4,
            patch_length=4,
            patch_stride=4,
            d_model=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            norm_type="layernorm",
        ),
        dict(past_values=(2, 16, 2)),
    ),
)
_enter(
    "speech",
    A(
        "whisper",
        "WhisperForConditionalGeneration",
        BART
        | dict(
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=20,
            pad_token_id=0,
            suppress_tokens=[],
            begin_suppress_tokens=None,
        ),
        dict(input_features=(2, 8, 24), decoder_input_ids=(2, 5)),
        quick=True,
        reaches=("encoder", "decoder"),
    ),
    A(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        BART
        | dict(
            input_feat_per_channel=8, conv_channels=16, max_source_positions=40, max_target_positions=20, pad_token_id=0
        ),
        dict(input_features=(2, 24, 8), decoder_input_ids=(2, 5)),
    ),
    A("wav2vec2", "Wav2Vec2ForCTC", SPEECH, WAVE, quick=True),
    A("hubert", "HubertForCTC", SPEECH, WAVE),
    A(
        "wavlm",
        "WavLMForCTC",
        SPEECH | dict(num_buckets=16, max_bucket_distance=32),
        WAVE,
    ),
    A("sew", "SEWForCTC", SPEECH | dict(squeeze_factor=2), WAVE),
    A(
        "unispeech_sat",
        "UniSpeechSatForXVector",
        SPEECH | dict(tdnn_dim=(16, 16), tdnn_kernel=(3, 2), tdnn_dilation=(1, 2), xvector_output_dim=16),
        WAVE,
    ),
    A(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerForCTC",
        SPEECH | dict(conv_depthwise_kernel_size=3, position_embeddings_type="relative", max_source_positions=100),
        WAVE,
    ),
    A(
        "ast",
        "ASTForAudioClassification",
        SIZE | dict(patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16),
        dict(input_values=(2, 32, 16)),
    ),
    A(
        "speecht5",
        "SpeechT5ForSpeechToText",
        SPEECH
        | dict(
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            pad_token_id=0,
            decoder_start_token_id=2,
        ),
        WAVE | dict(decoder_input_ids=(2, 5)),
    ),
    A(
        "musicgen",
        "MusicgenForCausalLM",
        dict(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
            num_codebooks=2,
            layerdrop=0.0,
        ),
        dict(input_ids=(4, 6), encoder_hidden_states=(2, 5, 32)),
    ),
)


def _image_ids(image_token: int, count: int, rows: int = 2) -> Callable[[Draw], Tensor]:
    """Ids of `count` image tokens between words."""
    return lambda g: torch.cat([
        torch.randint(3, 40, (rows, 2), generator=g), torch.full((rows, count), image_token),
        torch.randint(3, 40, (rows, 4), generator=g),
    ], 1)  # fmt: skip


CLIP_VISION = dict(VIT | dict(projection_dim=16))
QWEN_VL = dict(
    depth=2,
    embed_dim=32,
    hidden_size=32,
    num_heads=4,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=1,
    mlp_ratio=2,
    in_channels=3,
    in_chans=3,
)
_enter(
    "several modalities",
    A(
        "clip",
        "CLIPModel",
        dict(text_config=TEXT, vision_config=CLIP_VISION, projection_dim=16),
        IDS | IMAGE,
        quick=True,
        reaches=("vision_model", "text_model"),
    ),
    A(
        "siglip",
        "SiglipModel",
        dict(text_config=TEXT, vision_config=VIT),
        IDS | IMAGE,
        reaches=("vision_model", "text_model"),
    ),
    A("blip", "BlipForConditionalGeneration", dict(text_config=TEXT, vision_config=VIT), IDS | IMAGE),
    A("git", "GitForCausalLM", TEXT | dict(vision_config=VIT), IDS | IMAGE),
    A("vilt", "ViltModel", VIT | dict(max_position_embeddings=40), IDS | IMAGE),
    A(
        "llava",
        "LlavaForConditionalGeneration",
        dict(
            vision_config=dict(model_type="clip_vision_model", **VIT),
            text_config=dict(model_type="llama", **SIZE, **KV),
            image_token_index=60,
            vision_feature_layer=-2,
        ),
        IMAGE,
        words=dict(input_ids=_image_ids(60, 16)),
        quick=True,
        conditional={r"vision_tower.*layers\.1\.": "vision_feature_layer=-2 leaves the last block out"},
        reaches=("vision_tower", "language_model"),
    ),
    A(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        dict(
            vision_config=dict(model_type="siglip_vision_model", **VIT),
            text_config=dict(model_type="gemma", **SIZE, **KV, head_dim=8),
            image_token_index=60,
            projection_dim=32,
        ),
        IMAGE,
        words=dict(input_ids=_image_ids(60, 16)),
        reaches=("vision_tower", "language_model"),
    ),
    A(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        dict(
            text_config=dict(
                **SIZE, **KV, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
            ),
            vision_config=QWEN_VL,
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        ),
        dict(pixel_values=(32, 48)),
        words=dict(
            input_ids=_image_ids(60, 4),
            image_grid_thw=lambda g: torch.tensor([[1, 4, 4]] * 2),
            mm_token_type_ids=lambda g: torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]] * 2),
        ),
        reaches=("visual", "language_model"),
    ),
    A(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        dict(
            text_config=dict(
                **SIZE, **KV, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
            ),
            vision_config=QWEN_VL
            | dict(intermediate_size=48, out_hidden_size=32, window_size=8, fullatt_block_indexes=[1]),
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        ),
        dict(pixel_values=(32, 48)),
        words=dict(
            input_ids=_image_ids(60, 4),
            image_grid_thw=lambda g: torch.tensor([[1, 4, 4]] * 2),
            mm_token_type_ids=lambda g: torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]] * 2),
        ),
        reaches=("visual", "language_model"),
    ),
    A(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        dict(
            vision_config=VIT,
            text_config=dict(model_type="llama", **SIZE, **KV, pad_token_id=0),
            image_token_id=60,
            scale_factor=2,
        ),
        dict(pixel_values=(2, 1, 3, 32, 32)),
        words=dict(input_ids=_image_ids(60, 4)),
        reaches=("vision_model", "text_model"),
    ),
    A(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        dict(
            vision_config=VIT,
            text_config=dict(model_type="llama", **SIZE, **KV, pad_token_id=0),
            image_token_id=60,
            scale_factor=2,
        ),
        dict(pixel_values=(2, 1, 3, 32, 32)),
        words=dict(input_ids=_image_ids(60, 4)),
        reaches=("vision_model", "text_model"),
    ),
    A(
        "internvl",
        "InternVLForConditionalGeneration",
        dict(
            vision_config=VIT | dict(image_size=[32, 32], patch_size=[8, 8]),
            text_config=dict(model_type="qwen2", **SIZE, **KV),
            image_token_id=60,
            downsample_ratio=0.5,
        ),
        IMAGE,
        words=dict(input_ids=_image_ids(60, 4)),
    ),
    A(
        "blip2",
        "Blip2ForConditionalGeneration",
        dict(
            vision_config=VIT,
            qformer_config=SIZE | dict(encoder_hidden_size=32, cross_attention_frequency=1),
            text_config=dict(model_type="opt", **HEADS, ffn_dim=48, word_embed_proj_dim=32),
            num_query_tokens=4,
            image_token_index=60,
        ),
        IMAGE,
        words=dict(input_ids=_image_ids(60, 4)),
    ),
    A(
        "mllama",
        "MllamaForConditionalGeneration",
        dict(
            vision_config=dict(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_global_layers=1,
                attention_heads=4,
                image_size=32,
                patch_size=8,
                max_num_tiles=1,
                supported_aspect_ratios=[[1, 1]],
                vision_output_dim=64,
                intermediate_layers_indices=[0],
            ),
            text_config=SIZE | KV | dict(num_hidden_layers=3, cross_attention_layers=[1], pad_token_id=0),
            image_token_index=60,
        ),
        dict(pixel_values=(2, 1, 1, 3, 32, 32)),
        words=dict(
            input_ids=_image_ids(60, 1),
            aspect_ratio_ids=lambda g: torch.ones(2, 1, dtype=torch.long),
            aspect_ratio_mask=lambda g: torch.ones(2, 1, 1, dtype=torch.long),
            cross_attention_mask=lambda g: torch.ones(2, 7, 1, 1, dtype=torch.long),
        ),
    ),
    A(
        "vision_encoder_decoder",
        "VisionEncoderDecoderModel",
        dict(
            encoder=dict(model_type="vit", **VIT),
            decoder=dict(model_type="gpt2", add_cross_attention=True, is_decoder=True, **GPT2),
        ),
        IMAGE | dict(decoder_input_ids=(2, 5)),
    ),
)
_enter(
    "plain torch",
    A("torch_encoder", "Encoder", None, dict(x=(2, 6, 32))),
    A(
        "unet",
        "UNet",
        None,
        dict(x=(2, 3, 16, 16)),
        quick=True,
        reaches=("down_blocks", "mid_block", "up_blocks"),
    ),
    A("mixer", "Mixer", None, dict(x=(2, 3, 32, 32))),
    A("recurrent", "Recurrent", None, dict(input_ids=(2, 7))),
    A("dit", "DiffusionTransformer", None, dict(x=(2, 4, 8, 8), t=(2,))),
)


@functools.lru_cache(maxsize=4)
def _base(name: str) -> nn.Module:
    row = TABLE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if row.config is None:
            return getattr(plain_models, row.cls)().eval()
        import transformers

        cls = getattr(transformers, row.cls)
        config = cls.config_class(**{**TOKENS, **row.config})
        model = cls(copy.deepcopy(config)).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():  # weights of 0.02, and layer scales of 1e-6, would hide what an adapter does
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(0.1).add_(0.15 * torch.randn(p.shape, generator=g))
            elif p.abs().max() < 0.02:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def build(name: str) -> nn.Module:
    """A fresh model with the same random weights at every call, in eval mode."""
    return copy.deepcopy(_base(name))


def batch(name: str) -> Batch:
    """What the model's forward wants."""
    row, g = TABLE[name], torch.Generator().manual_seed(1)
    found: Batch = {}
    for argument, shape in row.batch.items():
        if "ids" in argument:
            found[argument] = torch.randint(3, 40, shape, generator=g)
        else:
            found[argument] = torch.randn(shape, generator=g)
    return found | {argument: make(g) for argument, make in row.words.items()}
