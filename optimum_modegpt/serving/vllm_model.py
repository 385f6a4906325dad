"""The vLLM model that serves compressed models: vLLM's Transformers backend with more checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.transformers import TransformersForCausalLM  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from optimum_modegpt.errors import UnsupportedModel


class ModeGPTForCausalLM(TransformersForCausalLM):
    """A compressed language model in vLLM.

    Raises:
        UnsupportedModel: the engine would run with tensor parallelism.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        size = vllm_config.parallel_config.tensor_parallel_size
        if size > 1:
            raise UnsupportedModel(
                f"Compressed models do not support tensor parallelism; tensor_parallel_size is {size}, expected 1. "
                "Use data_parallel_size, or a model compressed with layout='stock'."
            )
        widen_heads(vllm_config.model_config.model_arch_config, kernel_head_dims())
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        divisor = self.config.family.head.divisor
        if divisor is not None and self.pp_group.is_last_rank:  # vLLM applies a scale and a cap only
            self.logits_processor.scale /= getattr(self.config, divisor)

    def recursive_replace(self) -> None:
        """Replace modules by those of vLLM, except norms with a weight for each head, which vLLM does not have."""
        with _without(self.model, _norms_of_heads(self.model)):
            super().recursive_replace()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load as the Transformers backend does, and check that the rotary pairs of every block were loaded.

        Raises:
            UnsupportedModel: some were not. vLLM itself checks only parameters.
        """
        loaded = super().load_weights(weights)
        pairs = {name for name, _ in self.named_buffers() if name.endswith("rope_index")}
        if missing := sorted(pairs - loaded):
            raise UnsupportedModel(
                f"The checkpoint lacks {len(missing)} tensors such as {missing[0]}, without which the attention would "
                "be wrong. Download or save the model again."
            )
        return loaded


def kernel_head_dims() -> list[int]:
    """Return the head dims of vLLM's attention kernels on this platform; an empty list if none is excluded."""
    if not current_platform.is_cpu():
        return []
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # pyright: ignore[reportMissingImports]

    return CPUAttentionBackend.get_supported_head_sizes()


def widen_heads(architecture: Any, head_dims: list[int]) -> None:
    """Round the head dim of every block up to one that the kernels have; the attention pads query, key and value.

    Raises:
        UnsupportedModel: a head is wider than all of `head_dims`.
    """
    for values in (vars(architecture), *(architecture.per_layer_overrides or ())):
        if head_dims and "head_size" in values:
            values["head_size"] = _rounded_up(values["head_size"], head_dims)


def _rounded_up(width: int, head_dims: list[int]) -> int:
    wide_enough = [each for each in head_dims if each >= width]
    if not wide_enough:
        raise UnsupportedModel(f"The head dim is {width}; the attention kernels of vLLM have {head_dims}.")
    return min(wide_enough)


def _norms_of_heads(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the parent and the name of every norm whose weight has a row for each head."""
    for parent in model.modules():
        for name, child in parent.named_children():
            weight = getattr(child, "weight", None)
            if "norm" in name and isinstance(weight, Tensor) and weight.ndim == 2:
                yield parent, name


@contextmanager
def _without(model: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Remove child modules, given by parent and name, from a model while the context lasts."""
    removed = [(parent, name, parent._modules.pop(name)) for parent, name in list(places)]
    try:
        yield
    finally:
        for parent, name, child in removed:
            parent._modules[name] = child
