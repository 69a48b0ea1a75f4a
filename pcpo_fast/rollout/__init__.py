"""An epoch's data: the plan of who samples what, trajectories, scores and advantages; generation without training."""
