"""The 3 x 3 grid of cells in effective temperature and metallicity, one for each expert."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, by_numpy, namespace
from moe_jax.core.convert import convert_arguments

T_EFF_EDGES = (3750.0, 4500.0, 5250.0, 6000.0)  # K
M_H_EDGES = (-2.0, -1.0, 0.0, 0.5)  # dex
T_EFF_NAMES = ("Cool", "Mid", "Hot")
M_H_NAMES = ("Metal-poor", "Solar", "Metal-rich")
CELL_NAMES = tuple(f"{t} {m}" for t in T_EFF_NAMES for m in M_H_NAMES)
N_CELLS = len(CELL_NAMES)
NOT_COVERED = -1


def _bin(values: AnyArray, edges: tuple[float, ...]) -> AnyArray:
    """Index of the bin of each value, lower edges inclusive, the last upper edge too; -1 outside."""
    xp = namespace(values)
    boundaries = xp.asarray(edges, values.dtype)
    index = xp.searchsorted(boundaries, values, side="right").astype(np.int32) - 1
    index = xp.where(values == boundaries[-1], len(edges) - 2, index)
    return xp.where((index >= 0) & (index < len(edges) - 1), index, -1)


@convert_arguments()
@by_numpy
def assign_cells(T_eff: Float[AnyArray, " N"], M_H: Float[AnyArray, " N"]) -> Int[AnyArray, " N"]:
    """Cell of each star: 3 * (T_eff bin) + ([M/H] bin), or -1 for a star that no cell covers (NaN labels included).

    Args:
        T_eff: effective temperature, K.
        M_H: metallicity, dex.

    Raises:
        InputError: where the shapes disagree.
    """
    t, m = _bin(T_eff, T_EFF_EDGES), _bin(M_H, M_H_EDGES)
    return namespace(t).where((t >= 0) & (m >= 0), 3 * t + m, NOT_COVERED)


@convert_arguments()
def nearest_cells(T_eff: Float[AnyArray, " N"], M_H: Float[AnyArray, " N"]) -> Int[jax.Array, " N"]:
    """Cell of each star after its labels are clamped to the range of the cells: no star is left over, but for NaN labels."""
    return assign_cells(T_eff.clip(T_EFF_EDGES[0], T_EFF_EDGES[-1]), M_H.clip(M_H_EDGES[0], M_H_EDGES[-1]))
