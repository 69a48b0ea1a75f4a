"""Determines this process's rank from the environment variables of launchers and job schedulers."""

import os
import re
from collections.abc import Mapping, MutableMapping

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
"""Variables that torchrun and DeepSpeed's launcher set for every process."""
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT")
SLURM_NAMES = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
)
"""Variables that srun sets for every task of a step."""
OTHER_SIZES = ("PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Number of processes under MPICH, Intel MPI and MVAPICH, which do not set everything else that is needed."""
HOW = "start the run with torchrun, deepspeed or srun (examples/launching)"


def launcher_rank() -> int:
    """This process's rank as set by the launcher; valid even before the process group exists."""
    return int(os.environ.get("RANK", "0"))


def launcher_world_size() -> int:
    """Number of processes as set by the launcher; valid even before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def adopt_launch(environment: MutableMapping[str, str] = os.environ) -> int:
    """Complete the launcher's variables and return the number of processes of the run.

    If the launcher set no RANK, the values come from srun's or Open MPI's variables. Afterwards the environment either
    has all of :data:`NAMES` or describes a single process.

    Raises:
        UserError: the variables are empty, malformed, incomplete or contradictory; or several processes were started
            and this process's rank is unknown.
    """
    for name in (name for name in dict.fromkeys((*NAMES, *NUMBERS)) if name in environment):
        if not environment[name].strip():
            raise UserError(f"the environment variable {name} is set but empty: {HOW}, or unset it")
        if name in NUMBERS:
            _check_number(name, environment[name])
    if "RANK" not in environment:
        found = _of_slurm(environment) or _of_open_mpi(environment)
        for name, value in found.items():
            if name in NUMBERS and name != "MASTER_PORT" and int(environment.get(name, value)) != int(value):
                raise UserError(
                    f"the environment variable {name} is {environment[name]}, but the job sets {value}: unset {name}"
                )
            environment.setdefault(name, value)
    if not any(name in environment for name in NAMES):
        _refuse_other_launchers(environment)
        return 1
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in environment]
    if not missing and int(environment["WORLD_SIZE"]) > 1:
        missing = [name for name in NAMES if name not in environment]
    if missing:
        there = [name for name in NAMES if name in environment]
        raise UserError(
            f"{', '.join(there)} set in the environment but {', '.join(missing)} not, so it is unknown which process "
            f"of the run this is: {HOW}; for a single process unset {', '.join(there)}"
        )
    _check(environment)
    return int(environment["WORLD_SIZE"])


def _check_number(name: str, text: str) -> None:
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise UserError(f"the environment variable {name} must be an integer of at least 0, got {text!r}")


def _check(environment: Mapping[str, str]) -> None:
    values = {name: int(environment[name]) for name in NUMBERS if name in environment}
    rank, size, local = values["RANK"], values["WORLD_SIZE"], values.get("LOCAL_RANK", 0)
    here = values.get("LOCAL_WORLD_SIZE", values.get("LOCAL_SIZE", size))  # DeepSpeed's launcher sets LOCAL_SIZE
    if not (rank < size and local < here <= size):
        found = ", ".join(f"{name}={value}" for name, value in values.items() if name != "MASTER_PORT")
        raise UserError(
            f"the environment variables contradict each other ({found}): a rank must be less than the number of ranks "
            f"in the run and on its machine; {HOW}"
        )
    if not 0 < values.get("MASTER_PORT", 1) < 65536:
        raise UserError(
            f"the environment variable MASTER_PORT must be between 1 and 65535, got {values['MASTER_PORT']}"
        )


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables for a task of srun; empty outside of a task, as in the shell of salloc."""
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    if "SLURM_PROCID" not in environment:
        return {}
    if size == "1":
        if environment["SLURM_PROCID"].strip() not in ("", "0"):
            raise UserError(
                f"Slurm's variables contradict each other: SLURM_PROCID is {environment['SLURM_PROCID']}, but there is "
                f"only one task; {HOW}"
            )
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    _check_number("SLURM_STEP_NUM_TASKS", size)
    missing = [name for name in SLURM_NAMES if not environment.get(name, "").strip()]
    if missing:
        raise UserError(
            f"the Slurm job has {counted(int(size), 'task')}, but it is unknown which of them this process is "
            f"({', '.join(missing)} not set; srun sets them): {HOW}; for a single process use --ntasks=1, with "
            "--cpus-per-task for its cores"
        )
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        _check_number(name, environment[name])
    job, step = (int("0" + re.sub("[^0-9]", "", environment[name])) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    first = re.split(r",(?![^\[]*\])", environment["SLURM_STEP_NODELIST"])[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_of_node(environment)),
        "MASTER_ADDR": re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first),
        # Two job steps on one machine must not use the same port.
        "MASTER_PORT": str(20000 + (job + 1009 * step) % 20000),
    }


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Number of tasks on this node, from Slurm's compressed list, e.g. "2(x3),1"."""
    counts: list[int] = []
    for entry in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", entry.strip())
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    number = environment["SLURM_NODEID"]
    if not number.isdecimal() or int(number) >= len(counts):
        raise UserError(
            f"Slurm's variables contradict each other: SLURM_NODEID is {number}, but SLURM_STEP_TASKS_PER_NODE="
            f"{environment['SLURM_STEP_TASKS_PER_NODE']} lists {counted(len(counts), 'node')}; {HOW}"
        )
    return counts[int(number)]


def _of_open_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables for a process of Open MPI's mpirun; the address only if all are on this machine."""
    size = environment.get("OMPI_COMM_WORLD_SIZE")
    if size is None:
        return {}
    _check_number("OMPI_COMM_WORLD_SIZE", size)
    parts = {"RANK": "RANK", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}
    found = {name: environment.get(f"OMPI_COMM_WORLD_{part}", "") for name, part in parts.items()}
    for name, value in found.items():
        if not value.isdecimal():
            raise UserError(
                f"mpirun started {counted(int(size), 'process')}, but OMPI_COMM_WORLD_{parts[name]} is not set to an "
                f"integer: {HOW}"
            )
    if size == found["LOCAL_WORLD_SIZE"]:
        found["MASTER_ADDR"] = "127.0.0.1"
    elif "MASTER_ADDR" not in environment:
        raise UserError(
            f"mpirun started {counted(int(size), 'process')} on several machines, but the host of rank 0 is unknown: "
            "set it with mpirun -x MASTER_ADDR=HOST"
        )
    return found | {"WORLD_SIZE": size}


def _refuse_other_launchers(environment: Mapping[str, str]) -> None:
    for name in OTHER_SIZES:
        size = environment.get(name, "1")
        if size.isdecimal() and int(size) > 1:
            raise UserError(
                f"{counted(int(size), 'process')} were started ({name}), but RANK, WORLD_SIZE, LOCAL_RANK and "
                f"MASTER_ADDR are not set: {HOW}"
            )
