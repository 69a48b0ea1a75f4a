"""What each process of the launch in test_two_ranks.py does: several things, since starting takes most of the time.

``python two_ranks.py FOLDER PIPELINE MODE...``: records for the equality of ranks in each mode, a run of one epoch, and
the same run resumed, whose second rank loses its reward model in the third epoch; exits with what ``train`` does. The
run compiles its blocks if it can, as on a GPU, which its second rank cannot.
"""

import sys
from pathlib import Path
from typing import Any

MODES = ("full", "lora")
SMALL = ("sampler.steps=3", "rollout.images_per_prompt=4", "train.epochs=1", "train.micro_batch_size=2")
"""Settings of the records: no rank has a whole group, and no micro-batch falls between updates of either."""
GROUP = 4


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    (folder, pipeline), modes = map(Path, arguments[:2]), arguments[2:]
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "benchmarks"), str(folder)]
    import numpy as np
    import rank_equality
    import torch

    import pcpo_fast.training.trainer
    from pcpo_fast.cli import main as command
    from pcpo_fast.distributed.collectives import rank
    from pcpo_fast.engine.engine import start_distributed
    from pcpo_fast.policies import automatic
    from pcpo_fast.policies.speed import COMPILE_OPTIONS

    def backend(graph: Any, examples: Any) -> Any:
        if rank() == 1:
            raise RuntimeError("the second rank has no registers left")
        return graph.forward

    torch.set_num_threads(1)
    start_distributed()
    pcpo_fast.training.trainer.stop_distributed = lambda: None  # one process group for all
    for mode in modes:
        found = rank_equality.record(f"zero3-{mode}-float32", folder, pipeline, *SMALL)
        if found:
            np.savez(folder / f"{mode}.npz", **found)  # type: ignore[arg-type]
    automatic.compile_problem = lambda device: None
    COMPILE_OPTIONS["backend"] = backend
    code = 0
    for epochs in (1, 4):
        code = command(["train", "--config", str(folder / "two.yaml"), f"train.epochs={epochs}"])
    return code


if __name__ == "__main__":
    raise SystemExit(main())
