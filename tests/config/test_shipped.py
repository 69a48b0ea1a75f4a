"""What comes with pcpo_fast, found from anywhere: by path, and configurations by name."""

import json
from pathlib import Path

import pytest

from pcpo_fast.cli import main
from pcpo_fast.config import shipped
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.shipped import configurations, find, find_configuration
from pcpo_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_users_path_comes_first(elsewhere: Path) -> None:
    assert find("assets/tiny-flux") == ROOT / "assets" / "tiny-flux"
    (elsewhere / "assets" / "tiny-flux").mkdir(parents=True)
    assert find("assets/tiny-flux") == Path("assets/tiny-flux")


@pytest.mark.parametrize("path", ["assets/none", "black-forest-labs/FLUX.1-dev", "README.md", "", "/assets/prompts"])
def test_what_is_neither_here_nor_shipped_stays_as_it_is(path: str) -> None:
    assert find(path) == Path(path)


def test_a_package_with_its_own_folders_does_not_look_into_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "pcpo_fast"
    (package / "shipped" / "configs").mkdir(parents=True)
    (package / "shipped" / "configs" / "mine.yaml").write_text("# Mine.\nseed: 3\n")
    (tmp_path / "site" / "configs").mkdir()  # somebody else's
    (tmp_path / "site" / "configs" / "other.yaml").write_text("")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    assert list(configurations()) == ["mine"]
    assert load_config("mine").seed == 3 and load_config("configs/mine.yaml").seed == 3
    assert find("configs/other.yaml") == Path("configs/other.yaml")


def test_configurations_are_found_by_name(elsewhere: Path) -> None:
    assert find_configuration("flux_dev_pcpo_lora") == ROOT / "configs" / "flux_dev_pcpo_lora.yaml"
    assert find_configuration("1x24gb_flux_lora") == ROOT / "examples" / "1x24gb_flux_lora" / "config.yaml"
    (elsewhere / "tiny_flux").mkdir()  # a folder is no configuration
    assert load_config("tiny_flux").model.path == "assets/tiny-flux"
    (elsewhere / "tiny_sd").write_text("seed: 5")
    assert load_config("tiny_sd").seed == 5
    with pytest.raises(
        UserError, match=r"^config file tiny_flx does not exist, .*, did you mean tiny_flux\? \(pcpo-fast"
    ):
        load_config("tiny_flx")
    with pytest.raises(UserError, match=r"^config file tiny_flx\.yaml does not exist$"):
        load_config("tiny_flx.yaml")


def test_every_shipped_configuration_says_what_it_is_and_loads_from_anywhere() -> None:
    for name, path in configurations().items():
        assert load_config(name) == load_config(path)
        assert path.read_text(encoding="utf-8").startswith("# ") and shipped.summary(path).endswith("."), name


def test_configs_lists_and_shows(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(configurations())
    assert "PCPO on FLUX.1-dev with LoRA" in next(line for line in lines if line.startswith("flux_dev_pcpo_lora "))
    assert main(["configs", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(configurations())
    assert main(["configs", "show", "1x24gb_flux_lora"]) == 0
    (elsewhere / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_config("mine.yaml") == load_config("1x24gb_flux_lora")
    for wrong, said in (
        (["show"], "configs: use `pcpo-fast configs` or"),
        (["show", "tiny_flx"], "did you mean tiny_flux?"),
    ):
        assert main(["configs", *wrong]) == 2
        assert said in capsys.readouterr().err
