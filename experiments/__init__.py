"""The experiments, each a command: ``python -m experiments.NAME --help``."""

import gc
import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import moe_jax  # noqa: F401  before NumPy: see there

# Imports create some 100,000 objects, none of which is garbage. By default Python would look through them two hundred times.
gc.set_threshold(50_000)

#: Packages that help, and the check of a command line, do not need.
LOADED_WHEN_USED = ("pandas", "optax", "h5py", "scipy")


class _LoadedWhenUsed(ModuleType):
    """A module whose code runs when one of its names is first asked for."""

    def __getattr__(self, name: str) -> Any:
        object.__setattr__(self, "__class__", ModuleType)
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


for _name in LOADED_WHEN_USED:
    if _name not in sys.modules and (_spec := find_spec(_name)) is not None:
        sys.modules[_name] = module_from_spec(_spec)
        sys.modules[_name].__class__ = _LoadedWhenUsed
