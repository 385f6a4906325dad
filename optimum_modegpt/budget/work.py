"""What a compression has to compute, from shapes alone: multiply-adds by stage and step. The floor of its time.

Counted is what the method needs and what its budgets allow, with dense products where a half would do; not what the
code happens to compute twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.calibration.moments import affordable_windows, curvature_work
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.psd import gram_work
from optimum_modegpt.decompositions.softmax import ITERATIONS
from optimum_modegpt.methods import sensitivity
from optimum_modegpt.methods.residual_matched import FINAL_ROUNDS, REFIT_TOKENS, gain_tokens
from optimum_modegpt.report import PARTS


@dataclass(frozen=True)
class Shapes:
    """Sizes of one block: residual width, joint width of the heads, their number and that of their groups, MLP width,
    matrices at the MLP's input, weights of the projections, whether heads are rotated; and of the model, its vocabulary
    and blocks, and whether its attention is "eager": such a one holds the scores of a batch."""

    d_model: int
    heads: int
    head_count: int
    groups: int
    mlp: int
    mlp_inputs: int
    weights: int
    rotary: bool
    vocabulary: int
    blocks: int
    eager: bool = False


def shapes_of(architecture: Architecture) -> Shapes:
    """Return the sizes of a dense model with its largest block; it may be on the meta device."""
    model = architecture.model
    head: Any = model.get_output_embeddings()
    count, eager = len(architecture.blocks), model.config._attn_implementation == "eager"
    each = (_block_shapes(block, head.out_features, count, eager) for block in architecture.blocks)
    return max(each, key=lambda shapes: shapes.weights)


def _block_shapes(block: Block, vocabulary: int, blocks: int, eager: bool) -> Shapes:
    return Shapes(
        d_model=block.d_model,
        heads=block.heads * block.head_dim,
        head_count=block.heads,
        groups=block.kv_heads,
        mlp=block.mlp_width,
        mlp_inputs=len(block.family.mlp.inputs),
        weights=block.weights,
        rotary=block.rotary and "qk" not in block.full_width_parts,
        vocabulary=vocabulary,
        blocks=blocks,
        eager=eager,
    )


@dataclass(frozen=True)
class Extent:
    """How much is calibrated on: windows, their length, tokens of one batch, bytes of an activation."""

    windows: int
    length: int
    batch: int
    element: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.windows * self.length


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a step, by the precision of their products: the model's own, that of the rows of its moments
    (its own too where float32 can be their sum, else float32), float32, float64."""

    own: float = 0.0
    moments: float = 0.0
    raised: float = 0.0
    exact: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.own + other.own, self.moments + other.moments, self.raised + other.raised, self.exact + other.exact
        )

    @property
    def total(self) -> float:
        """All of them."""
        return self.own + self.moments + self.raised + self.exact


def block_forward(shapes: Shapes, windows: float, length: int) -> float:
    """Multiply-adds of one block over `windows`: projections, and the half of the attention that is visible."""
    return windows * length * (shapes.weights + length * shapes.heads)


def work_of(
    shapes: Shapes,
    config: ModeGPTConfig,
    extent: Extent,
    *,
    mlp_ranks: Sequence[int] | None = None,
    variants: int | None = None,
) -> dict[str, dict[str, Work]]:
    """By stage, "allocate" and "decompose", and step: the work of all blocks together.

    `mlp_ranks` are the kept widths of the MLPs, a number a block, None for the same sparsity everywhere; `variants`
    how many cut parts the sensitivities were measured at, None for as many as there can be.
    """
    ranks = mlp_ranks or [int(shapes.mlp * (1 - config.sparsity))] * shapes.blocks
    allocate: dict[str, Work] = {}
    if config.sparsity and config.resolved_allocation == "sensitivity":
        allocate["sensitivities"] = _sensitivities(shapes, extent, variants)
    elif config.sparsity and config.resolved_allocation == "influence":
        allocate["influences"] = Work(own=shapes.blocks * block_forward(shapes, extent.windows, extent.length))
    if config.method == "paper":
        return {"allocate": allocate, "decompose": _joined(_published_block(shapes, extent) for _ in ranks)}
    decompose = _joined(_default_block(shapes, config, extent, rank) for rank in ranks)
    if config.sparsity:
        decompose["final gain"] = _final_gain(shapes, extent)
    return {"allocate": allocate, "decompose": decompose}


def _joined(blocks: Iterable[dict[str, Work]]) -> dict[str, Work]:
    total: dict[str, Work] = {}
    for steps in blocks:
        total |= {name: total.get(name, Work()) + work for name, work in steps.items()}
    return total


