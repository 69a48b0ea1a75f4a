"""Vote files to win rates: counts, intervals, and files that are not what they should be."""

import json
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.votes import OVERALL, WinRate, wilson_interval, win_rates


def write_key(folder: Path, prompts: int, per_prompt: int) -> Path:
    """A on the left of even pairs, on the right of odd ones."""
    pairs = [
        {"prompt": n // per_prompt, "image": n % per_prompt, "left": "AB"[n % 2], "right": "BA"[n % 2]}
        for n in range(prompts * per_prompt)
    ]
    key = {"page": "p1", "checkpoints": ["A", "B"], "prompts": ["x"] * prompts, "pairs": pairs}
    (folder / "key.json").write_text(json.dumps(key), encoding="utf-8")
    return folder / "key.json"


def write_votes(folder: Path, voter: str, votes: dict[Any, Any], page: str = "p1") -> Path:
    file = folder / f"{voter}.json"
    file.write_text(json.dumps({"page": page, "voter": voter, "votes": votes}), encoding="utf-8")
    return file


def win_rate(key: Path, files: list[Path]) -> WinRate:
    """Of a page with one question."""
    found = win_rates(key, files)
    assert list(found) == [OVERALL]
    return found[OVERALL]


def test_each_question_is_counted_apart(tmp_path: Path) -> None:
    key = write_key(tmp_path, prompts=4, per_prompt=2)
    # A is on the left of even pairs. Anna: A follows the text, B looks better; she left one question out.
    votes: dict[Any, Any] = {
        n: {"text": "left" if n % 2 == 0 else "right", "looks": "right" if n % 2 == 0 else "left"} for n in range(7)
    }
    anna = write_votes(tmp_path, "anna", votes | {7: {"looks": "tie"}})
    ben = write_votes(tmp_path, "ben", dict.fromkeys(range(8), "left"))  # of a page with one question
    found = win_rates(key, [anna, ben])
    assert [(one.wins, one.losses, one.ties) for one in found.values()] == [(7, 0, 0), (0, 7, 1), (4, 4, 0)]
    assert list(found) == ["text", "looks", OVERALL]
    assert [one.one_sided for one in found.values()] == [(), (), ("ben",)]
    assert found[OVERALL].voters == {"ben": 8} and found["looks"].voters == {"anna": 8}


@pytest.mark.parametrize(
    ("lefts", "rights", "ties", "warned"), [(6, 0, 2, True), (0, 6, 0, True), (5, 0, 3, False), (7, 1, 0, False)]
)
def test_voters_who_always_chose_one_side_are_named(
    lefts: int, rights: int, ties: int, warned: bool, tmp_path: Path
) -> None:
    choices = ["left"] * lefts + ["right"] * rights + ["tie"] * ties
    votes = write_votes(tmp_path, "anna", dict(enumerate(choices)))
    assert win_rate(write_key(tmp_path, prompts=4, per_prompt=2), [votes]).one_sided == (("anna",) if warned else ())


def test_sides_are_turned_back(tmp_path: Path) -> None:
    key = write_key(tmp_path, prompts=3, per_prompt=2)
    anna = write_votes(tmp_path, "anna", {0: "left", 1: "left", 2: "right", 3: "right", 4: "tie"})
    ben = write_votes(tmp_path, "ben", {0: "left", 5: "right"})
    found = win_rate(key, [anna, ben])
    # anna: A, B, B, A, tie; ben: A, A.
    assert (found.wins, found.losses, found.ties) == (4, 2, 1)
    assert found.win_rate == pytest.approx(4.5 / 7)
    assert found.left_share == pytest.approx(3 / 6)
    assert found.voters == {"anna": 5, "ben": 2}
    assert found.verdict == "undecided"
    swapped = json.loads(key.read_text(encoding="utf-8"))
    swapped["checkpoints"] = ["B", "A"]
    key.write_text(json.dumps(swapped), encoding="utf-8")
    other = win_rate(key, [anna, ben])
    assert (other.wins, other.losses, other.win_rate) == (2, 4, pytest.approx(2.5 / 7))


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (3, 10), (70, 100), (8, 8)])
def test_wilson_interval_is_scipys(wins: int, count: int) -> None:
    expected = scipy.stats.binomtest(wins, count).proportion_ci(method="wilson")
    assert wilson_interval(wins / count, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_votes_on_one_prompt_are_not_independent(tmp_path: Path) -> None:
    """Ten prompts of twenty pairs, each prompt unanimous: seven for A, three for B."""
    key = write_key(tmp_path, prompts=10, per_prompt=20)
    votes = {n: ("left" if (n % 2 == 0) == (n // 20 < 7) else "right") for n in range(200)}
    found = win_rate(key, [write_votes(tmp_path, "anna", votes)])
    assert found.win_rate == pytest.approx(0.7)
    assert found.wilson_interval[0] > 0.6  # 200 votes would decide it
    assert found.prompt_interval is not None and found.prompt_interval[0] < 0.5 < 0.9 < found.prompt_interval[1]
    assert found.verdict == "undecided"


def test_a_clear_case_is_decided(tmp_path: Path) -> None:
    key = write_key(tmp_path, prompts=12, per_prompt=2)
    votes = {n: "left" if n % 2 else "right" for n in range(24)}
    found = win_rate(key, [write_votes(tmp_path, "anna", votes)])
    assert (found.wins, found.verdict) == (0, "B is preferred")


@pytest.mark.parametrize(
    ("votes", "said"),
    [
        ({"page": "p2", "voter": "a", "votes": {"0": "left"}}, "votes on another page"),
        ({"page": "p1", "voter": "a", "votes": {"6": "left"}}, "there is no pair '6'"),
        ({"page": "p1", "voter": "a", "votes": {"-1": "left"}}, "there is no pair '-1'"),
        ({"page": "p1", "voter": "a", "votes": {"0": "A"}}, "must be one of left, right, tie"),
        ({"page": "p1", "voter": "a", "votes": {"0": {"looks": "A"}}}, "must be one of left, right, tie"),
        (
            {"page": "p1", "voter": "a", "votes": {"0": {"taste": "left"}}},
            "a vote on 'taste', expected one on text, looks",
        ),
        ({"page": "p1", "voter": "a", "votes": {}}, "contain no votes"),
        ({"page": "p1", "voter": "", "votes": {"0": "left"}}, "is not a file of votes"),
        ([1], "is not a file of votes"),
    ],
)
def test_wrong_vote_files_are_refused(votes: Any, said: str, tmp_path: Path) -> None:
    key = write_key(tmp_path, prompts=3, per_prompt=2)
    file = tmp_path / "votes.json"
    file.write_text(json.dumps(votes), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        win_rates(key, [file])


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    key = write_key(tmp_path, prompts=3, per_prompt=2)
    votes = write_votes(tmp_path, "anna", {0: "left"})
    again = tmp_path / "again.json"
    again.write_bytes(votes.read_bytes())
    for files, said in (
        ((key, [votes, again]), "both by 'anna'"),
        ((votes, [votes]), "is not the preference_key.json"),
        ((key, [tmp_path / "nowhere.json"]), "does not exist"),
        ((tmp_path, [votes]), "cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            win_rates(*files)
    votes.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        win_rates(key, [votes])
