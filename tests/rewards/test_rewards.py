"""Rewards by name, a user's own rewards, JPEG sizes, and what happens when a reward misbehaves."""

import asyncio
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pcpo_fast.config.schema import RewardConfig, ScoringConfig
from pcpo_fast.errors import UserError
from pcpo_fast.rewards import RewardSet, Scores, available_rewards, calling, load_reward
from pcpo_fast.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from pcpo_fast.rewards.registry import learned_rewards, remote_rewards

PROMPTS = ["a red circle", "a blue square", "a green star"]


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module into a fresh working directory; the name is new each time, as imports are cached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    name = f"user_reward_{tmp_path.name}".replace("-", "_")

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


stand_in: list[Callable[..., Any]] = []


def current_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    return stand_in[-1](images, prompts, metadata)


def score_with(reward: Callable[..., Any], batch: Tensor | None = None) -> Scores:
    """Scores of a Python callable, through the same door as a user's."""
    stand_in.append(reward)
    batch = images() if batch is None else batch
    return RewardSet([RewardConfig(name=f"{__name__}:current_reward")]).score(batch, PROMPTS[: len(batch)])


# By name.


def test_available_rewards_is_a_tuple_of_names() -> None:
    assert isinstance(available_rewards, tuple)
    assert set(available_rewards) >= {"caption_match", "jpeg_compressibility", "jpeg_incompressibility"}


@pytest.mark.parametrize("name", [name for name in available_rewards if name not in learned_rewards + remote_rewards])
def test_every_built_in_reward_scores_images(name: str) -> None:
    captions = ["a red circle on a blue background", "a green square on a yellow background"]
    scores = RewardSet([RewardConfig(name=name)]).score(images(2, 32), captions)
    assert scores.total.shape == (2,)
    assert scores.total.dtype == torch.float64


def test_a_reward_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys, pcpo_fast.rewards; assert 'pcpo_fast.rewards.jpeg' not in sys.modules;"
        "pcpo_fast.rewards.load_reward('jpeg_compressibility'); assert 'pcpo_fast.rewards.jpeg' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown reward 'caption_mach', did you mean caption_match\?; built in: "):
        load_reward("caption_mach")
    with pytest.raises(UserError, match=r"^unknown reward 'zzz'; built in: caption_match, .*module:function"):
        load_reward("zzz")


def test_options_that_a_reward_does_not_take() -> None:
    with pytest.raises(UserError, match=r"reward jpeg_compressibility does not take the options .*'quality'"):
        load_reward("jpeg_compressibility", {"quality": 50})


# JPEG, as in DDPO.


def test_jpeg_sizes_are_those_of_the_files() -> None:
    batch = images(3, 24)
    sizes = []
    for image in batch:
        pixels = np.round(image.numpy().astype(np.float64) * 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1))).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    result = jpeg_incompressibility(batch, PROMPTS, [{}] * 3)
    torch.testing.assert_close(result, torch.tensor(sizes, dtype=torch.float32), rtol=0, atol=0)
    torch.testing.assert_close(jpeg_compressibility(batch, PROMPTS, [{}] * 3), -result, rtol=0, atol=0)
    assert len(set(sizes)) > 1


def test_plain_images_are_smaller_than_noise() -> None:
    plain = torch.full((1, 3, 64, 64), 0.5)
    sizes = jpeg_incompressibility(torch.cat([plain, images(1, 64)]), PROMPTS[:2], [{}, {}])
    assert 0.3 < sizes[0] < 1.5 < 3 < sizes[1]


def test_jpeg_clips_what_is_out_of_range() -> None:
    low, high = torch.full((1, 3, 8, 8), -0.2), torch.full((1, 3, 8, 8), 1.2)
    expected = jpeg_incompressibility(torch.cat([low, high]).clamp(0, 1), PROMPTS[:2], [{}, {}])
    assert torch.equal(jpeg_incompressibility(torch.cat([low, high]), PROMPTS[:2], [{}, {}]), expected)


# A user's own.


def test_function_from_a_file_in_the_working_directory(module: Callable[[str], str]) -> None:
    name = module("def redness(images, prompts, metadata):\n    return images[:, 0].mean((1, 2)).tolist()\n")
    batch = images()
    scores = RewardSet([RewardConfig(name=f"{name}:redness")]).score(batch, PROMPTS)
    torch.testing.assert_close(scores.components[f"{name}:redness"], batch[:, 0].mean((1, 2)).double())


