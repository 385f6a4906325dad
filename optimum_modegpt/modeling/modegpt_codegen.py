"""Compressed CodeGen: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.codegen.configuration_codegen import CodeGenConfig
from transformers.models.codegen.modeling_codegen import (
    CodeGenAttention,
    CodeGenForCausalLM,
    CodeGenModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual, Storage

FAMILY = Family(
    "codegen",
    blocks="h",
    attention=Attention(
        "attn",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        output="attn.out_proj",
        storage=Storage("stacked", "attn.qkv_proj", slices=4, order=("query", "value", "key")),
        positions=Positions("interleaved", width="rotary_dim", table="single", sine_first=True),
        output_dropout="attn.resid_dropout",
    ),
    mlp=MLP(inputs=("mlp.fc_in",), output="mlp.fc_out", activation="mlp.act", width="n_inner", width_factor=4),
    norm=Norm(centred=True),
    residual=Residual("ln_1", "ln_1", topology="parallel"),
    head=Head("ln_f"),
    since="5.24.0",
)


class ModeGPTCodeGenConfig(ModeGPTConfigMixin, CodeGenConfig):
    """CodeGen with the widths of each block in `per_layer_config`."""


class ModeGPTCodeGenAttention(ModeGPTAttentionMixin, CodeGenAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """CodeGen's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTCodeGenModel(ModeGPTModelMixin, CodeGenModel):
    """CodeGen without a head."""


class ModeGPTCodeGenForCausalLM(ModeGPTModelMixin, CodeGenForCausalLM):
    """CodeGen with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTCodeGenConfig,
    ModeGPTCodeGenAttention,
    AutoModel=ModeGPTCodeGenModel,
    AutoModelForCausalLM=ModeGPTCodeGenForCausalLM,
)
