"""The mathematics: samplers, schedules and credit rules as tables, windows, advantages, noise keys; no models."""