def test_function_with_options(module: Callable[[str], str]) -> None:
    name = module("def bonus(images, prompts, metadata, *, value=0.0):\n    return [value] * len(prompts)\n")
    scores = RewardSet([RewardConfig(name=f"{name}:bonus", options={"value": 2.5})]).score(images(), PROMPTS)
    assert scores.total.tolist() == [2.5] * 3


def test_class_is_made_once_with_its_options(module: Callable[[str], str]) -> None:
    name = module(
        "made = []\n"
        "class Length:\n"
        "    def __init__(self, per_word=1.0):\n"
        "        made.append(self)\n"
        "        self.per_word = per_word\n"
        "    def __call__(self, images, prompts, metadata):\n"
        "        return [self.per_word * len(prompt.split()) for prompt in prompts]\n"
    )
    rewards = RewardSet([RewardConfig(name=f"{name}:Length", options={"per_word": 0.5})])
    for _ in range(2):
        assert rewards.score(images(2), ["one two", "one"]).total.tolist() == [1.0, 0.5]
    assert len(sys.modules[name].made) == 1


def test_dotted_attribute(module: Callable[[str], str]) -> None:
    name = module(
        "class Rewards:\n"
        "    @staticmethod\n"
        "    def ones(images, prompts, metadata):\n"
        "        return [1] * len(prompts)\n"
    )
    assert RewardSet([RewardConfig(name=f"{name}:Rewards.ones")]).score(images(), PROMPTS).total.tolist() == [1, 1, 1]


def test_metadata_reaches_the_reward(module: Callable[[str], str]) -> None:
    name = module("def wanted(images, prompts, metadata):\n    return [row['n'] for row in metadata]\n")
    rewards = RewardSet([RewardConfig(name=f"{name}:wanted")])
    assert rewards.score(images(), PROMPTS, [{"n": 3}, {"n": 1}, {"n": 2}]).total.tolist() == [3, 1, 2]


GOOD = "def fine(images, prompts, metadata):\n    return [0.0] * len(prompts)\n"


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            GOOD,
            "no_such_module_xyz:fine",
            "there is no module no_such_module_xyz in .* or among the installed packages",
        ),
        (GOOD, "{}.part:fine", r"there is no module {}\.part in "),
        (GOOD, "{}:fin", r"module {} \(.*\.py\) has no fin, did you mean fine\?"),
        (GOOD, "{}:zzz", r"module {} \(.*\.py\) has no zzz$"),
        ("fine = 3\n", "{}:fine", r"fine in module {} \(.*\.py\) is not callable but of type int"),
        ("import not_installed_xyz\n", "{}:fine", "module {} needs not_installed_xyz, which is not installed"),
        ("raise ModuleNotFoundError('x')\n", "{}:fine", "module {} cannot be imported: ModuleNotFoundError: x"),
        ("def fine(:\n", "{}:fine", "module {} cannot be imported: SyntaxError: "),
        ("1 / 0\n", "{}:fine", "module {} cannot be imported: ZeroDivisionError: division by zero"),
        (GOOD, "{}:", "is not of the form module:function"),
        (GOOD, ":fine", "is not of the form module:function"),
        (GOOD, "{}:fine()", "is not of the form module:function"),
        (GOOD, "rewards/{}.py:fine", r"is not of the form module:function.*, did you mean rewards\.{}:fine\?$"),
        (GOOD, "{}.py:fine", r"there is no module {}\.py in .*, did you mean {}:fine\?$"),
        ("raise SystemExit('no licence')\n", "{}:fine", "module {} cannot be imported: SystemExit: no licence"),
        (
            "class Fine:\n    def __init__(self):\n        raise SystemExit(3)\n",
            "{}:Fine",
            "cannot be created: SystemExit: 3",
        ),
        (
            "def fine(images):\n    return 0\n",
            "{}:fine",
            r"cannot be called with \(images, prompts, metadata\): too many",
        ),
        ("class Fine:\n    pass\n", "{}:Fine", "a class whose instances are not callable"),
        (
            "class Fine:\n    def __init__(self, path): ...\n",
            "{}:Fine",
            r"cannot be created with the options \{{\}}: missing",
        ),
        (
            "class Fine:\n    def __init__(self):\n        open('no_file')\n",
            "{}:Fine",
            "cannot be created: FileNotFoundError",
        ),
        ("class Fine:\n    def __call__(self, images): ...\n", "{}:Fine", "cannot be called with"),
    ],
)
def test_user_reward_that_cannot_be_loaded(
    module: Callable[[str], str], source: str, target: str, message: str
) -> None:
    name = module(source)
    with pytest.raises(UserError, match=message.replace("{}", name).replace("{{", "{").replace("}}", "}")) as caught:
        load_reward(target.format(name))
    assert "\n" not in str(caught.value)


