"""Win rates from the votes on a preference page."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from pcpo_fast.errors import UserError
from pcpo_fast.reporting.statistics import LEVEL, ratio_of_means

CHOICES = ("left", "right", "tie")
QUESTIONS = {"text": "follows the text better", "looks": "looks better"}
OVERALL = "overall"
"""The question of pages that asked only one."""

_ONE_SIDED = 6  # votes; that many on one side by chance are rarer than 1 in 20


@dataclass(frozen=True)
class WinRate:
    """How often the first checkpoint was preferred to the second.

    Attributes:
        first, second: names of the checkpoints.
        wins, losses, ties: votes, from the first checkpoint's point of view.
        win_rate: (wins + ties / 2) / votes.
        wilson_interval: 95 % interval that assumes independent votes.
        prompt_interval: 95 % bootstrap interval over prompts, whose votes are correlated; None for one prompt.
        left_share: share of the left side among votes without ties; far from 0.5, voters did not look.
        voters: number of votes by voter.
        one_sided: voters who always chose the same side, in at least six votes: did they look?
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    win_rate: float
    wilson_interval: tuple[float, float]
    prompt_interval: tuple[float, float] | None
    left_share: float | None
    voters: dict[str, int]
    one_sided: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Which checkpoint is preferred, if both intervals exclude 0.5."""
        intervals = [self.wilson_interval, self.prompt_interval or self.wilson_interval]
        if min(low for low, _ in intervals) > 0.5:
            return f"{self.first} is preferred"
        if max(high for _, high in intervals) < 0.5:
            return f"{self.second} is preferred"
        return "undecided"

    def record(self) -> dict[str, Any]:
        """The JSON record."""
        return asdict(self) | {"verdict": self.verdict}


def win_rates(key_file: Path, vote_files: Sequence[Path]) -> dict[str, WinRate]:
    """Count votes, for each question apart: `QUESTIONS`, or `OVERALL` for files of pages that asked one.

    Args:
        key_file: ``preference_key.json`` of the page.
        vote_files: the saved votes, one file per voter.

    Raises:
        UserError: a file is missing or malformed, belongs to another page, or two files have the same voter.
    """
    key = _read_json(key_file)
    try:
        first, second = map(str, key["checkpoints"])
        pairs = [(int(entry["prompt"]), str(entry["left"])) for entry in key["pairs"]]
        page = str(key["page"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{key_file} is not the preference_key.json of a preference page") from None
    ballots: dict[str, list[_Ballot]] = {}
    files: dict[str, Path] = {}
    for file in vote_files:
        voter, votes = _votes(file, page, len(pairs))
        if voter in files:
            raise UserError(f"{files[voter]} and {file} are both by {voter!r}; keep one of them")
        files[voter] = file
        for question, place, choice in votes:
            prompt, left = pairs[place]
            won = 0.5 if choice == "tie" else float((choice == "left") == (left == first))
            ballots.setdefault(question, []).append(_Ballot(voter, prompt, choice, won))
    if not ballots:
        raise UserError("the vote files contain no votes")
    return {name: _counted(first, second, ballots[name]) for name in (*QUESTIONS, OVERALL) if name in ballots}


@dataclass(frozen=True)
class _Ballot:
    """One answer: who, on which prompt, the side, and its points for the first checkpoint."""

    voter: str
    prompt: int
    choice: str
    won: float


def _counted(first: str, second: str, ballots: Sequence[_Ballot]) -> WinRate:
    points: dict[int, list[float]] = {}
    sides: dict[str, Counter[str]] = {}
    for ballot in ballots:
        points.setdefault(ballot.prompt, []).append(ballot.won)
        sides.setdefault(ballot.voter, Counter())[ballot.choice] += 1
    counts, total = Counter(ballot.won for ballot in ballots), len(ballots)
    decisions = {voter: (side["left"], side["right"]) for voter, side in sides.items()}
    left = sum(votes for votes, _ in decisions.values())
    decided = total - counts[0.5]
    rate = sum(ballot.won for ballot in ballots) / total
    by_prompt = ratio_of_means(
        [sum(votes) for votes in points.values()], [len(v) for v in points.values()], paired=True
    )
    assert by_prompt is not None
    low, high = by_prompt.low, by_prompt.high
    return WinRate(
        first,
        second,
        counts[1.0],
        counts[0.0],
        counts[0.5],
        rate,
        wilson_interval(rate, total),
        None if low is None or high is None else (low, high),
        left / decided if decided else None,
        {voter: side.total() for voter, side in sides.items()},
        tuple(
            voter for voter, (left, right) in decisions.items() if not (left and right) and left + right >= _ONE_SIDED
        ),
    )


def wilson_interval(rate: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 22, 1927); a tie may count as half a win."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _votes(file: Path, page: str, pairs: int) -> tuple[str, list[tuple[str, int, str]]]:
    """The voter, and (question, pair, choice) of every vote."""
    data = _read_json(file)
    voter, votes = (data.get("voter"), data.get("votes")) if isinstance(data, dict) else (None, None)
    if not isinstance(voter, str) or not voter or not isinstance(votes, dict):
        raise UserError(f"{file} is not a file of votes from a preference page")
    if data.get("page") != page:
        raise UserError(f"{file} holds votes on another page ({data.get('page')}, not {page})")
    found = []
    for place, answers in votes.items():
        if not (isinstance(place, str) and place.isascii() and place.isdigit() and int(place) < pairs):
            raise UserError(f"{file}: there is no pair {place!r}; the page has pairs 0 to {pairs - 1}")
        for question, choice in (answers if isinstance(answers, dict) else {OVERALL: answers}).items():
            if question not in (*QUESTIONS, OVERALL):
                raise UserError(
                    f"{file}: pair {place} has a vote on {question!r}, expected one on {', '.join(QUESTIONS)}"
                )
            if choice not in CHOICES:
                raise UserError(f"{file}: the vote on pair {place} must be one of {', '.join(CHOICES)}, got {choice!r}")
            found.append((question, int(place), str(choice)))
    return voter, found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
