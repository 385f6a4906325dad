"""Compressed text model of Gemma 4: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM, Gemma4TextModel

from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Head, Residual

FAMILY = Family(
    "gemma4_text",
    attention=Attention(layers=(), mixers=("self_attn",)),
    residual=Residual(
        mlp_norm="pre_feedforward_layernorm",
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        scale="layer_scalar",
    ),
    head=Head(cap="final_logit_softcapping"),
    layer_sizes=("head_dim", "num_key_value_heads"),
    refused=("hidden_size_per_layer_input", "num_kv_shared_layers", "enable_moe_block"),
)


class ModeGPTGemma4TextConfig(ModeGPTConfigMixin, Gemma4TextConfig):
    """The text model of Gemma 4 with the widths of each block in `per_layer_config`."""


class ModeGPTGemma4TextModel(ModeGPTModelMixin, Gemma4TextModel):
    """The text model of Gemma 4 without a head."""


class ModeGPTGemma4ForCausalLM(ModeGPTModelMixin, Gemma4ForCausalLM):
    """The text model of Gemma 4 with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTGemma4TextConfig,
    AutoModel=ModeGPTGemma4TextModel,
    AutoModelForCausalLM=ModeGPTGemma4ForCausalLM,
)