def test_error_at_import_is_chained(module: Callable[[str], str]) -> None:
    name = module("raise OSError('disk gone')\n")
    with pytest.raises(UserError) as caught:
        load_reward(f"{name}:fine")
    assert isinstance(caught.value.__cause__, OSError)


def test_working_directory_does_not_hide_installed_modules(
    tmp_path: Path, module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(GOOD)
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('shadowed')\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    load_reward(f"{name}:fine")
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


# The sum.


def test_weights_and_evaluation_only(module: Callable[[str], str]) -> None:
    name = module(
        "calls = []\n"
        "def ones(images, prompts, metadata):\n    return [1.0] * len(prompts)\n"
        "def numbers(images, prompts, metadata):\n    return list(range(len(prompts)))\n"
        "def held(images, prompts, metadata):\n    calls.append(1)\n    return [100.0] * len(prompts)\n"
    )
    rewards = RewardSet(
        [
            RewardConfig(name=f"{name}:ones", weight=2.0),
            RewardConfig(name=f"{name}:numbers", weight=-0.5),
            RewardConfig(name=f"{name}:held", evaluation_only=True),
        ]
    )
    assert rewards.names == (f"{name}:ones", f"{name}:numbers", f"{name}:held")
    everything = rewards.score(images(), PROMPTS)
    assert everything.total.tolist() == [2.0, 1.5, 1.0]
    assert {key: value.tolist() for key, value in everything.components.items()} == {
        f"{name}:ones": [1, 1, 1],
        f"{name}:numbers": [0, 1, 2],
        f"{name}:held": [100, 100, 100],
    }
    training = rewards.score(images(), PROMPTS, evaluation=False)
    assert training.total.tolist() == [2.0, 1.5, 1.0]
    assert list(training.components) == [f"{name}:ones", f"{name}:numbers"]
    assert len(sys.modules[name].calls) == 1


@pytest.mark.parametrize(
    "result",
    [
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        np.array([1, 2, 3], dtype=np.float16),
        [1, 2.0, np.float32(3)],
        (1.0, 2.0, 3.0),
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)],
    ],
)
def test_numbers_in_any_container(result: object) -> None:
    total = score_with(lambda images, prompts, metadata: result).total
    assert total.dtype == torch.float64
    assert not total.requires_grad
    assert total.tolist() == [1.0, 2.0, 3.0]


def test_no_images_no_call() -> None:
    def never(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        raise AssertionError("called")

    scores = score_with(never, images(0))
    assert scores.total.shape == (0,)
    assert all(values.shape == (0,) for values in scores.components.values())


def test_scores_are_not_rounded_to_float32() -> None:
    assert score_with(lambda *_: [1e8 + 0.25, 1e8 + 0.5, -5e60]).total.tolist() == [1e8 + 0.25, 1e8 + 0.5, -5e60]


# A reward that misbehaves.


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], r"returned the shape \(2,\); expected 3 numbers, .*'a red circle'"),
        (torch.zeros(3, 1), r"returned the shape \(3, 1\); expected 3 numbers"),
        (torch.tensor(1.0), r"returned the shape \(\); expected 3 numbers"),
        (0.5, r"returned the shape \(\); expected 3 numbers"),
        (None, "returned a NoneType which is not a list of numbers"),
        ({"score": [1, 2, 3]}, "returned a dict which is not a list of numbers"),
        (([1.0, 2.0, 3.0], {}), "returned a tuple which is not a list of numbers"),
        (["x", "y", "z"], "returned a list which is not a list of numbers"),
        ([[1.0], [2.0, 3.0], [4.0]], "returned a list which is not a list of numbers"),
        (torch.zeros(3, dtype=torch.complex64), "returned complex numbers"),
        ([0.0, float("nan"), float("nan")], r"returned nan for the prompt 'a blue square' \(image 2 of 3\)$"),
        ([0.0, 1.0, float("-inf")], r"returned -inf for the prompt 'a green star' \(image 3 of 3\)$"),
        ([0.0, 1e200, 0.0], r"returned 1e\+200 for .* \(image 2 of 3\); allowed: plus or minus 1e\+100$"),
        ([None, 1.0, 2.0], r"returned nan for the prompt 'a red circle' \(image 1 of 3\)$"),
    ],
)
def test_wrong_answer_names_reward_and_prompt(result: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"^reward {__name__}:current_reward {message}") as caught:
        score_with(lambda images, prompts, metadata: result)
    assert "\n" not in str(caught.value)


