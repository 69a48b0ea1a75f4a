"""Published algorithms as defaults: each is a handful of named choices on the same loop.

Tables of all of them, with their papers: docs/algorithms.md. A value in the user's file or on the command line wins.
What belongs to a model and not to an algorithm (its size, its guidance, learning rates) is in ``configs/``.
"""

from collections.abc import Mapping
from typing import Any

DEFAULT_CONFIG = "configs/tiny_flux.yaml"
"""Configuration of commands that are given none: the demo (found by :mod:`pcpo_fast.config.shipped`)."""

Preset = dict[str, dict[str, Any]]


def _varied(base: Preset, **sections: Mapping[str, Any]) -> Preset:
    """``base`` with settings of some sections replaced or added."""
    names = dict.fromkeys((*base, *sections))
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in names}


# Flow models

# Lee and Ye, PCPO (ICLR 2026, arXiv:2509.25774), on DanceGRPO's sampler: log-hinge and proportionate credit.
_PCPO: Preset = {
    "sampler": {"name": "dance", "steps": 16, "noise": 0.3, "shift": 3.0},
    "credit": {"rule": "proportionate", "objective": "hinge", "clip_range": 1e-4},
    "advantage": {"normalization": "group", "clip": 5.0},
    "rollout": {"same_initial_noise": True},
}

# PCPO's loop and objective with credit for what each step changed, which is this project's, not the paper's. Rule,
# lambda and calibration are those that did best on the search seeds (docs/stepwise.md).
_PCPO_STEPWISE = _varied(_PCPO, credit={"rule": "native"}, advantage={"steps": "gain", "calibrated": False})

# Xue et al., DanceGRPO (2025, arXiv:2505.07818): PPO clip on the native log-ratio, sample standard deviation.
_DANCE_GRPO = _varied(
    _PCPO, credit={"rule": "native", "objective": "clip"}, advantage={"epsilon": 1e-8, "unbiased": True}
)

# Liu et al., Flow-GRPO (2025, arXiv:2505.05470): per-prompt mean with the global spread, KL without the step length.
_FLOW_GRPO: Preset = {
    "sampler": {"name": "flow", "steps": 10, "noise": 0.7, "shift": 3.0, "grid": "scheduler"},
    "credit": {
        "rule": "native",
        "objective": "clip",
        "clip_range": 1e-4,
        "kl_coefficient": 0.04,
        "kl": "published",
    },
    "advantage": {"normalization": "flow_grpo", "clip": 5.0, "epsilon": 1e-4},
    "rollout": {"same_initial_noise": False},
}

# Lee and Ye, PCPO on Flow-GRPO's sampler, as for Stable Diffusion 3.5. zeta leaves out the last step, which the
# scheduler makes so short that its credit would enlarge that of the others by 44 % (docs/algorithms.md).
_PCPO_FLOW = _varied(_FLOW_GRPO, credit={"rule": "proportionate", "objective": "hinge", "normalize_over": "trained"})

# He et al., TempFlow-GRPO (ICLR 2026, arXiv:2508.04324), the noise-aware weighting alone: its trees are not built in.
# Its code weighs a step by 2.25 std, which is std over its mean over the trained steps (2.252 std).
_TEMPFLOW = _varied(
    _FLOW_GRPO,
    credit={"rule": "tempflow", "normalize_over": "trained", "kl_coefficient": 0.004, "kl": "exact"},
    advantage={"normalization": "group"},
)

# Wang et al., GRPO-Guard (CVPR 2026, arXiv:2510.22319): RatioNorm, whose small ratios take a small clip range.
_GRPO_GUARD = _varied(
    _FLOW_GRPO,
    credit={"rule": "grpo_guard", "clip_range": 2e-6, "kl_coefficient": 0.0},
    advantage={"normalization": "group"},
)

# Lee, Chang, Kim and Ye, Reward Score Matching (2026, arXiv:2604.17415): "fair_clip" of its code, on the log-hinge.
_FAIR_CLIP = _varied(_FLOW_GRPO, credit={"rule": "fair_clip", "objective": "hinge", "kl_coefficient": 0.01})

