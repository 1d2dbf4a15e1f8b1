"""Where spectra come from: the model grid, simulated surveys, files, spectra as observed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
