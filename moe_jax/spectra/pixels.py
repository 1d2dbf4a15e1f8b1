"""The pixels of the medium-resolution red arm: 4096 of equal width from 7100 to 8850 Angstrom, in vacuum."""

from __future__ import annotations

import numpy as np

N_PIXELS = 4096
PIXEL_EDGES = np.linspace(7100.0, 8850.0, N_PIXELS + 1)
WAVE = 0.5 * (PIXEL_EDGES[1:] + PIXEL_EDGES[:-1])
