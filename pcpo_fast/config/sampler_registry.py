r"""The samplers by name: what the configuration, ``pcpo-fast credit`` and the documentation know of them.

A sampler is an entry here and its function, which :mod:`pcpo_fast.method.transitions` holds. The function is given as
text and imported when a table is made: a configuration is checked, and a command line parsed, without torch.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["flow", "diffusion"]
Variance = Literal["native", "reshaped", "exact"]

GRID_SETTINGS: dict[Kind, tuple[str, ...]] = {"flow": ("shift", "grid"), "diffusion": ()}
"""Settings that make the times of a kind of model; a diffusion model's scheduler leaves no choice."""


@dataclass(frozen=True)
class Sampler:
    """One sampler.

    Attributes:
        function: ``module:name`` of the function that returns its :class:`~pcpo_fast.method.transitions.Transitions`.
            It is called with ``(times, noise)`` for flow models and with
            ``(alphas_cumprod, timesteps, noise, prediction=...)`` for diffusion models, and with ``settings`` by name,
            which have the configuration's defaults there.
        kind: of the models that it samples.
        noise: its noise level where ``pcpo-fast credit`` is given none.
        row: what docs/algorithms.md says of it: who published it, then ``a``, ``b`` and ``std``.
        settings: further settings of the configuration's ``sampler`` section that it takes.
        published_as: the algorithms that sample with it, where its own name does not say so.
    """

    function: str
    kind: Kind
    noise: float
    row: tuple[str, str, str, str]
    settings: tuple[str, ...] = ()
    published_as: str = ""

    @property
    def takes(self) -> tuple[str, ...]:
        """The settings that matter to it, besides those that matter to every sampler."""
        return GRID_SETTINGS[self.kind] + self.settings

    def load(self) -> Callable[..., Any]:
        """Its function."""
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found


SAMPLERS: dict[str, Sampler] = {
    "dance": Sampler(
        "pcpo_fast.method.transitions:dance_sde",
        kind="flow",
        noise=0.3,
        row=(
            "DanceGRPO [3]",
            r"$`1 - \Delta t\,\frac{\eta^2}{2t}`$",
            r"$`-\Delta t \left(1 + (1-t) \frac{\eta^2}{2t}\right)`$",
            r"$`\eta \sqrt{\Delta t}`$",
        ),
        published_as="DanceGRPO",
    ),
    "flow": Sampler(
        "pcpo_fast.method.transitions:flow_sde",
        kind="flow",
        noise=0.7,
        row=(
            r"Flow-GRPO [4], $`\sigma = \eta \sqrt{t / (1 - t)}`$",
            r"$`1 - \Delta t\,\frac{\sigma^2}{2t}`$",
            r"$`-\Delta t \left(1 + (1-t) \frac{\sigma^2}{2t}\right)`$",
            r"$`\sigma \sqrt{\Delta t}`$",
        ),
        published_as="Flow-GRPO",
    ),
    "cps": Sampler(
        "pcpo_fast.method.transitions:coefficients_preserving",
        kind="flow",
        noise=0.7,
        row=(
            r"Flow-CPS [5], $`r = \sqrt{t'^2 - s^2}`$",
            r"$`1 - t' + r`$",
            r"$`-t (1 - t') + (1 - t)\, r`$",
            r"$`t' \sin(\eta \pi / 2)`$",
        ),
    ),
    "ddim": Sampler(
        "pcpo_fast.method.transitions:ddim",
        kind="diffusion",
        noise=1.0,
        row=(
            r"DDPO [2]; epsilon, $`c = \sqrt{(1 - \bar\alpha)\, \bar\alpha' / \bar\alpha}`$",
            r"$`\sqrt{\bar\alpha' / \bar\alpha}`$",
            r"$`\sqrt{1 - \bar\alpha' - s^2} - c`$",
            r"$`\eta \sqrt{\frac{1 - \bar\alpha'}{1 - \bar\alpha} \left(1 - \frac{\bar\alpha}{\bar\alpha'}\right)}`$",
        ),
        settings=("variance", "weight"),
        published_as="DDPO, DanceGRPO",
    ),
}
"""Every sampler, in the order in which people read of them."""


def samplers_of(kind: Kind) -> list[str]:
    """The names of those that sample a kind of model."""
    return [name for name, sampler in SAMPLERS.items() if sampler.kind == kind]


def samplers_taking(setting: str, *, taken: bool = True) -> list[str]:
    """The names of those that take a setting, or of those that do not."""
    return [name for name, sampler in SAMPLERS.items() if (setting in sampler.takes) == taken]


def listed(names: Iterable[str], last: str = "or") -> str:
    """``a, b or c``."""
    *others, final = names
    return f"{', '.join(others)} {last} {final}" if others else final
