"""The families by transformers' model_type."""

from __future__ import annotations

from optimum_modegpt.architectures.classes import FamilyClasses
from optimum_modegpt.modeling import modegpt_llama, modegpt_mistral, modegpt_opt, modegpt_qwen2

FAMILIES = {
    module.FAMILY.model_type: FamilyClasses(module.FAMILY, module.MODELS)
    for module in (modegpt_llama, modegpt_mistral, modegpt_opt, modegpt_qwen2)
}
