"""pcpo-fast evaluate from the command line to its files, with small checkpoints of the metrics' architectures."""

import base64
import io
import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import call
from evaluation_models import FakeInception, write_clip, write_dinov2, write_lpips
from evaluation_runs import evaluated_run, prompt_file  # noqa: F401 - fixtures
from PIL import Image
from tiny_pipeline import PROMPTS, redness

import pcpo_fast.evaluation.candidate_images as generating
from pcpo_fast.evaluation import frechet_distance, kernel_distance
from pcpo_fast.evaluation.features import ClipImages, DinoV2
from pcpo_fast.files.image_files import read_image

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "fd-dinov2": str(write_dinov2(folder / "dinov2", hidden=4)),
        "cmmd": str(write_clip(folder / "clip")),
        "lpips": write_lpips(folder / "lpips"),
    }


@pytest.fixture(scope="module")
def done(
    evaluated_run: Path,  # noqa: F811 - the fixture
    prompt_file: Path,  # noqa: F811
    models: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[str]]:
    """A finished evaluation of the base model and of a run at two scales, and its arguments; do not write into it."""
    from pcpo_fast.cli import main

    output = tmp_path_factory.mktemp("evaluation") / "out"
    arguments = ["evaluate", "--checkpoint", "base", "--checkpoint", f"tuned={evaluated_run}@0.5,1"]
    arguments += ["--prompts", str(prompt_file), "--count", "2", "--seed", "7", "--resamples", "20"]
    arguments += [word for name, path in models.items() for word in ("--metric", f"{name}={path}")]
    arguments += ["--output", str(output)]
    assert main(arguments) == 0
    return output, arguments


def record_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    return found


def images_of(output: Path, name: str) -> list[torch.Tensor]:
    return [read_image(file) for file in sorted((output / "images" / name).glob("*.png"))]


def plain(arguments: list[str]) -> list[str]:
    """The same without metrics, which take their time."""
    return [*arguments[: arguments.index("--metric")], "--output", arguments[-1]]


def test_every_number_follows_from_the_images(done: tuple[Path, list[str]], models: dict[str, str]) -> None:
    output, _ = done
    record = record_of(output)
    assert record["prompts"] == list(PROMPTS[:3])
    assert [one["name"] for one in record["checkpoints"]] == ["base", "tuned@0.5", "tuned@1"]
    assert [one["guidance_scale_reward"] for one in record["checkpoints"]] == [None, 0.5, 1.0]
    assert record["reference"] == "base"
    dino, clip = DinoV2(models["fd-dinov2"], CPU), ClipImages(models["cmmd"], CPU)
    features = {
        one["name"]: (dino(images_of(output, one["name"]))["dinov2"], clip(images_of(output, one["name"]))["clip"])
        for one in record["checkpoints"]
    }
    for one in record["checkpoints"]:
        images = images_of(output, one["name"])
        assert len(images) == one["images"] == 6 and images[0].shape == (3, 32, 40)
        scores = redness(torch.stack(images), [], [])
        reward = one["rewards"]["tiny_pipeline:redness"]
        torch.testing.assert_close(torch.tensor(reward["scores"]), scores)
        assert reward["mean"] == pytest.approx(float(scores.double().mean()), rel=1e-6)
        assert reward["low"] <= reward["mean"] <= reward["high"]
        own, reference = features[one["name"]], features["base"]
        moments = [(x[0].double().mean(dim=0), torch.cov(x[0].double().T)) for x in (own, reference)]
        assert one["metrics"]["fd_dinov2"]["mean"] == pytest.approx(
            frechet_distance(*moments[0], *moments[1]), rel=1e-6, abs=1e-9
        )
        assert one["metrics"]["cmmd"]["mean"] == pytest.approx(
            kernel_distance(own[1], reference[1]), rel=1e-6, abs=1e-9
        )
        assert all(one["metrics"][f"diversity_{kind}"]["mean"] > 0 for kind in ("pixel", "lpips", "clip", "dinov2"))
    base, half, whole = record["checkpoints"]
    # The reference is of the same prompts and resampled along with them: from itself it is at no distance, ever.
    for key in ("fd_dinov2", "cmmd"):
        assert [base["metrics"][key][end] for end in ("low", "high")] == pytest.approx([0, 0], abs=1e-9)
        assert 0 <= whole["metrics"][key]["low"] < whole["metrics"][key]["high"]
    assert base["metrics"]["fd_dinov2"]["mean"] == pytest.approx(0, abs=1e-9)
    assert base["metrics"]["cmmd"]["mean"] == pytest.approx(0, abs=1e-9)
    assert 0 < half["metrics"]["cmmd"]["mean"] < whole["metrics"]["cmmd"]["mean"]
    assert base["rewards"]["tiny_pipeline:redness"]["difference"]["mean"] == 0
    difference = whole["rewards"]["tiny_pipeline:redness"]["difference"]["mean"]
    means = [one["rewards"]["tiny_pipeline:redness"]["mean"] for one in (whole, base)]
    assert difference == pytest.approx(means[0] - means[1], rel=1e-6)
    lpips = [one["metrics"]["diversity_lpips"] for one in (whole, base)]
    assert lpips[0]["difference"]["mean"] == pytest.approx(lpips[0]["mean"] - lpips[1]["mean"], abs=1e-9)
    assert any("covariance is singular" in note or "10,000" in note for note in record["notes"])


