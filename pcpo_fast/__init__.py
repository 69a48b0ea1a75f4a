"""Train FLUX and Stable Diffusion with Proportionate Credit Policy Optimization.

For notebooks and scripts (docs/python.md)::

    import pcpo_fast

    run = pcpo_fast.train("configs/tiny_flux.yaml", {"train.epochs": 20})
    run.before_after

Importing the package loads neither PyTorch nor any other library; the first call does.
"""

import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "evaluate", "export", "load_config", "sample", "train"]

_FUNCTIONS = {
    "load_config": "configuration",
    "train": "training",
    "sample": "sampling",
    "evaluate": "evaluating",
    "compare": "comparing",
    "export": "exporting",
}
"""Public functions, and their modules in :mod:`pcpo_fast.interface`."""


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"pcpo_fast.interface.{_FUNCTIONS[name]}")
    found = import_module("pcpo_fast.interface.for_python").for_python(getattr(module, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__


def _check_kernels() -> None:
    """Check the version of pcpo_kernels, which this package bundles: another copy may have been installed over it."""
    spec = find_spec("pcpo_kernels")  # importing it would load PyTorch
    if spec is None or spec.origin is None:
        return
    file = Path(spec.origin).with_name("version.py")
    found = run_path(str(file))["__version__"] if file.is_file() else "of unknown version"
    if found != __version__:
        raise ImportError(
            f"pcpo_fast {__version__} needs pcpo_kernels {__version__}, but {file.parent} is {found}: uninstall "
            "pcpo-kernels, then reinstall pcpo-fast, which bundles the right version"
        )


_check_kernels()

# Importing peft imports bitsandbytes, which on a CPU with AVX512-BF16 looks for a 4-bit kernel on the Hugging Face hub
# and warns if there is none. Nothing here uses that kernel: it is for modules in evaluation mode.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in str(record.msg)
)
