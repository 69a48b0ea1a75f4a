"""Where a run's time goes: a trace of one epoch with named ranges, and its summary."""
