"""Mixtures of closed-form ridge experts for stellar spectra, and the gates that mix them.

``core`` holds arrays and linear algebra. ``spectra`` simulates and reads spectra. ``experts`` fits one ridge regression a cell.
``gates`` turns spectral features into weights. ``evaluate`` scores and compares predictions. ``apply`` predicts new stars.
``mixture`` and ``estimator`` fit a mixture to any data.

Dimensions in docstrings and annotations: N stars, P pixels, K experts (or cells), F gate features, B bootstrap resamples,
A alphas, E epochs, G groups, R components of the model grid.
"""

import os

import lazy_loader

# NumPy and SciPy have an OpenBLAS each, whose threads wait for more work in a loop and keep the other's from the processor.
# With this, they sleep at once: factorisations between products take two thirds of the time. It is read where a library is loaded.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

__version__ = "0.1.0"
# Names are imported from their modules when they are first used; __init__.pyi lists them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
