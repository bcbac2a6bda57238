"""One small, randomly initialised model per architecture family, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from actlas.core.model import Model

VOCAB = 67
_TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_TEXT,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_TEXT,
}


def _tokens(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(model: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _t5(model: nn.Module) -> dict[str, Tensor]:
    return {**_tokens(model), "decoder_input_ids": _tokens(model)["input_ids"][:, :5]}


def _clip(model: nn.Module) -> dict[str, Tensor]:
    return {**_tokens(model), **_pixels(model)}


def _whisper(model: nn.Module) -> dict[str, Tensor]:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": _tokens(model)["input_ids"][:, :5]}


@dataclass(frozen=True)
class Family:
    """How to build one small model of a family, and what to feed it."""

    name: str
    build: Callable[[str | None], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Tensor]] = _tokens
    attention: str | None = None

    def model(self, attention: str | None = None) -> Model:
        """Return a fresh model; the same weights every time."""
        torch.manual_seed(0)
        module = self.build(attention or self.attention).eval()
        with torch.no_grad():
            for name, p in module.named_parameters():
                if p.ndim == 1 and "norm" in name.lower():
                    p.add_(0.1 * torch.randn(p.shape))
                elif p.ndim >= 2:
                    p.mul_(3.0)
        return Model(module, name=self.name)


def _decoder(cls: Any, config: Any, **sizes: Any) -> Callable[[str | None], nn.Module]:
    return lambda attention: cls._from_config(config(**sizes), attn_implementation=attention)


FAMILIES: tuple[Family, ...] = (
    Family("llama", _decoder(tf.LlamaForCausalLM, tf.LlamaConfig, **_LLAMA)),
    Family("mistral", _decoder(tf.MistralForCausalLM, tf.MistralConfig, **_LLAMA)),
    Family("qwen2", _decoder(tf.Qwen2ForCausalLM, tf.Qwen2Config, **_LLAMA)),
    Family("qwen3", _decoder(tf.Qwen3ForCausalLM, tf.Qwen3Config, **_LLAMA, head_dim=8)),
    Family("smollm3", _decoder(tf.SmolLM3ForCausalLM, tf.SmolLM3Config, **_LLAMA)),
    Family("phi3", _decoder(tf.Phi3ForCausalLM, tf.Phi3Config, **_LLAMA)),
    Family("gemma", _decoder(tf.GemmaForCausalLM, tf.GemmaConfig, **_LLAMA, head_dim=8)),
    Family("gemma2", _decoder(tf.Gemma2ForCausalLM, tf.Gemma2Config, **_LLAMA, head_dim=8, sliding_window=4)),
    Family(
        "gemma3", _decoder(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, **_LLAMA, head_dim=8, sliding_window=4)
    ),
    Family(
        "gpt2",
        _decoder(tf.GPT2LMHeadModel, tf.GPT2Config, n_embd=32, n_layer=3, n_head=4, n_positions=64, **_TEXT),
    ),
    Family("gpt-neox", _decoder(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, **_BERT)),
    Family(
        "gpt-neox-sequential",
        _decoder(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, **_BERT, use_parallel_residual=False),
    ),
    Family(
        "opt",
        _decoder(
            tf.OPTForCausalLM,
            tf.OPTConfig,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **_TEXT,
        ),
    ),
    Family(
        "opt-post-norm",
        _decoder(
            tf.OPTForCausalLM,
            tf.OPTConfig,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            do_layer_norm_before=False,
            **_TEXT,
        ),
    ),
    Family(
        "bloom", _decoder(tf.BloomForCausalLM, tf.BloomConfig, hidden_size=32, n_layer=3, n_head=4, **_TEXT)
    ),
    Family(
        "falcon",
        _decoder(
            tf.FalconForCausalLM,
            tf.FalconConfig,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            **_TEXT,
        ),
    ),
    Family(
        "falcon-new",
        _decoder(
            tf.FalconForCausalLM,
            tf.FalconConfig,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            **_TEXT,
        ),
    ),
    Family(
        "falcon-sequential",
        _decoder(
            tf.FalconForCausalLM,
            tf.FalconConfig,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            multi_query=False,
            parallel_attn=False,
            **_TEXT,
        ),
    ),
    Family(
        # With ALiBi, transformers' own fused and eager Falcon differ; the eager one is tested.
        "falcon-alibi",
        _decoder(
            tf.FalconForCausalLM,
            tf.FalconConfig,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            **_TEXT,
        ),
        attention="eager",
    ),
    Family("bert", _decoder(tf.BertForMaskedLM, tf.BertConfig, **_BERT)),
    Family("bert-encoder", _decoder(tf.BertModel, tf.BertConfig, **_BERT)),
    Family("roberta", _decoder(tf.RobertaForMaskedLM, tf.RobertaConfig, **_BERT)),
    Family(
        "t5",
        _decoder(
            tf.T5ForConditionalGeneration,
            tf.T5Config,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
            **_TEXT,
        ),
        _t5,
    ),
    Family(
        "t5-gated",
        _decoder(
            tf.T5ForConditionalGeneration,
            tf.T5Config,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            **_TEXT,
        ),
        _t5,
    ),
    Family(
        "vit",
        _decoder(
            tf.ViTForImageClassification,
            tf.ViTConfig,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        _pixels,
    ),
    Family(
        "clip",
        lambda attention: tf.CLIPModel._from_config(
            tf.CLIPConfig(
                text_config={**_BERT, "projection_dim": 16},
                vision_config={
                    "hidden_size": 24,
                    "intermediate_size": 40,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "image_size": 16,
                    "patch_size": 8,
                    "projection_dim": 16,
                },
                projection_dim=16,
            ),
            attn_implementation=attention,
        ),
        _clip,
    ),
    Family(
        "whisper",
        _decoder(
            tf.WhisperForConditionalGeneration,
            tf.WhisperConfig,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=32,
            decoder_start_token_id=1,
            **_TEXT,
        ),
        _whisper,
    ),
    Family(
        "mixtral",
        _decoder(
            tf.MixtralForCausalLM, tf.MixtralConfig, **_LLAMA, num_local_experts=4, num_experts_per_tok=2
        ),
    ),
    Family(
        "qwen2-moe",
        _decoder(
            tf.Qwen2MoeForCausalLM,
            tf.Qwen2MoeConfig,
            **_LLAMA,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            mlp_only_layers=[1],
        ),
    ),
    Family(
        "qwen3-moe",
        _decoder(
            tf.Qwen3MoeForCausalLM,
            tf.Qwen3MoeConfig,
            **_LLAMA,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            head_dim=8,
        ),
    ),
)
BY_NAME = {f.name: f for f in FAMILIES}
