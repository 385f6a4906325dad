"""Remove hidden channels of an MLP, or of one of its experts, by the moments of its down projection's input."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit
from optimum_modegpt.decompositions.nystrom import Elimination, eliminate_rows, remaining
from optimum_modegpt.decompositions.psd import add_diagonal, inverse


def eliminate_channels(
    dense: Tensor, moments: LinearMoments, metric: Tensor, rank: int, config: ModeGPTConfig
) -> Elimination:
    """Remove channels until `rank` are left. `dense` is the dense down. All ranks of a run remove the same ones."""
    ridge = moments.ridge(config.output_ridge)
    inverse_hessian = inverse(add_diagonal(moments.gram, ridge))
    best = inverse_hessian @ (moments.cross + ridge * dense)
    found = eliminate_rows(inverse_hessian, best @ metric, moments.width - rank, protected=int(moments.ones))
    return Elimination(distributed.broadcast(found.order), distributed.broadcast(found.costs))


def without_channels(
    dense: Tensor, moments: LinearMoments, order: Tensor, config: ModeGPTConfig
) -> tuple[Tensor, Tensor, LinearMoments]:
    """Return the channels that are not in `order`, and the dense down and the moments of these.

    Down is refitted to its own output with all channels.
    """
    kept = remaining(order, moments.width)
    index = moments.with_constant(kept)
    own = (moments.gram @ dense)[index]
    moments = moments.kept(kept)
    return kept, refit_to_dense(moments, own, dense[index], config), moments


def refit_to_dense(moments: LinearMoments, own: Tensor, present: Tensor, config: ModeGPTConfig) -> Tensor:
    """Refit an output projection to the dense output, from which the refit to the residual then starts.

    `own` is the cross moment with the dense output, which has no noise. The ridge therefore can be small.
    """
    return centred_refit(replace(moments, cross=own), present, moments.ridge(config.output_ridge))
