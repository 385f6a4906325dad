"""The sizes of a dense model that its costs depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum_modegpt.architectures.resolve import Architecture


@dataclass(frozen=True)
class Shapes:
    """Sizes of a dense model and of its largest block."""

    d_model: int  # width of the residual stream
    heads: int  # joint width of the attention heads; 0 if the attention of all blocks stays dense
    head_count: int
    mlp: int  # width of the MLP
    mlp_inputs: int  # number of input projections of the MLP
    weights: int  # number of weights of the block's matrices, with those of all experts
    vocabulary: int
    blocks: int
    eager: bool = False  # whether the attention is "eager", which holds the scores of a batch
    experts: int = 1  # number of experts; `mlp` is the width of each
    chosen: int = 1  # number of experts that a token passes
    separable: bool = True  # whether the hidden channels of the experts, if any, are φ(gate) · up
    shared: int = 0  # width of the shared expert; 0 if there is none

    @property
    def parts(self) -> int:
        """The number of parts of a block with all of them."""
        return 4 if self.shared else 3

    @property
    def passed_weights(self) -> float:
        """The number of weights of the block's matrices that a token passes."""
        mlp = self.experts * (self.mlp_inputs + 1) * self.mlp * self.d_model
        return self.weights - mlp * (1 - self.chosen / self.experts)


def shapes_of(architecture: Architecture) -> Shapes:
    """Return the sizes of a dense model, which may be on the meta device."""
    model = architecture.model
    blocks = architecture.blocks
    largest = max(blocks, key=lambda block: block.weights)
    head: Any = model.get_output_embeddings()
    experts, described = largest.experts, architecture.family.mlp.experts
    chosen = 1 if experts is None or described is None else getattr(model.config.get_text_config(), described.chosen)
    alike = [block for block in blocks if (block.experts is None) == (experts is None)]
    return Shapes(
        d_model=largest.d_model,
        heads=max(block.heads * block.head_dim for block in blocks),
        head_count=largest.heads,
        mlp=max(block.mlp_width for block in alike),
        mlp_inputs=len(largest.family.mlp.inputs),
        weights=largest.weights,
        vocabulary=head.out_features,
        blocks=len(blocks),
        eager=model.config._attn_implementation == "eager",
        experts=1 if experts is None else experts.count,
        chosen=chosen,
        separable=experts is None or experts.activation is not None,
        shared=largest.shared_width,
    )
