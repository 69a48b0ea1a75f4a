"""Scripts that draw or compare what was measured earlier."""

from pathlib import Path

import host_cost
import kernel_tables
import plot_kernels
import plot_step
import pytest
from json_files import read_json


def test_a_file_is_read_or_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.json").write_text('{"a": 1}')
    (tmp_path / "bad.json").write_text("{")
    assert read_json(tmp_path / "good.json") == {"a": 1}
    for name, words in (("none.json", "no such file"), ("bad.json", "it is not JSON"), ("", "is a directory")):
        with pytest.raises(SystemExit, match=r"^2$"):
            read_json(tmp_path / name)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and words in said


@pytest.mark.parametrize("script", [plot_step, plot_kernels, kernel_tables, host_cost])
def test_a_script_without_its_file_says_so(script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(tmp_path / "none")]
    if script in (plot_step, plot_kernels):
        given += ["--out", str(tmp_path / "out.png")]
    if script is host_cost:
        given = ["--times", "1", "--repeats", "1", "--against", *given]
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main(given)
    assert "cannot be read: no such file or directory" in capsys.readouterr().err
