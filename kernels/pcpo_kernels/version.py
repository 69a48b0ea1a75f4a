"""The version, in a file that can be read without importing PyTorch; pcpo_fast has the same one."""

__version__ = "0.1.0"