def test_scale_one_is_what_sample_makes_of_the_run(
    done: tuple[Path, list[str]],
    evaluated_run: Path,  # noqa: F811
    prompt_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
) -> None:
    output, _ = done
    arguments = ("--prompts", prompt_file, "--count", "2", "--seed", "7", "--folder", tmp_path / "single")
    answer = call(capsys, "sample", "--run", evaluated_run, *arguments, "--output", tmp_path / "grid.png")
    assert answer.code == 0, answer.err
    single = [read_image(file) for file in sorted((tmp_path / "single").glob("*.png"))]
    for image, other in zip(images_of(output, "tuned@1"), single, strict=True):
        assert float((image - other).abs().max()) <= 1.01 / 255  # batches differ, so a pixel may round the other way


def test_page_and_markdown_hold_everything_and_ask_nothing(done: tuple[Path, list[str]]) -> None:
    output, _ = done
    page = (output / "evaluation.html").read_text(encoding="utf-8")
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # BokehJS names addresses that it never asks
    assert page.count('<div class="prompt" id="prompt-') == 3
    assert page.count("<figure><img") == 3 * 3 * 2
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "<title>Evaluation of base, tuned</title>" in page and "model " in page  # a figure of every number, too
    assert page.count('class="charts"') == 2 and "<h3>Differences from base, paired by prompt</h3>" in page
    for word in (*PROMPTS[:3], "tuned@0.5", "FD-DINOv2", "CMMD", "diversity, LPIPS alex", "Arrow keys"):
        assert word in page
    text = (output / "evaluation.md").read_text(encoding="utf-8")
    assert "| tuned@1 |" in text and "![reward_distance.png](reward_distance.png)" in text
    assert "Distances are to base." in text
    assert (output / "reward_distance.png").stat().st_size > 1000