def _default_block(shapes: Shapes, config: ModeGPTConfig, extent: Extent, left: int) -> dict[str, Work]:
    steps = {
        "residual streams": Work(own=2 * block_forward(shapes, extent.windows, extent.length)),
        "moments": Work(moments=extent.tokens * _moments(shapes)),
        "curvature of the attention": Work(raised=_curvature(shapes, extent) if shapes.rotary else 0.0),
        "factorisations": Work(exact=_factorisations(shapes, left)),
    }
    if config.refit_iterations and left < shapes.mlp:
        steps["refit of gate and up"] = _refit(shapes, config, extent.tokens, left)
    return steps


def _published_block(shapes: Shapes, extent: Extent) -> dict[str, Work]:
    inputs = shapes.d_model**2 + gram_work(shapes.mlp) + shapes.heads**2 // shapes.head_count
    return {
        "residual streams": Work(own=block_forward(shapes, extent.windows, extent.length)),
        "moments": Work(moments=extent.tokens * inputs),
        "factorisations": Work(exact=_cholesky(shapes.mlp) + 10 * shapes.d_model**3),
    }


def _moments(shapes: Shapes) -> float:
    """For one token: of the MLP's hidden channels, of the heads' outputs, each with its target."""
    return sum(gram_work(width) + width * shapes.d_model for width in (shapes.mlp, shapes.heads))


def _curvature(shapes: Shapes, extent: Extent) -> float:
    """F, over as many windows as it may use."""
    window = curvature_work(shapes.heads // shapes.head_count, shapes.groups, shapes.head_count, extent.length)
    return window * affordable_windows(window, block_forward(shapes, 1, extent.length), extent.windows)


def _cholesky(width: int) -> float:
    """A factorisation and the inverse."""
    return width**3


def _factorisations(shapes: Shapes, left: int) -> float:
    """Inverse and downdates of the elimination, and the solves for the down and the output projection."""
    downdates = (shapes.mlp**3 - left**3) / 3
    solves = 2 * shapes.d_model * (shapes.mlp**2 + left**2 + shapes.heads**2)
    return _cholesky(shapes.mlp) + downdates + left**3 / 3 + shapes.heads**3 / 3 + solves


def _refit(shapes: Shapes, config: ModeGPTConfig, tokens: int, left: int) -> Work:
    """Rounds of conjugate gradients, six products of the MLP's size an iteration, and the gradient through both factors
    of the preconditioner; then the moments of what is new."""
    sample, rounds = min(tokens, REFIT_TOKENS), 1 + FINAL_ROUNDS
    halfway = (shapes.mlp + left) / 2
    widths = (halfway, *[left] * FINAL_ROUNDS)
    products = 6 * config.refit_iterations * shapes.d_model * sum(widths)
    moments = sum((1 + shapes.mlp_inputs) * gram_work(int(width)) + (3 + shapes.d_model) * width for width in widths)
    factors = sum(shapes.mlp_inputs * _cholesky(int(width)) for width in widths) + rounds * _cholesky(shapes.d_model)
    preconditioned = sum(shapes.mlp_inputs * shapes.d_model * width * (width + shapes.d_model) for width in widths)
    solves = 2 * shapes.d_model * sum(width**2 for width in widths)
    raised = sample * (products + moments) + factors + (1 + config.refit_iterations) * preconditioned
    return Work(raised=raised, exact=solves)


def _final_gain(shapes: Shapes, extent: Extent) -> Work:
    """One Newton step by conjugate gradients: two products with the head an iteration, and a few around them."""
    tokens = gain_tokens(extent.windows, extent.length, shapes.vocabulary)
    return Work(raised=(2 * ITERATIONS + 6) * tokens * shapes.vocabulary * shapes.d_model)


def _sensitivities(shapes: Shapes, extent: Extent, variants: int | None) -> Work:
    used = sensitivity.budget(shapes.blocks, extent.windows)
    variants = variants or shapes.blocks * len(PARTS) * len(used.ratios)
    later = (shapes.blocks + 1) / 2  # blocks that a variant passes, on average, its own among them
    forwards = variants * later * block_forward(shapes, used.divergence_windows, extent.length)
    observed = shapes.blocks * block_forward(shapes, used.moment_windows + used.divergence_windows, extent.length)
    head = variants * used.divergence_windows * extent.length * shapes.vocabulary * shapes.d_model
    moments = shapes.blocks * used.moment_windows * extent.length * _moments(shapes)
    return Work(forwards + observed + head, moments, exact=shapes.blocks * _factorisations(shapes, 0))


def product_seconds(work: Work, rates: Mapping[str, float]) -> float:
    """How long the products take at `rates`, multiply-adds a second by precision."""
    return sum(getattr(work, name) / rate for name, rate in rates.items())
