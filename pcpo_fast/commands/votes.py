"""``pcpo-fast votes``: win rates from people's votes."""

import argparse
from typing import TYPE_CHECKING

from pcpo_fast.config.wording import counted

if TYPE_CHECKING:
    from pcpo_fast.evaluation.votes import WinRate

EXAMPLES = """example:
  pcpo-fast evaluate --checkpoint base --checkpoint pcpo=runs/pcpo --preference pcpo,base
  (people open runs/evaluation/preference.html, vote, and send back the file that it saves)
  pcpo-fast votes runs/evaluation/preference_key.json votes-anna.json votes-ben.json"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "votes",
        help="win rates from a preference page's vote files",
        description="Turn the vote files of a blind preference page into win rates with intervals, for each question.",
        epilog=EXAMPLES,
    )
    parser.add_argument("key", metavar="KEY", help="preference_key.json, written by evaluate beside the page")
    parser.add_argument("votes", nargs="+", metavar="VOTES", help="vote files saved by the page")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Count the votes and print the win rate."""
    import json
    from pathlib import Path

    from pcpo_fast.evaluation.votes import OVERALL, QUESTIONS, win_rates

    rates = win_rates(Path(arguments.key), [Path(file) for file in arguments.votes])
    if arguments.json:
        records = {question: found.record() for question, found in rates.items()}
        print(json.dumps(records[OVERALL] if list(records) == [OVERALL] else {"questions": records}))
        return 0
    for question, found in rates.items():
        if question != OVERALL:
            print(f"Which image {QUESTIONS[question]}?")
        _print(found)
    return 0


def _print(found: "WinRate") -> None:
    total = found.wins + found.losses + found.ties
    low, high = found.wilson_interval
    print(f"{found.first} against {found.second}: {found.wins} won, {found.losses} lost, {counted(found.ties, 'tie')}")
    print(f"Win rate of {found.first}, ties counted as half: {found.win_rate:.1%} of {counted(total, 'vote')}")
    print(f"  95 % interval, votes independent (Wilson):    {low:.1%} to {high:.1%}")
    if found.prompt_interval is not None:
        low, high = found.prompt_interval
        print(f"  95 % interval over prompts (bootstrap):       {low:.1%} to {high:.1%}")
    if found.left_share is not None:
        print(f"The left side was chosen in {found.left_share:.0%} of the votes that were not ties")
    for voter in found.one_sided:
        print(f"warning: {voter} always chose the same side; leave that file out unless the voter really looked")
    print("Voters: " + ", ".join(f"{name} ({count})" for name, count in found.voters.items()))
    print(f"Verdict: {found.verdict}")
