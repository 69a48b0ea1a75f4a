"""The example launchers: what they hand to ``train.py``, seen by launchers that only print."""

import os
import subprocess
from pathlib import Path

import pytest

from pcpo_fast.cli import parse
from pcpo_fast.config_loading import load_config

ROOT = Path(__file__).parents[1]
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
    options, passed = given[: given.index("train.py")], given[given.index("train.py") + 1 :]
    if launcher == "torchrun":
        assert dict(zip(options[::2], options[1::2], strict=True)) == {
            "--nnodes": "2",
            "--node_rank": "1",
            "--nproc_per_node": "8",
            "--master_addr": variables.get("FIRST", "node1"),
            "--master_port": "20007" if script == "slurm.sh" else "29500",
        }
    monkeypatch.chdir(ROOT)
    parsed = parse(["train", *passed])
    config = load_config(parsed.config, parsed.overrides)
    assert config.optimizer.lr == 2e-6 and Path(str(config.deepspeed)).is_file()
    assert config.output_dir == "runs/flux_two_machines"


def test_the_host_file_is_deepspeeds() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(FOLDER / "hostfile")) == {"node1": 8, "node2": 8}
