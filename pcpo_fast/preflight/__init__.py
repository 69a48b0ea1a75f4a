"""Checks that find problems of a run before it occupies GPUs."""