def test_a_second_call_makes_and_computes_nothing_again(
    done: tuple[Path, list[str]], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, arguments = done
    output = Path(shutil.copytree(source, tmp_path / "out"))
    lost = [output / "images" / "tuned@0.5" / "00001_001.png", output / "images" / "base" / "00002_000.png"]
    before = {file: file.read_bytes() for file in output.rglob("*.png") if "images" in file.parts}
    made: list[list[tuple[int, int]]] = []
    sample, extract = generating.sample_rows, DinoV2.__call__
    extracted = []

    def counted(policy: Any, conditioning: Any, names: Any, *others: Any) -> torch.Tensor:
        made.append(list(names))
        return sample(policy, conditioning, names, *others)

    monkeypatch.setattr(generating, "sample_rows", counted)
    monkeypatch.setattr(DinoV2, "__call__", lambda *call: extracted.append(1) or extract(*call))
    for file in lost:
        file.unlink()
    again = [*arguments[:-1], str(output)]
    assert call(capsys, *again).code == 0
    assert made == [[(2, 0)], [(1, 1)]]
    assert not extracted
    for file, data in before.items():
        if file in lost:
            assert float((read_image(file) - read_image(source / file.relative_to(output))).abs().max()) <= 1.01 / 255
        else:
            assert file.read_bytes() == data
    # A cache that is damaged is computed again.
    for file in lost:
        file.write_bytes(before[file])
    for file in (output / "features").iterdir():
        file.write_bytes(b"damaged")
    assert call(capsys, *again).code == 0
    assert len(made) == 2 and extracted
    found, known = (record_of(folder)["checkpoints"][1]["metrics"] for folder in (output, source))
    for name, value in known.items():
        assert found[name]["mean"] == pytest.approx(value["mean"], rel=1e-4)
    # Fewer prompts of the same file, and all of them again: nothing is made.
    recipe = (output / "images" / "base" / "recipe.json").read_text(encoding="utf-8")
    assert call(capsys, *plain(again), "--limit", "2").code == 0
    assert record_of(output)["checkpoints"][0]["images"] == 4 and len(made) == 2
    assert (output / "images" / "base" / "recipe.json").read_text(encoding="utf-8") == recipe
    assert call(capsys, *again).code == 0 and len(made) == 2


def test_images_made_otherwise_are_refused_or_remade(
    done: tuple[Path, list[str]], tmp_path: Path, capsys: Capture
) -> None:
    source, arguments = done
    output = Path(shutil.copytree(source, tmp_path / "out"))
    other = [*arguments[:-1], str(output)]
    file = output / "images" / "base" / "recipe.json"
    recipe = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(recipe | {"content": "of other weights"}), encoding="utf-8")
    assert "images made with other settings (content changed)" in call(capsys, *other).err
    del recipe["content"]  # as it was before it held every byte
    file.write_text(json.dumps(recipe), encoding="utf-8")
    other[other.index("--seed") + 1] = "8"
    answer = call(capsys, *other)
    assert answer.code == 2
    assert "images made with other settings (seed changed)" in answer.err and "--remake" in answer.err
    before = images_of(output, "base")
    assert call(capsys, *other, "--remake").code == 0
    assert all(not torch.equal(a, b) for a, b in zip(before, images_of(output, "base"), strict=True))
    (output / "images" / "base" / "recipe.json").write_text("{", encoding="utf-8")
    assert "recipe.json changed" in call(capsys, *other).err


def refuse_weights(self: Any, *_: Any, feature_extractor_weights_path: str | None) -> None:
    assert feature_extractor_weights_path is not None
    raise RuntimeError("Error(s) in loading state_dict for FeatureExtractorInceptionV3:\n\tMissing key(s)")


