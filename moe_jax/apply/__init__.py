"""A trained mixture as a file, applied to new stars with calibrated uncertainties."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