def test_a_weighted_sum_that_is_too_large_names_reward_and_weight() -> None:
    specs = [RewardConfig(name=f"{__name__}:current_reward", label=label, weight=weight)
             for label, weight in (("first", 2.0), ("second", -1e50), ("third", 1e50))]  # fmt: skip
    stand_in.append(lambda images, prompts, _: [3e60 if prompt == PROMPTS[1] else 0.0 for prompt in prompts])
    with pytest.raises(UserError) as caught:
        RewardSet(specs[:2]).score(images(), PROMPTS)
    assert str(caught.value) == (
        "reward second returned 3e+60 for the prompt 'a blue square' (image 2 of 3), with which its weight of -1e+50 "
        "makes a weighted sum of -3e+110; allowed: plus or minus 1e+100"
    )
    dropping = ScoringConfig(on_failure="drop_group")  # type: ignore[call-arg]
    scores = RewardSet(specs[:2], dropping).score(images(), PROMPTS)
    assert scores.total.isnan().tolist() == scores.components["second"].isnan().tolist() == [False, True, False]
    assert scores.components["first"].isfinite().all() and len(scores.failures) == 1
    assert RewardSet(specs[1:]).score(images(), PROMPTS).total.tolist() == [0.0, 0.0, 0.0]  # only the sum counts
    aside = RewardConfig(name=specs[0].name, evaluation_only=True)
    assert RewardSet([aside]).score(images(), PROMPTS).total.tolist() == [0.0, 0.0, 0.0]  # the sum of none


