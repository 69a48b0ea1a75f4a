"""Passwords and keys are hidden wherever a run's settings are shown: in trackers, on pages, in the recorded command."""

import re

HIDDEN = "(not shown)"
_NAME = r"(?:api_?key|password|passwd|secret|(?<![a-z])token)"
_KEY = re.compile(rf"{_NAME}$", re.IGNORECASE)
_IN_YAML = re.compile(
    rf"^(\s*(?:-\s+)?[\"']?[\w.-]*{_NAME}[\"']?\s*:[ \t]*)(?!null\b|~)\S.*$", re.IGNORECASE | re.MULTILINE
)
_IN_COMMAND = re.compile(rf"({_NAME}[\w.-]*[\"']?\s*[:=]\s*)[^\s,}}]+", re.IGNORECASE)


def names_secret(key: str) -> bool:
    """Whether a setting, by its dotted key, looks like a password or key."""
    return _KEY.search(key) is not None


def without_secrets(yaml: str) -> str:
    """A YAML text with the values of such keys hidden."""
    return _IN_YAML.sub(rf"\1{HIDDEN}", yaml)


def command_without_secrets(command: str) -> str:
    """A command line with the values of such settings hidden, also inside ``{...}``."""
    return _IN_COMMAND.sub(rf"\1{HIDDEN}", command)
