"""Words of messages that depend on numbers."""


def counted(count: int, what: str) -> str:
    """``1 run``, ``2 runs``; ``what`` is in the singular, and its last word gets the ending."""
    ending = "" if count == 1 else "es" if what.endswith(("ss", "x", "tch", "nch")) else "s"
    return f"{count} {what}{ending}"
