"""Sampling from trained runs: implicit reward guidance, sweeps over its scale, and grids of images."""