# Wang and Yu, Coefficients-Preserving Sampling (2025, arXiv:2509.05952), with the noise of Flow-GRPO's configurations.
_FLOW_CPS = _varied(
    _FLOW_GRPO, sampler={"name": "cps", "noise": 0.8}, credit={"rule": "cps_published", "kl_coefficient": 0.0}
)

# Flow-GRPO-Fast, as its authors recommend it now: CPS, noise in three steps somewhere in the first half.
_FLOW_GRPO_FAST = _varied(
    _FLOW_CPS,
    credit={"clip_range": 1e-5, "steps": (0, 1, 2, 3, 4)},
    window={"size": 3, "schedule": "random", "interval": 1},
)

# Li et al., MixGRPO (2025, arXiv:2507.21802): DanceGRPO's loop, Flow-GRPO's noise inside a window that moves.
_MIX_GRPO = _varied(
    _DANCE_GRPO,
    sampler={"name": "flow", "steps": 25, "noise": 0.7},
    window={"size": 4, "schedule": "progressive", "interval": 25, "stride": 1, "wrap": True},
)

# Diffusion models (Stable Diffusion 1.x)

# Black et al., DDPO (ICLR 2024, arXiv:2305.13301): no groups but a buffer per prompt, and the last step is trained.
_DDPO: Preset = {
    "sampler": {"name": "ddim", "steps": 50, "noise": 1.0},
    "credit": {"rule": "native", "objective": "clip", "clip_range": 1e-4, "train_last_step": True},
    "advantage": {"normalization": "running", "clip": 5.0, "epsilon": 1e-6, "buffer_size": 16, "min_count": 16},
    "rollout": {"prompts_per_epoch": 256, "images_per_prompt": 1, "same_initial_noise": False},
}

# PCPO on DDPO's loop. The variance stays native, which any number of steps allows (docs/algorithms.md).
_PCPO_DDPO = _varied(_DDPO, credit={"rule": "uniform", "objective": "hinge"})

# DanceGRPO on Stable Diffusion 1.4: groups from the same noise, all steps but the last.
_DANCE_GRPO_DIFFUSION: Preset = {
    "sampler": {"name": "ddim", "steps": 50, "noise": 1.0},
    "credit": {"rule": "native", "objective": "clip", "clip_range": 1e-4},
    "advantage": {"normalization": "group", "clip": 5.0, "epsilon": 1e-8, "unbiased": True},
    "rollout": {"same_initial_noise": True},
}

# PCPO on that loop.
_PCPO_DIFFUSION = _varied(_DANCE_GRPO_DIFFUSION, credit={"rule": "uniform", "objective": "hinge"})

# The same with credit for what each step changed, in the form that learned best (docs/stepwise.md).
_PCPO_STEPWISE_DIFFUSION = _varied(_PCPO_DIFFUSION, advantage={"steps": "gain", "scored_steps": 4})

PRESETS: dict[str, Preset] = {
    "pcpo": _PCPO,
    "pcpo_stepwise": _PCPO_STEPWISE,
    "pcpo_flow": _PCPO_FLOW,
    "pcpo_diffusion": _PCPO_DIFFUSION,
    "pcpo_stepwise_diffusion": _PCPO_STEPWISE_DIFFUSION,
    "pcpo_ddpo": _PCPO_DDPO,
    "dancegrpo": _DANCE_GRPO,
    "dancegrpo_diffusion": _DANCE_GRPO_DIFFUSION,
    "ddpo": _DDPO,
    "flow_grpo": _FLOW_GRPO,
    "flow_grpo_fast": _FLOW_GRPO_FAST,
    "flow_cps": _FLOW_CPS,
    "mixgrpo": _MIX_GRPO,
    "tempflow": _TEMPFLOW,
    "grpo_guard": _GRPO_GUARD,
    "fair_clip": _FAIR_CLIP,
}
