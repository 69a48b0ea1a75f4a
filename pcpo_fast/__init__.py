"""Train FLUX and Stable Diffusion with Proportionate Credit Policy Optimization."""

import logging
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

__version__ = "0.1.0"


def _check_kernels() -> None:
    """pcpo_kernels comes with this package, and a copy of another version may have been installed over it."""
    spec = find_spec("pcpo_kernels")  # importing it would load PyTorch
    if spec is None or spec.origin is None:
        return
    file = Path(spec.origin).with_name("version.py")
    found = run_path(str(file))["__version__"] if file.is_file() else "of unknown version"
    if found != __version__:
        raise ImportError(
            f"pcpo_fast {__version__} needs pcpo_kernels {__version__}, and {file.parent} is {found}: uninstall "
            "pcpo-kernels, and install pcpo-fast again, which brings its own"
        )


_check_kernels()

# Importing peft imports bitsandbytes, which on a CPU with AVX512-BF16 looks for a 4-bit kernel on the Hugging Face hub
# and warns where there is none. Nothing here uses that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in str(record.msg)
)
