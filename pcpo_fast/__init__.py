"""Train FLUX and Stable Diffusion with Proportionate Credit Policy Optimization."""

__version__ = "0.1.0"
