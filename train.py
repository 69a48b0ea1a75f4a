"""Train a policy: ``python train.py --config FILE key=value``, or ``deepspeed train.py ...`` on several GPUs.

The same as ``pcpo-fast train``. Without arguments it runs the demo, from whatever folder it is called.
"""

import os
import sys
from pathlib import Path

from pcpo_fast.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        os.chdir(Path(__file__).resolve().parent)  # the demo's paths are relative to the project
    raise SystemExit(main(["train", *arguments]))
