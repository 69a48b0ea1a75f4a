"""What a setting is: the one vocabulary in which :mod:`pcpo_fast.config.schema` declares it, and how it is looked up.

Resuming, comparing, composing runs and starting on several hosts all ask here, so that they cannot disagree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from pydantic import BaseModel


@dataclass(frozen=True)
class Role:
    """What a setting is. A section's ``role`` is that of its fields; a field with another one has it in ``Annotated``.

    Attributes:
        on_resume: ``fixed``: a resumed run must have the value it began with; ``free``: it may have another one;
            ``by_content``: free where the run directory records the content that the setting names.
        in_comparison: ``decisive``: variants with different values learn different things, or measure them differently;
            ``incidental``: they do not; ``own``: it tells runs of one variant apart, and is no difference at all.
        base_model: what the base model computes depends on it, so runs that are composed must share it.
        per_host: hosts of one run may have different values: what they name is compared by its content, or is theirs.
    """

    on_resume: Literal["fixed", "free", "by_content"] = "fixed"
    in_comparison: Literal["decisive", "incidental", "own"] = "decisive"
    base_model: bool = False
    per_host: bool = False


RESULT = Role()
"""Decides what is learnt, or how it is measured."""
BASE_MODEL = Role(base_model=True)
BASE_FILES = Role(base_model=True, per_host=True)
"""Where the base model lies."""
EXECUTION = Role(on_resume="free", in_comparison="incidental")
"""How the run works, not what it learns: speed, memory, records, waiting; at most the last digits of a number."""
CHANGEABLE = Role(on_resume="free")
"""Decides what is learnt, but somebody who resumes may have reason to change it: how long to train, say."""


def roles(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, Role | None]]:
    """(dotted key, role) of every setting in a section and those below; None where none is declared.

    A list of sections has a role as a whole (``rewards``), and so has each setting in them (``rewards.weight``).
    """
    default = getattr(section, "role", None)
    for name, field in section.model_fields.items():
        below = sections_in(field.annotation)
        if field.annotation not in below:
            yield above + name, next((item for item in field.metadata if isinstance(item, Role)), default)
        for kind in below:
            yield from roles(kind, f"{above}{name}.")


def role_of(section: type[BaseModel], key: str) -> Role:
    """The role of a dotted key, which may have positions of a list in it and go on into a mapping.

    Raises:
        KeyError: there is no such setting, or it declares no role.
    """
    declared = _declared(section)
    parts = [part for part in key.split(".") if not part.isdecimal()]
    for length in range(len(parts), 0, -1):
        role = declared.get(".".join(parts[:length]))
        if role is not None:
            return role
    raise KeyError(key)


@cache
def _declared(section: type[BaseModel]) -> dict[str, Role | None]:
    return dict(roles(section))


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections among a field's annotation and the annotation's arguments."""
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
