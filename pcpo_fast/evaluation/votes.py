"""Win rates from the vote files of a preference page."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from pcpo_fast.errors import UserError
from pcpo_fast.reporting.statistics import LEVEL, RESAMPLES, tails

CHOICES = ("left", "right", "tie")
_SEED = 20_250


@dataclass(frozen=True)
class WinRate:
    """How often the first checkpoint was preferred to the second.

    Attributes:
        first, second: names.
        wins, losses, ties: votes, as seen from the first.
        rate: (wins + ties / 2) / votes.
        wilson: 95 % interval that takes every vote for independent.
        by_prompt: 95 % bootstrap interval over prompts, whose votes belong together; None from fewer than two prompts.
        left: share of the left side among votes that chose one: far from 0.5, people did not look.
        voters: votes by person.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    rate: float
    wilson: tuple[float, float]
    by_prompt: tuple[float, float] | None
    left: float | None
    voters: dict[str, int]

    @property
    def verdict(self) -> str:
        """In words; the wider of the two intervals decides."""
        low, high = (self._bound(place) for place in (0, 1))
        if low > 0.5:
            return f"{self.first} is preferred"
        if high < 0.5:
            return f"{self.second} is preferred"
        return "undecided"

    def _bound(self, place: int) -> float:
        bounds = [self.wilson[place], *([] if self.by_prompt is None else [self.by_prompt[place]])]
        return max(bounds) if place else min(bounds)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "win_rate": self.rate,
            "wilson_interval": list(self.wilson),
            "prompt_interval": None if self.by_prompt is None else list(self.by_prompt),
            "left_share": self.left,
            "voters": self.voters,
            "verdict": self.verdict,
        }


def win_rate(key_file: Path, vote_files: Sequence[Path]) -> WinRate:
    """Count votes.

    Args:
        key_file: ``preference_key.json`` of the page.
        vote_files: what people saved, one file each.

    Raises:
        UserError: a file is missing or malformed, belongs to another page, or two are by the same person.
    """
    key = _read_json(key_file)
    try:
        first, second = key["checkpoints"]
        pairs = [(int(entry["prompt"]), str(entry["left"])) for entry in key["pairs"]]
        page = str(key["page"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{key_file} is not the preference_key.json of a preference page") from None
    points: dict[int, list[float]] = {}
    counts: Counter[str] = Counter()
    sides: Counter[str] = Counter()
    voters: dict[str, int] = {}
    files: dict[str, Path] = {}
    for file in vote_files:
        voter, votes = _votes(file, page, len(pairs))
        if voter in files:
            raise UserError(f"{files[voter]} and {file} are both by {voter!r}: keep one of them")
        files[voter], voters[voter] = file, len(votes)
        for place, choice in votes.items():
            prompt, left = pairs[place]
            sides[choice] += 1
            won = choice != "tie" and (choice == "left") == (left == first)
            counts["tie" if choice == "tie" else "win" if won else "loss"] += 1
            points.setdefault(prompt, []).append(0.5 if choice == "tie" else float(won))
    total = sum(counts.values())
    if not total:
        raise UserError("the vote files hold no votes")
    rate = (counts["win"] + counts["tie"] / 2) / total
    decided = sides["left"] + sides["right"]
    return WinRate(
        first,
        second,
        counts["win"],
        counts["loss"],
        counts["tie"],
        rate,
        wilson_interval(rate, total),
        _over_prompts(list(points.values())),
        sides["left"] / decided if decided else None,
        voters,
    )


def wilson_interval(rate: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 22, 1927); also for rates that count a tie as a half."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _over_prompts(points: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    if len(points) < 2:
        return None
    sums = np.array([sum(votes) for votes in points])
    counts = np.array([len(votes) for votes in points])
    drawn = np.random.default_rng(_SEED).integers(len(points), size=(RESAMPLES, len(points)))
    rates = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(rates, tails(len(points)))
    return float(low), float(high)


def _votes(file: Path, page: str, pairs: int) -> tuple[str, dict[int, str]]:
    data = _read_json(file)
    voter, votes = (data.get("voter"), data.get("votes")) if isinstance(data, dict) else (None, None)
    if not isinstance(voter, str) or not voter or not isinstance(votes, dict):
        raise UserError(f"{file} is not a vote file of a preference page")
    if data.get("page") != page:
        raise UserError(f"{file} holds votes of another page ({data.get('page')}, not {page})")
    found = {}
    for place, choice in votes.items():
        if not (isinstance(place, str) and place.isascii() and place.isdigit() and int(place) < pairs):
            raise UserError(f"{file}: there is no pair {place!r}; the page has pairs 0 to {pairs - 1}")
        if choice not in CHOICES:
            raise UserError(f"{file}: the vote on pair {place} must be one of {', '.join(CHOICES)}, got {choice!r}")
        found[int(place)] = str(choice)
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
