"""The mathematics, without models: samplers and credit rules as tables, schedules, windows, advantages, noise keys."""