def test_finished_images_against_a_folder_and_inception(
    done: tuple[Path, list[str]],
    prompt_file: Path,  # noqa: F811
    evaluated_run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, _ = done
    images = source / "images"
    common = ("evaluate", "--checkpoint", f"finished={images / 'tuned@1'}", "--reference", images / "base")
    common += ("--prompts", prompt_file, "--output", tmp_path / "out", "--config", evaluated_run / "config.yaml")
    common += ("--metric", "fid", "--metric", "is", "--resamples", "0")
    answer = call(capsys, *common, "--count", "2")
    assert answer.code == 2 and "need torch-fidelity" in answer.err and "pip install torch-fidelity" in answer.err
    package = types.ModuleType("torch_fidelity")
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    weights = tmp_path / "inception.pth"  # torch-fidelity would unpickle it
    weights.write_bytes(b"cos\nsystem\n(S'echo run'\ntR.")
    answer = call(capsys, *common, "--count", "2", "--metric", f"fid={weights}")
    assert answer.code == 2 and "fid is given twice" in answer.err
    named = [f"fid={weights}" if word == "fid" else word for word in common]
    answer = call(capsys, *named, "--count", "2")
    assert answer.code == 2 and f"{weights} is not a PyTorch checkpoint, or holds objects other" in answer.err
    torch.save({"fc.bias": torch.zeros(3)}, weights)
    monkeypatch.setattr(FakeInception, "__init__", refuse_weights)
    answer = call(capsys, *named, "--count", "2")
    assert answer.code == 2 and f"{weights} does not hold torch-fidelity's Inception weights" in answer.err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    answer = call(capsys, *common, "--count", "2", "--json")
    assert answer.code == 0, answer.err
    assert "metric fid: downloading Inception, about 95 MB" in answer.err
    record = json.loads(answer.out)
    assert record["reference"] == str(images / "base")
    (one,) = record["checkpoints"]
    assert (one["kind"], one["images"], one["guidance_scale_reward"]) == ("images", 6, None)
    features = {}
    for name in ("base", "tuned@1"):
        batch = (torch.stack(images_of(source, name)) * 255).round().to(torch.uint8)
        features[name] = FakeInception("", ["2048", "logits_unbiased"])(batch)[0].double()
    moments = [(x.mean(dim=0), torch.cov(x.T)) for x in features.values()]
    assert one["metrics"]["fid"]["mean"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-3)
    assert one["metrics"]["fid"]["low"] is None
    assert 1 <= one["metrics"]["inception_score"]["mean"] <= 6
    answer = call(capsys, *common, "--count", "3")
    assert answer.code == 2 and "holds 6 images, but the prompts require 9" in answer.err


def test_two_ranks_divide_the_images(
    done: tuple[Path, list[str]],
    evaluated_run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Each rank by itself, without a process group and into a folder of its own: together they make what one makes."""
    source, arguments = done
    monkeypatch.setattr(generating, "world_size", lambda: 2)
    monkeypatch.setattr("pcpo_fast.evaluation.evaluator.rank", lambda: 1)  # images only
    only_base = [word for word in plain(arguments)[:-1] if "tuned" not in word]
    # The option before the run becomes that of the configuration, which was the run's.
    only_base[only_base.index("base") + 1 : only_base.index("base") + 2] = [
        "--config",
        str(evaluated_run / "config.yaml"),
    ]
    made = []
    for rank in range(2):
        monkeypatch.setattr(generating, "rank", lambda rank=rank: rank)
        assert call(capsys, *only_base, tmp_path / str(rank)).code == 0
        made.append({file.name: file for file in (tmp_path / str(rank)).rglob("*.png")})
    assert len(made[0]) == len(made[1]) == 3 and not set(made[0]) & set(made[1])
    for name, file in (made[0] | made[1]).items():
        image, other = read_image(file), read_image(source / "images" / "base" / name)
        assert float((image - other).abs().max()) <= 1.01 / 255


def test_preference_page_is_blind_and_its_votes_are_counted(
    done: tuple[Path, list[str]], tmp_path: Path, capsys: Capture
) -> None:
    source, arguments = done
    output = Path(shutil.copytree(source, tmp_path / "out"))
    words = plain([*arguments[:-1], str(output)])
    assert call(capsys, *words, "--preference", "tuned@1,base").code == 0
    page = (output / "preference.html").read_text(encoding="utf-8")
    key = json.loads((output / "preference_key.json").read_text(encoding="utf-8"))
    assert "tuned" not in page and ">base<" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert page.count('<div class="pair" hidden>') == len(key["pairs"]) == 6
    assert key["page"] in page
    # The pictures of the page are those that the key says, on the side that it says.
    shown = re.findall(
        r'data-vote="(left|right)"><img class="small" alt="[^"]*" src="data:image/png;base64,([^"]+)"', page
    )
    assert len(shown) == 12
    for place, (side, data) in enumerate(shown):
        entry = key["pairs"][place // 2]
        file = output / "images" / entry[side] / f"{entry['prompt']:05d}_{entry['image']:03d}.png"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image, Image.open(file) as expected:
            assert image.convert("RGB").tobytes() == expected.convert("RGB").tobytes()
    assert {(entry["prompt"], entry["image"]) for entry in key["pairs"]} == {(p, i) for p in range(3) for i in range(2)}
    assert [entry["left"] for entry in key["pairs"]].count("base") == 3
    votes = {place: "left" if entry["left"] == "tuned@1" else "right" for place, entry in enumerate(key["pairs"])}
    file = tmp_path / "votes-anna.json"
    file.write_text(json.dumps({"page": key["page"], "voter": "anna", "votes": votes}), encoding="utf-8")
    answer = call(capsys, "votes", output / "preference_key.json", file, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert (found["wins"], found["losses"], found["ties"], found["win_rate"]) == (6, 0, 0, 1.0)
    assert found["verdict"] == "tuned@1 is preferred" and found["one_sided"] == []
    two = {place: {"text": choice, "looks": "left"} for place, choice in votes.items()}
    other = tmp_path / "votes-ben.json"
    other.write_text(json.dumps({"page": key["page"], "voter": "ben", "votes": two}), encoding="utf-8")
    said = call(capsys, "votes", output / "preference_key.json", other).out
    assert said.index("Which image follows the text better?") < said.index("Which image looks better?")
    assert "warning: ben always chose the same side" in said.partition("looks better?")[2]
    answer = call(capsys, "votes", output / "preference_key.json", other, "--json")
    assert json.loads(answer.out)["questions"]["text"]["wins"] == 6
    assert "Verdict: tuned@1 is preferred" in call(capsys, "votes", output / "preference_key.json", file).out
    answer = call(capsys, *words, "--preference", "tuned,base")
    assert answer.code == 2 and "with two of base, tuned@0.5, tuned@1" in answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--checkpoint: missing; for example"),
        (("--checkpoint", "RUN", "--count", "0"), "--count: must be at least 1, got 0"),
        (("--checkpoint", "RUN", "--limit", "0"), "--limit: must be at least 1, got 0"),
        (("--checkpoint", "RUN", "--seed", "-1"), "--seed: must be between"),
        (("--checkpoint", "RUN", "--metric", "fvd"), "--metric 'fvd': must be one of fd-dinov2"),
        (("--checkpoint", "RUN", "--metric", "cmmd="), "the model after '=' is missing"),
        (("--checkpoint", "RUN", "--metric", "cmmd", "--metric", "cmmd=x"), "cmmd is given twice"),
        (("--checkpoint", "RUN", "--metric", "fid=a", "--metric", "is=b"), "fid and is share one Inception network"),
        (("--checkpoint", "RUN", "--metric", "cmmd"), "--metric cmmd: a distance needs a reference"),
        (("--checkpoint", "RUN", "--reference", "nowhere"), "--reference: nowhere is neither base nor a folder"),
        (("--checkpoint", "RUN", "--prompts", "nowhere.txt"), "prompt file nowhere.txt does not exist"),
        (("--checkpoint", "RUN", "--reward", "beauty"), "unknown reward 'beauty'"),
        (("--checkpoint", "base@0.5", "--config", "RUN/config.yaml"), "a scale (@) needs a run, and base is not one"),
        (("--checkpoint", "RUN@x"), "'x' in 'x' is not a finite number"),
        (("--checkpoint", "RUN@1,1"), "repeats a scale"),
        (("--checkpoint", "RUN", "--checkpoint", "RUN"), "the name run is used twice; choose names"),
        (("--checkpoint", "a b=RUN"), "a name consists of at most 60 letters, digits"),
        (("--checkpoint", "x=", "--config", "RUN/config.yaml"), "expected [NAME=]WHAT[@SCALES]"),
        (
            ("--checkpoint", "./nowhere", "--config", "RUN/config.yaml"),
            "./nowhere is not 'base', a run directory, a checkpoint",
        ),
        (
            ("--checkpoint", "base", "--checkpoint", "RUN", "--metric", "fd-dinov2=nowhere/at-all", "--limit", "1"),
            "--metric fd-dinov2=nowhere/at-all: nowhere/at-all is not under",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    arguments: tuple[str, ...],
    said: str,
    evaluated_run: Path,  # noqa: F811
    done: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    words = [word.replace("RUN", str(evaluated_run)) for word in arguments]
    if "nowhere/at-all" in said:
        words += done[1][done[1].index("--prompts") : done[1].index("--resamples")]
        words += ["--output", str(shutil.copytree(done[0], tmp_path / "out"))]
    answer = call(capsys, "evaluate", "--output", tmp_path / "out", *words)
    assert answer.code == 2
    # A machine that is busy may see a line of progress before.
    assert said in answer.err and answer.err.splitlines()[-1].startswith("error: ") and "Traceback" not in answer.err
