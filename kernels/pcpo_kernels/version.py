"""The version, readable without importing PyTorch; pcpo_fast has the same version."""

__version__ = "0.1.0"
