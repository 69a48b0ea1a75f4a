"""What a run needs besides its model, read and checked before anything large is loaded."""

import importlib.util
import os
from dataclasses import dataclass

import torch

from pcpo_fast.config import Config, LoggingConfig
from pcpo_fast.distributed import local_rank
from pcpo_fast.eight_bit_adamw import check_eight_bit
from pcpo_fast.engine import deepspeed_config
from pcpo_fast.epoch_plan import accumulation_steps
from pcpo_fast.errors import UserError
from pcpo_fast.prompts import Prompt, epoch_prompts, load_prompts
from pcpo_fast.reporting.loggers import check_wandb_options
from pcpo_fast.rewards import RewardSet
from pcpo_fast.step_tables import RunTables


@dataclass(frozen=True)
class RunInputs:
    """Prompts and rewards of a run.

    Attributes:
        prompts: those to train on.
        heldout: those to evaluate on; empty where there is no held-out file.
        rewards: ready to score.
        trained: those of ``prompts`` that some epoch of the run samples, by index.
    """

    prompts: list[Prompt]
    heldout: list[Prompt]
    rewards: RewardSet
    trained: list[int]

    @classmethod
    def load(cls, config: Config) -> "RunInputs":
        """Read the files that the configuration names, and refuse what cannot work; the quick checks come first.

        Raises:
            UserError: a file is missing or malformed; sampler, credit and batch sizes do not go together; a logger or
                a reward cannot be had.
        """
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())  # a reward that loads a model puts it on this rank's GPU
        prompts = load_prompts(config.prompts.train)
        path = config.prompts.heldout
        heldout = [] if path is None else load_prompts(path)[: config.evaluation.prompts]
        deepspeed_config(config, accumulation=1)
        if config.optimizer.moments == "8bit":
            check_eight_bit()
        _check_logging(config.logging)
        _check_tables(config)
        per_epoch, seed = config.rollout.prompts_per_epoch, config.seed
        epochs = (epoch_prompts(len(prompts), per_epoch, epoch, seed) for epoch in range(config.train.epochs))
        trained = sorted({index for epoch in epochs for index in epoch})
        return cls(prompts, heldout, RewardSet(config.rewards, config.scoring), trained)

    @property
    def texts(self) -> list[str]:
        """Every prompt that the run needs the model's conditioning of, once: of a long list not all are."""
        trained = (self.prompts[index].text for index in self.trained)
        return list(dict.fromkeys([*trained, *(prompt.text for prompt in self.heldout)]))


def _check_tables(config: Config) -> None:
    """Refuse a sampler, credit rule or batch size that cannot be; with the pipeline's own grid only it can tell."""
    if config.sampler.grid == "shifted" and config.sampler.name != "ddim":
        tables = RunTables(config, None, torch.device("cpu"))
        accumulation_steps(config, tables.trained_count, int(os.environ.get("WORLD_SIZE", "1")))


def _check_logging(settings: LoggingConfig) -> None:
    if settings.wandb is not None:
        check_wandb_options(settings.wandb)
    for key, wanted in (("tensorboard", settings.tensorboard), ("wandb", settings.wandb is not None)):
        if wanted and importlib.util.find_spec(key) is None:
            off = "false" if key == "tensorboard" else "null"
            raise UserError(
                f"logging.{key}: {key} is not installed: run `pip install {key}`, or set logging.{key}={off}"
            )
