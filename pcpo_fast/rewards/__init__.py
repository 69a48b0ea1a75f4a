"""Rewards: how good an image is for its prompt.

A reward is any callable ``(images, prompts, metadata) -> scores`` on a float32 tensor [B, 3, H, W] in 0..1, B prompts
and B metadata dictionaries, which returns B finite numbers (tensor, array or list); more is better. One file each;
:mod:`pcpo_fast.rewards.registry` finds them by name, :mod:`pcpo_fast.rewards.scoring` calls and checks them.
"""

from pcpo_fast.rewards.registry import Reward, available_rewards, load_reward
from pcpo_fast.rewards.scoring import RewardSet, Scores

__all__ = ["Reward", "RewardSet", "Scores", "available_rewards", "load_reward"]