def test_exception_names_the_prompt_that_causes_it() -> None:
    def picky(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        if any("square" in prompt for prompt in prompts):
            raise KeyError("square\nsecond line")
        return [0.0] * len(prompts)

    message = r"current_reward failed on the prompt 'a blue square' \(image 2 of 3\): KeyError: "
    with pytest.raises(UserError, match=message) as caught:
        score_with(picky)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "\n" not in str(caught.value)


def test_exception_of_the_batch_as_a_whole() -> None:
    def small_only(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        if len(prompts) > 2:
            raise RuntimeError("batch too large")
        return [0.0] * len(prompts)

    message = r"failed on 3 images, first the prompt 'a red circle' \(image 1 of 3\): RuntimeError: batch too large"
    with pytest.raises(UserError, match=message):
        score_with(small_only)


def test_a_rewards_own_user_error_passes() -> None:
    with pytest.raises(UserError, match=r"^the reward caption_match cannot judge the prompt 'a dog'"):
        RewardSet([RewardConfig(name="caption_match")]).score(images(1, 32), ["a dog"])


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_a_reward_changes_is_its_own(module: Callable[[str], str], timeout: float | None) -> None:
    """On a CPU, NumPy and ``.data`` write into a tensor's memory and PyTorch does not notice."""
    name = module(
        "def vandal(images, prompts, metadata, *, way):\n"
        "    count = len(prompts)\n"
        "    target = {'torch': images, 'data': images.data, 'numpy': images.numpy()}[way]\n"
        "    target *= 255\n"
        "    prompts.clear()\n"
        "    metadata[0]['list'].append(1)\n"
        "    metadata.clear()\n"
        "    return [0.0] * count\n"
        "def witness(images, prompts, metadata):\n"
        "    assert (prompts, metadata) == (['a'] * 3, [{'list': []}] * 3)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    specs = [RewardConfig(name=f"{name}:vandal", label=way, options={"way": way}) for way in ("torch", "data", "numpy")]
    settings = ScoringConfig(timeout=timeout)  # type: ignore[call-arg]
    batch, prompts, metadata = images(), ["a"] * 3, [{"list": []}] * 3
    scores = RewardSet([*specs, RewardConfig(name=f"{name}:witness")], settings).score(batch, prompts, metadata)
    assert torch.equal(scores.total, images().mean((1, 2, 3)).double())
    assert torch.equal(batch, images()) and prompts == ["a"] * 3 and metadata == [{"list": []}] * 3


@pytest.mark.parametrize("kept", [torch.zeros(3, dtype=torch.float64), np.zeros(3), torch.zeros(3)])
def test_a_result_that_a_reward_overwrites_in_its_next_call_stays(kept: Any) -> None:
    def counting(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        kept[:] += 1
        return kept

    first, second = (score_with(counting).components[f"{__name__}:current_reward"] for _ in range(2))
    assert (first.tolist(), second.tolist()) == ([1.0] * 3, [2.0] * 3)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()])
def test_a_reward_that_leaves_has_failed(error: BaseException) -> None:
    def leaves(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        raise error

    with pytest.raises(UserError, match=rf"current_reward failed on the prompt .*: {type(error).__name__}"):
        score_with(leaves)


def test_an_interrupt_in_a_reward_interrupts() -> None:
    def interrupted(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_with(interrupted)


def test_another_failure_in_the_search_blames_no_prompt() -> None:
    calls: list[int] = []

    def stateful(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        calls.append(1)
        raise RuntimeError(f"boom in call {len(calls)}")

    with pytest.raises(UserError, match=r"failed on 3 images, first .*: RuntimeError: boom in call 1$"):
        score_with(stateful)
    assert len(calls) == 4


@pytest.mark.parametrize(("timeout", "search"), [(0.2, 60.0), (None, 0.2)])
def test_the_search_for_the_failing_image_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, timeout: float | None, search: float
) -> None:
    release = threading.Event()

    def hangs(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        if len(prompts) == 1:
            release.wait(60)
        raise RuntimeError("batch too large")

    monkeypatch.setattr(calling, "_SEARCH_SECONDS", search)
    stand_in.append(hangs)
    settings = ScoringConfig(timeout=timeout)  # type: ignore[call-arg]
    rewards, begin = RewardSet([RewardConfig(name=f"{__name__}:current_reward")], settings), time.monotonic()
    with pytest.raises(UserError, match=r"failed on 3 images, first .*: RuntimeError: batch too large$"):
        rewards.score(images(), PROMPTS)
    assert time.monotonic() - begin < 30
    release.set()


@pytest.mark.filterwarnings("error")
def test_an_async_reward_is_one_sentence() -> None:
    async def later(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [0.0]

    with pytest.raises(UserError, match=r"current_reward is an async function.*; expected 1 number, for the prompt 'a"):
        score_with(later, images(1))


def test_broken_image_is_named_as_the_cause() -> None:
    batch = images()
    batch[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"image 2 of 3\); the image itself has pixels that are not finite"):
        score_with(lambda images, prompts, metadata: images.mean((1, 2, 3)), batch)


def test_long_prompts_are_cut_in_messages() -> None:
    with pytest.raises(UserError, match=re.escape("x" * 97 + "...")) as caught:
        RewardSet([RewardConfig(name="jpeg_compressibility"), RewardConfig(name=f"{__name__}:nans")]).score(
            images(1), ["x" * 5000]
        )
    assert len(str(caught.value)) < 300


def nans(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float("nan")] * len(prompts)


@pytest.mark.parametrize(
    ("batch", "prompts", "metadata"),
    [
        (torch.zeros(3, 3, 8, 8, dtype=torch.float64), PROMPTS, None),
        (torch.zeros(3, 8, 8), PROMPTS, None),
        (torch.zeros(3, 1, 8, 8), PROMPTS, None),
        (torch.zeros(2, 3, 8, 8), PROMPTS, None),
        (torch.zeros(3, 3, 8, 8), PROMPTS, [{}]),
    ],
)
def test_input_that_does_not_fit(batch: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None) -> None:
    with pytest.raises(ValueError, match="images"):
        RewardSet([RewardConfig(name="jpeg_compressibility")]).score(batch, prompts, metadata)


def test_a_required_option_of_a_function_may_come_from_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def level(images, prompts, metadata, *, factor): return images.mean((1, 2, 3)) * factor"
    (tmp_path / "required_option.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    reward = load_reward("required_option:level", {"factor": 4.0})
    assert torch.allclose(torch.as_tensor(reward(torch.ones(2, 3, 4, 4), ["", ""], [{}, {}])), torch.full((2,), 4.0))
    with pytest.raises(UserError, match="factor"):
        load_reward("required_option:level")
