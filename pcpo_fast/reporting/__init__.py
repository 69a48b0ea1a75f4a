"""Records of a training run and how people look at them: metrics, live display, grids, figures, the report."""
