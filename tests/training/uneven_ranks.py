"""What each process of the launch in test_uneven_ranks.py does: the same run with and without the pairs that are 0.

``python uneven_ranks.py FOLDER PIPELINE``: for every ZeRO stage a run into ``FOLDER/<stage>-skipped`` and one into
``FOLDER/<stage>-whole``, and how many micro-batches this rank ran in each update, and would have needed by itself.
"""

import json
import sys
from pathlib import Path
from typing import Any

STAGES = (1, 2, 3)


def main() -> int:
    folder, pipeline = map(Path, sys.argv[-2:])  # the launcher puts --local_rank first
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support"), str(folder)]
    import torch
    from tiny_pipeline import tiny_config

    import pcpo_fast.training.trainer
    from pcpo_fast.distributed.collectives import rank
    from pcpo_fast.engine.engine import start_distributed
    from pcpo_fast.training import update
    from pcpo_fast.training.pairs import pairs_to_run

    torch.set_num_threads(1)
    start_distributed()
    pcpo_fast.training.trainer.stop_distributed = lambda: None  # one process group for all
    for stage in STAGES:
        (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        for name in ("skipped", "whole"):
            counts: list[tuple[int, int]] = []

            def counting(plan: Any, silent: Any, size: int, whole: bool = name == "whole", counts: Any = counts) -> Any:
                made = pairs_to_run(plan, torch.zeros_like(silent) if whole else silent, size)
                counts += [(len(pairs.rows) // size, -(-int(pairs.taught.sum()) // size)) for pairs in made]
                return made

            update.pairs_to_run = counting
            config = tiny_config(
                pipeline,
                f"output_dir={folder / f'{stage}-{name}'}",
                f"prompts.train={folder / 'train.txt'}",
                "prompts.heldout=null",
                f"deepspeed={folder / 'ds.json'}",
                "rewards=[{name: 'uneven_reward:some'}]",
                "train.micro_batch_size=2",
                "checkpoint.every=0",
            )
            pcpo_fast.training.trainer.train(config)
            (folder / f"{stage}-{name}-{rank()}.json").write_text(json.dumps(counts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
