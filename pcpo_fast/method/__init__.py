"""The mathematics, without models: samplers and credit rules as tables, windows, advantages, noise keys, diversity."""
