"""The example launchers: what they hand to ``pcpo-fast train``, seen by launchers that only print; and which process
of a run this is, by the variables that launchers and job schedulers set."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pcpo_fast.cli import parse
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.shipped import find
from pcpo_fast.distributed.collectives import own_gpu
from pcpo_fast.distributed.launching import adopt_launch
from pcpo_fast.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "launching"
# What a launcher calls, and what it needs besides.
CASES = {
    "deepspeed.sh": ("deepspeed", [], {}),
    "torchrun.sh": ("torchrun", ["1"], {"FIRST": "here"}),
    "slurm.sh": (
        "torchrun",
        [],
        {
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": "20007",
            "SLURM_NNODES": "2",
            "SLURM_NODEID": "1",
        },
    ),
}
PRINTING = '#!/usr/bin/env bash\nprintf "%s\\n" "$(basename "$0")" "$@"\n'
HELPERS = {"scontrol": "#!/usr/bin/env bash\necho node1\necho node2\n", "srun": '#!/usr/bin/env bash\nshift\n"$@"\n'}


@pytest.mark.parametrize("script", CASES)
def test_a_launcher_passes_on_settings_that_train_takes(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, arguments, variables = CASES[script]
    for name, text in {launcher: PRINTING, **HELPERS}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    setting = "optimizer.lr=2e-6"
    command = ["bash", str(FOLDER / script), *arguments, setting]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    name, *given = done.stdout.splitlines()
    assert name == launcher
    start = given.index("pcpo_fast")
    options, [flag, module, *passed] = given[: start - 1], given[start - 1 :]
    assert [flag, module, passed[0]] == ["-m" if launcher == "torchrun" else "--module", "pcpo_fast", "train"]
    if launcher == "torchrun":
        assert dict(zip(options[::2], options[1::2], strict=True)) == {
            "--nnodes": "2",
            "--node_rank": "1",
            "--nproc_per_node": "8",
            "--master_addr": variables.get("FIRST", "node1"),
            "--master_port": "20007" if script == "slurm.sh" else "29500",
        }
    monkeypatch.chdir(tmp_path)  # a folder without the project
    parsed = parse(passed)
    config = load_config(parsed.config, parsed.settings)
    assert config.optimizer.lr == 2e-6 and find(str(config.deepspeed)).is_file()
    assert config.output_dir == "runs/flux_two_machines"


RECIPES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/run.sh"))


@pytest.mark.parametrize("where", ["PYTHON", "VIRTUAL_ENV", "PATH"])
@pytest.mark.parametrize("recipe", RECIPES[:1] + RECIPES[-1:])
def test_a_recipe_finds_python_and_takes_paths_from_where_its_user_stands(
    recipe: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "env" / "bin" / ("python3" if where == "PATH" else "python")
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\necho "$PWD $*" >> "$LOG"\n')
    python.chmod(0o755)
    copied = shutil.copytree(ROOT / "examples", tmp_path / "checkout" / "examples")  # with no .venv beside it
    user = tmp_path / "user"
    user.mkdir()
    given = {
        "PYTHON": str(python),
        "VIRTUAL_ENV": str(python.parents[1]),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VIRTUAL_ENV")}
    environment |= {where: given[where], "LOG": str(tmp_path / "log")}
    command = ["bash", str(copied / recipe / "run.sh"), "prompts.train=mine.txt", "prompts.heldout=null"]
    subprocess.run(command, env=environment, cwd=user, check=True, stdin=subprocess.DEVNULL)
    found, preflight, train = (tmp_path / "log").read_text().splitlines()
    assert found.endswith("import pcpo_fast")
    assert preflight.startswith(f"{user} -m pcpo_fast preflight --config {copied / recipe / 'config.yaml'} --gpus")
    assert train.startswith(f"{user} -m ")
    words = train.split()
    monkeypatch.chdir(user)
    parsed = parse(["train", *words[words.index("train") + 1 :]])
    config = load_config(parsed.config, parsed.settings)
    assert config.prompts.train == "mine.txt"
    assert config.deepspeed is None or find(config.deepspeed).is_file()


def test_a_recipe_without_python_says_so(tmp_path: Path) -> None:
    copied = shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "python").symlink_to("python3")
    command = ["bash", str(copied / RECIPES[0] / "run.sh")]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no Python with pcpo_fast found: run make install")


def test_the_host_file_is_deepspeeds() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(FOLDER / "hostfile")) == {"node1": 8, "node2": 8}


# What srun sets for the second task of the second of three machines, as its manual has it.
SRUN = {
    "SLURM_JOB_ID": "20007",
    "SLURM_STEP_ID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
ONE_TASK = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OF_SRUN = {
    "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "21016",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "added"),
    [
        ({}, {}),
        (ONE_TASK, SINGLE),
        (ONE_TASK | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, SINGLE),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, {}),  # the shell of salloc
        (SINGLE, {}),
        (SINGLE | SRUN, {}),  # a single process on purpose, as a comparison starts them
        (TORCHRUN, {}),
        (TORCHRUN | SRUN, {}),  # torchrun within srun
        (SRUN, OF_SRUN),
        (SRUN | {"SLURM_STEP_NODELIST": "r[1-2]n[3-4],x"}, OF_SRUN | {"MASTER_ADDR": "r1n3"}),
        (SRUN | {"SLURM_STEP_NODELIST": "node-a,node-b"}, OF_SRUN | {"MASTER_ADDR": "node-a"}),
        (SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "5", "WORLD_SIZE": "5"}, OF_SRUN),
        (
            MPIRUN,
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"},
        ),
        (
            MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a"},
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        ),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, {}),
    ],
)
def test_the_environment_says_which_process_this_is(environment: dict[str, str], added: dict[str, str]) -> None:
    found = dict(environment)
    expected = added | environment
    assert adopt_launch(found) == int(expected.get("WORLD_SIZE", "1"))
    assert found == expected
    assert adopt_launch(found) == int(expected.get("WORLD_SIZE", "1"))  # once more, it is whole
    assert found == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        *(({**TORCHRUN, name: " "}, f"the environment variable {name} is set but empty") for name in TORCHRUN),
        *(({**TORCHRUN, "RANK": text}, "RANK must be an integer of at least 0, got") for text in ("x", "-1", "1.0")),
        ({"MASTER_ADDR": "a"}, "MASTER_ADDR set in the environment but RANK, WORLD_SIZE not, .* unset MASTER_ADDR"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE set in the environment but RANK not"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK set in the environment but RANK, WORLD_SIZE not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE set in the environment but LOCAL_RANK, MASTER_ADDR not"),
        (TORCHRUN | {"RANK": "4"}, "contradict each other .RANK=4, WORLD_SIZE=4"),
        (SINGLE | {"WORLD_SIZE": "0"}, "contradict each other"),
        (SINGLE | {"LOCAL_RANK": "1"}, "contradict each other"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "contradict each other"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "contradict each other"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT must be between 1 and 65535, got 70000"),
        (SRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but the job sets 5: unset WORLD_SIZE"),
        (ONE_TASK | {"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but the job sets 1"),
        *(
            (SRUN | {name: text}, f"{name} must be an integer of at least 0, got '{text}'")
            for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
            for text in ("x", "-1")
        ),
        (MPIRUN | {"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE must be an integer"),
        (ONE_TASK | {"SLURM_PROCID": "1"}, "contradict each other: SLURM_PROCID is 1, but there is only one task"),
        (SRUN | {"SLURM_NODEID": "3"}, "SLURM_NODEID is 3, but SLURM_STEP_TASKS_PER_NODE=.* lists 3 nodes"),
        (SRUN | {"SLURM_LOCALID": "2"}, "contradict each other"),
        (SRUN | {"SLURM_LOCALID": ""}, "the Slurm job has 5 tasks, .* .SLURM_LOCALID not set; srun sets them"),
        # The script of a job of several tasks, started without srun.
        (
            ONE_TASK | {"SLURM_NTASKS": "2"},
            "the Slurm job has 2 tasks, but it is unknown which of them this process is",
        ),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "the host of rank 0 is unknown: .*mpirun -x MASTER_ADDR=HOST"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes, but OMPI_COMM_WORLD_RANK is not set"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "4 processes were started .PMI_SIZE."),
    ],
)
def test_variables_that_do_not_say_which_process_this_is(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        adopt_launch(dict(environment))
    assert "\n" not in str(caught.value)


def test_a_machine_with_fewer_gpus_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="LOCAL_RANK is 1, counted from 0, and PyTorch sees 1 GPU on this machine"):
        own_gpu()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert own_gpu() == 1
