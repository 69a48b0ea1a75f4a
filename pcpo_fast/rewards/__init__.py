"""Rewards: scores of images for their prompts.

A reward is any callable ``(images, prompts, metadata) -> scores`` that takes a float32 tensor [B, 3, H, W] in 0..1, B
prompts and B metadata dictionaries, and returns B finite numbers (tensor, array or list); higher is better. Each has
its own file; :mod:`pcpo_fast.rewards.registry` finds them by name, :mod:`pcpo_fast.rewards.scoring` calls and checks
them.
"""

from pcpo_fast.rewards.registry import Reward, available_rewards, load_reward
from pcpo_fast.rewards.scoring import RewardSet, Scores

__all__ = ["Reward", "RewardSet", "Scores", "available_rewards", "load_reward"]
