"""Train FLUX and Stable Diffusion with Proportionate Credit Policy Optimization."""

import logging

__version__ = "0.1.0"

# Importing peft imports bitsandbytes, which on a CPU with AVX512-BF16 looks for a 4-bit kernel on the Hugging Face hub
# and warns where there is none. Nothing here uses that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in str(record.msg)
)
