"""Estimates before a run starts: memory per GPU, floating-point operations, and which settings fit."""
