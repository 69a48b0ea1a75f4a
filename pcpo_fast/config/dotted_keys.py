"""Flattens nested values to dotted keys, as on the command line."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def flattened(value: Any, key: str = "", *, lists: bool = False) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all values below; an empty mapping is a value, and so is a list.

    Args:
        value: mappings within mappings.
        key: of ``value`` itself.
        lists: whether a list that holds mappings is gone into, by position.
    """
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from flattened(below, f"{key}.{name}" if key else str(name), lists=lists)
    elif lists and isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
        for position, item in enumerate(value):
            yield from flattened(item, f"{key}.{position}", lists=lists)
    else:
        yield key, value
