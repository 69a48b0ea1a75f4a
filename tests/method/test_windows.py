"""Which steps a window holds in an epoch, against counters that move it epoch by epoch."""

import math

import pytest

from pcpo_fast.config.schema import WindowConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.windows import window_steps

STEPS = [0, 1, 2, 3, 5, 6, 8, 9]  # what may be trained need not be a range


def at(epoch: int, seed: int = 0, trainable: list[int] = STEPS, **settings: object) -> list[int]:
    return window_steps(WindowConfig(**settings), trainable, epoch, seed)  # type: ignore[arg-type]


def test_without_a_window_every_step_is_trained() -> None:
    assert [at(epoch) for epoch in (0, 1, 99)] == [STEPS] * 3


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize(("start", "stride", "interval"), [(0, 1, 1), (0, 1, 4), (2, 1, 3), (0, 2, 2), (1, 3, 5)])
@pytest.mark.parametrize(("decay", "decay_after"), [(0.0, 0), (0.4, 0), (0.7, 2)])
def test_a_progressive_window_moves_from_place_to_place(
    start: int, stride: int, interval: int, decay: float, decay_after: int, wrap: bool
) -> None:
    """MixGRPO's counters: so many epochs at a place, then ``stride`` further, and over again after the last place.

    Its exponential decay is ``ceil(interval exp(-k max(place - threshold, 0)))`` epochs.
    """
    size, last = 3, len(STEPS) - 3
    settings = {"size": size, "start": start, "stride": stride, "interval": interval, "wrap": wrap}
    place, inside = start, 0
    for epoch in range(80):
        assert at(epoch, decay=decay, decay_after=decay_after, **settings) == STEPS[place : place + size], epoch
        inside += 1
        if inside >= math.ceil(interval * math.exp(-decay * max(place - decay_after, 0))):
            inside = 0
            following = place + stride
            place = following if following <= last else (start if wrap else place)


def test_the_published_window_of_mixgrpo() -> None:
    """Size 4 of the 24 trainable steps of 25, 25 epochs at a place: 300 epochs pass twelve places."""
    trainable = list(range(24))
    windows = [tuple(at(epoch, trainable=trainable, size=4)) for epoch in range(300)]
    assert [window[0] for window in windows] == [epoch // 25 for epoch in range(300)]
    assert all(window == tuple(range(window[0], window[0] + 4)) for window in windows)
    assert at(25 * 20, trainable=trainable, size=4) == [20, 21, 22, 23]
    assert at(25 * 21, trainable=trainable, size=4) == [0, 1, 2, 3]


def test_a_fixed_window_stays() -> None:
    assert {tuple(at(epoch, size=2, schedule="fixed", start=4)) for epoch in range(60)} == {(5, 6)}


def test_a_random_window_is_drawn_anew_after_each_interval() -> None:
    drawn = [tuple(at(epoch, size=3, schedule="random", interval=4)) for epoch in range(400)]
    blocks = [set(drawn[first : first + 4]) for first in range(0, 400, 4)]
    assert all(len(block) == 1 for block in blocks)
    # 100 draws of 6 places: that one is never drawn has a chance of 1e-7.
    assert set(drawn) == {tuple(STEPS[place : place + 3]) for place in range(6)}
    assert set(drawn) == {tuple(at(epoch, size=3, schedule="random", interval=1)) for epoch in range(100)}
    assert drawn != [tuple(at(epoch, seed=1, size=3, schedule="random", interval=4)) for epoch in range(400)]
    late = {at(epoch, size=3, schedule="random", start=4, interval=1)[0] for epoch in range(60)}
    assert late == {STEPS[4], STEPS[5]}


@pytest.mark.parametrize("schedule", ["progressive", "random"])
def test_a_windows_place_follows_from_the_epoch_alone(schedule: str) -> None:
    """So a resumed run, which begins at any epoch, has the window of one that was never stopped."""
    straight = [at(epoch, seed=5, size=2, schedule=schedule, interval=3, decay=0.2) for epoch in range(40)]
    for epoch in (39, 0, 17, 17, 4, 22):
        assert at(epoch, seed=5, size=2, schedule=schedule, interval=3, decay=0.2) == straight[epoch]


def test_a_window_of_all_steps_never_moves() -> None:
    assert {tuple(at(epoch, size=len(STEPS), interval=1)) for epoch in range(9)} == {tuple(STEPS)}


def test_an_interval_never_decays_below_one_epoch() -> None:
    firsts = [at(epoch, size=2, interval=50, decay=500.0, wrap=False)[0] for epoch in range(60)]
    assert firsts == [0] * 50 + STEPS[1:7] + [8] * 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"size": 9},
            r"^window\.size: 9 steps exceed the 8 that can be trained \(0, 1, 2, 3, 5, 6, 8, 9\)$",
        ),
        (
            {"size": 3, "start": 6},
            r"^window\.start: 6 leaves no room for a window of 3 among 8 steps that can be trained; allowed: 0 to 5$",
        ),
    ],
)
def test_windows_that_do_not_fit_are_refused(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        at(0, **settings)
