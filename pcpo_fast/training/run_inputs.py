"""A run's inputs other than the model, read and checked before anything large is loaded."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pcpo_fast.config.schema import Config, LoggingConfig
from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import once_per_machine, own_gpu
from pcpo_fast.distributed.launching import launcher_world_size
from pcpo_fast.engine.eight_bit_adamw import check_eight_bit
from pcpo_fast.engine.engine import deepspeed_config
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import RECORD_FOLDER, Contents, digest, part_files
from pcpo_fast.policies.families import model_files
from pcpo_fast.policies.folder_checks import SINGLE_FILES
from pcpo_fast.policies.four_bit import check_base_weights
from pcpo_fast.prompts import Prompt, load_prompts, trained_prompts
from pcpo_fast.reporting.loggers import check_trackio_options, check_wandb_options, missing_package
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rollout.epoch_plan import check_sizes
from pcpo_fast.runs.input_record import Input
from pcpo_fast.training.idle_settings import idle_settings


@dataclass(frozen=True)
class RunInputs:
    """Prompts and rewards of a run.

    Attributes:
        prompts: the training prompts.
        heldout: the held-out prompts; empty without a held-out file.
        rewards: the loaded rewards.
        trained: indices of the ``prompts`` that are sampled in some epoch of the run.
    """

    prompts: list[Prompt]
    heldout: list[Prompt]
    rewards: RewardSet
    trained: list[int]

    @classmethod
    def load(cls, config: Config) -> "RunInputs":
        """Read the files of the configuration and check it, quick checks first.

        Raises:
            UserError: a file is missing or malformed; sampler, credit and batch sizes contradict each other; a logger
                or a reward cannot be loaded.
        """
        if torch.cuda.is_available():
            torch.cuda.set_device(own_gpu())  # so that rewards load their models onto this rank's GPU
        prompts, heldout = checked_prompts(config)
        trained = trained_prompts(len(prompts), config.rollout.prompts_per_epoch, config.train.epochs, config.seed)
        rewards = RewardSet(config.rewards, config.scoring)
        if config.advantage.steps != "final":
            rewards.check_predictions()
        rewards.check_prompts(prompts, f"prompts.train={config.prompts.train}", evaluation=False)
        rewards.check_prompts(heldout, f"prompts.heldout={config.prompts.heldout}")
        return cls(prompts, heldout, rewards, trained)

    @property
    def texts(self) -> list[str]:
        """All distinct prompts that the run encodes; a long prompt list may not be used completely."""
        trained = (self.prompts[index].text for index in self.trained)
        return list(dict.fromkeys([*trained, *(prompt.text for prompt in self.heldout)]))


def checked_prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, once everything is checked that needs neither the model nor the rewards.

    Raises:
        UserError: as :meth:`RunInputs.load`.
    """
    prompts = load_prompts(config.prompts.train, config.prompts.column)
    path = config.prompts.heldout
    heldout = [] if path is None else load_prompts(path, config.prompts.column)[: config.evaluation.prompts]
    deepspeed_config(config, accumulation=1)
    if config.optimizer.moments == "8bit":
        check_eight_bit()
    check_base_weights(config.model)
    _check_logging(config.logging)
    check_sizes(config, launcher_world_size())
    return prompts, heldout


def doubts(config: Config, prompts: Sequence[Prompt], heldout: Sequence[Prompt], ranks: int) -> list[str]:
    """One sentence for each thing that a run can be begun with, but that is probably not meant.

    These are held-out prompts that are trained on, too, whatever their metadata, and :func:`idle_settings`.
    """
    texts = {prompt.text for prompt in prompts}
    shared = sum(prompt.text in texts for prompt in heldout)
    overlap = (
        f"prompts.heldout: shares {shared} of its {counted(len(heldout), 'prompt')} with prompts.train, so the "
        "held-out reward includes prompts that are trained on"
    )
    return [overlap] * bool(shared) + idle_settings(config, len(prompts), len(heldout), ranks)


def read_contents(config: Config, inputs: RunInputs, *, anew: bool = False) -> dict[str, Input]:
    """Content hashes of everything besides settings that determines a run's result; all ranks must call it.

    These are the base model's files, prompts with their metadata, and the sources of rewards. Not included are remote
    rewards, and modules that a user's reward imports.

    Args:
        config: the run.
        inputs: its loaded inputs.
        anew: read every file again, ignoring remembered hashes.

    Raises:
        UserError: the model is missing, or a file cannot be read.
    """
    model = config.model.model_dump()
    single = {f"model.{name}" for name in SINGLE_FILES}  # listed separately below
    files = {"model.path": {name: file for name, file in model_files(config.model).items() if name not in single}}
    paths = {"model.path": config.model.path}
    for key, path in (("lora.init", config.model.lora.init), *((name, model.get(name)) for name in SINGLE_FILES)):
        if path is not None and (place := Path(path).expanduser()).exists():
            files[f"model.{key}"] = part_files(place) if place.is_dir() else {place.name: place}
            paths[f"model.{key}"] = str(place if place.is_dir() else place.parent)
    code: dict[str, Input] = {}
    for reward, sources in inputs.rewards.sources.items():
        for what, given in sources.items():
            key, own = (
                f"reward {reward}, {what}",
                {name: file for name, file in given.items() if isinstance(file, Path)},
            )
            if texts := {name: digest(text) for name, text in given.items() if isinstance(text, str)}:
                code[key] = {"path": "the notebook", "files": texts}
            else:
                files[key], paths[key] = own, str(next((file.parent for file in own.values()), ""))
    contents = Contents(config.embedding_folder / RECORD_FOLDER, anew=anew)
    read = once_per_machine(lambda: {name: contents.of_files(given) for name, given in files.items()})
    prompts = {"prompts.train": _of_prompts(config.prompts.train, inputs.prompts)}
    if config.prompts.heldout is not None:
        prompts["prompts.heldout"] = _of_prompts(config.prompts.heldout, inputs.heldout)
    return prompts | code | {name: {"path": paths[name], "files": given} for name, given in read.items()}


def _of_prompts(path: str, prompts: list[Prompt]) -> Input:
    rows = [[row.text, json.dumps(row.metadata, sort_keys=True, default=lambda _: "not JSON")] for row in prompts]
    return {"path": path, "count": len(prompts), "hash": digest(rows)}


def _check_logging(settings: LoggingConfig) -> None:
    if settings.wandb is not None:
        check_wandb_options(settings.wandb)
    if settings.trackio is not None:
        check_trackio_options(settings.trackio)
    wanted = {"tensorboard": settings.tensorboard, "wandb": settings.wandb, "trackio": settings.trackio}
    for key in (key for key, value in wanted.items() if value is not None and value is not False):
        try:
            importlib.import_module(key)
        except ImportError as error:  # of the package, or of one that it needs
            missing = missing_package(error, key)
            off = "false" if key == "tensorboard" else "null"
            raise UserError(
                f"logging.{key}: {missing} is not installed: run `pip install {missing}`, or set logging.{key}={off}"
            ) from None
