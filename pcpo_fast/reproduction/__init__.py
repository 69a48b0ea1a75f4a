"""Whether a run reproduces what was published, or what this project committed: acceptance bands as data."""
