"""Published algorithms as defaults: each is a handful of named choices on the same loop.

Numbers: docs/method.md, section on the published runs. A value in the user's file or on the command line wins.
"""

from typing import Any

DEFAULT_CONFIG = "configs/tiny_flux.yaml"
"""What a command uses that is given no configuration: the demo, in the project's folder."""

_DANCE_SAMPLER = {"name": "dance", "steps": 16, "noise": 0.3, "shift": 3.0}
_FLOW_SAMPLER = {"name": "flow", "steps": 10, "noise": 0.7, "shift": 3.0, "grid": "scheduler"}

PRESETS: dict[str, dict[str, Any]] = {
    # Lee and Ye, PCPO (ICLR 2026), on DanceGRPO's sampler: log-hinge and proportionate credit.
    "pcpo": {
        "sampler": _DANCE_SAMPLER,
        "credit": {"rule": "proportionate", "objective": "hinge", "clip_range": 1e-4},
        "advantage": {"normalization": "group", "clip": 5.0},
        "rollout": {"same_initial_noise": True},
    },
    # Xue et al., DanceGRPO (2025): PPO clip on the native log-ratio.
    "dancegrpo": {
        "sampler": _DANCE_SAMPLER,
        "credit": {"rule": "native", "objective": "clip", "clip_range": 1e-4},
        "advantage": {"normalization": "group", "clip": 5.0},
        "rollout": {"same_initial_noise": True},
    },
    # Liu et al., Flow-GRPO (2025): PPO clip, per-prompt mean with the global spread, KL without the step length.
    "flow_grpo": {
        "sampler": _FLOW_SAMPLER,
        "credit": {
            "rule": "native",
            "objective": "clip",
            "clip_range": 1e-4,
            "kl_coefficient": 0.04,
            "kl": "published",
        },
        "advantage": {"normalization": "flow_grpo", "clip": 5.0},
        "rollout": {"same_initial_noise": False},
    },
}
