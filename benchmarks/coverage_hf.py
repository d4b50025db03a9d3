"""Hugging Face transformers from small random configurations: every dimension has another size than all others.

Batch 2, 7 positions, 101 tokens, width 48 in 4 heads of 12, 2 key and value heads, inner width 80, and so on: no
dimension is mistaken for another by luck. Nothing is downloaded.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# transformers looks for an optional package `kernels`; from the root of this repository it would find ours.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # None: there is none
hf: Any = importlib.import_module("transformers")

Case = tuple[nn.Module, Any]  # a model and its inputs: a tuple, or a dictionary of keyword inputs

VOCABULARY, TOKENS, BATCH = 101, 7, 2
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tokens(length: int = TOKENS, seed: int = 0) -> Tensor:
    """Random tokens, ``(batch, length)``; none is one of the special ones."""
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _text() -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.int64)}


def _bert() -> Case:
    config = hf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **_ENCODER)
    return hf.BertForSequenceClassification(config), _text()


def _gpt2() -> Case:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4, n_inner=80, use_cache=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config), {"input_ids": tokens()}


def _decoder(config: Any, model: Any, **more: Any) -> Callable[[], Case]:
    def build() -> Case:
        return model(config(**{**_DECODER, **more})), {"input_ids": tokens()}

    return build


def _mixtral(experts: str | None = None) -> Callable[[], Case]:
    def build() -> Case:
        config = hf.MixtralConfig(**_DECODER, num_local_experts=3, num_experts_per_tok=2)
        if experts is not None:
            config._experts_implementation = experts
        return hf.MixtralForCausalLM(config), {"input_ids": tokens()}

    return build


def _t5() -> Case:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=48, d_kv=10, d_ff=80, num_layers=2, num_heads=4, use_cache=False,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), {"input_ids": tokens(), "decoder_input_ids": tokens(5, seed=1)}


def _vit() -> Case:
    config = hf.ViTConfig(**_ENCODER, image_size=32, patch_size=8, num_labels=11)
    return hf.ViTForImageClassification(config), {"pixel_values": normal(BATCH, 3, 32, 32)}


def _deit() -> Case:
    config = hf.DeiTConfig(**_ENCODER, image_size=32, patch_size=8, num_labels=11)
    return hf.DeiTForImageClassificationWithTeacher(config), {"pixel_values": normal(BATCH, 3, 32, 32)}


def _swin() -> Case:
    config = hf.SwinConfig(
        image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=4, num_labels=11
    )
    return hf.SwinForImageClassification(config), {"pixel_values": normal(BATCH, 3, 64, 64)}


def _whisper() -> Case:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=88, num_mel_bins=20, max_source_positions=30,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        use_cache=False, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    inputs = {"input_features": normal(BATCH, 20, 60), "decoder_input_ids": tokens(5)}
    return hf.WhisperForConditionalGeneration(config), inputs


def _clip() -> Case:
    text = {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 2}
    vision = {
        "hidden_size": 60, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 5,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=28)
    return hf.CLIPModel(config), {**_text(), "pixel_values": normal(BATCH, 3, 32, 32)}


def _detr() -> Case:
    backbone = hf.ResNetConfig(
        embedding_size=20, hidden_sizes=[24, 28, 36, 44], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        num_queries=9, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=88, num_labels=11,
    )  # fmt: skip
    inputs = {"pixel_values": normal(BATCH, 3, 64, 96), "pixel_mask": torch.ones(BATCH, 64, 96, dtype=torch.int64)}
    return hf.DetrForObjectDetection(config), inputs


def _segformer() -> Case:
    config = hf.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[12, 20, 30, 42], num_attention_heads=[1, 2, 3, 6], mlp_ratios=[2, 2, 3, 3],
        decoder_hidden_size=26, num_labels=11,
    )  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config), {"pixel_values": normal(BATCH, 3, 64, 64)}


def _mamba() -> Case:
    config = hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=48, state_size=6, num_hidden_layers=2, expand=2, conv_kernel=4,
        time_step_rank=5, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.MambaForCausalLM(config), {"input_ids": tokens()}


def _mamba2() -> Case:
    config = hf.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=48, state_size=6, num_hidden_layers=2, expand=2, conv_kernel=4, head_dim=12,
        num_heads=8, n_groups=2, chunk_size=4, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.Mamba2ForCausalLM(config), {"input_ids": tokens()}


def _conformer() -> Case:
    config = hf.Wav2Vec2ConformerConfig(
        vocab_size=31, **_ENCODER, conv_dim=[20, 24], conv_stride=[5, 2], conv_kernel=[10, 3],
        num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=4, position_embeddings_type="relative",
        conv_depthwise_kernel_size=5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.Wav2Vec2ConformerForCTC(config), {"input_values": normal(BATCH, 400)}


CASES: dict[str, Callable[[], Case]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _decoder(hf.LlamaConfig, hf.LlamaForCausalLM),
    "llama (with its cache)": _decoder(hf.LlamaConfig, hf.LlamaForCausalLM, use_cache=True),
    "mistral": _decoder(hf.MistralConfig, hf.MistralForCausalLM, head_dim=12, sliding_window=4),
    "qwen2": _decoder(hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen3": _decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=14, tie_word_embeddings=True),
    "t5": _t5,
    "vit": _vit,
    "deit": _deit,
    "swin": _swin,
    "whisper": _whisper,
    "clip": _clip,
    "detr": _detr,
    "segformer": _segformer,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "wav2vec2-conformer": _conformer,
    "mixtral": _mixtral(),
    "mixtral (batched experts)": _mixtral("batched_mm"),
}
