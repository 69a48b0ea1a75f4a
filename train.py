"""Train a policy: ``python train.py --config FILE key=value``, or ``deepspeed train.py ...`` on several GPUs.

The same as ``pcpo-fast train``. Without ``--config`` it runs the demo, from whatever folder it is called.
"""

import os
import sys
from pathlib import Path

from pcpo_fast.cli import program

if __name__ == "__main__":
    arguments, project = sys.argv[1:], Path(__file__).resolve().parent
    demo = not any(argument == "--config" or argument.startswith("--config=") for argument in arguments)
    if demo and Path.cwd() != project:
        os.chdir(project)  # the demo's paths are relative to the project
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"Working in {project}", file=sys.stderr)
    program(["train", *arguments])
