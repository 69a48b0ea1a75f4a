"""Recording and presenting training runs: metrics, live display, image grids, figures, tables, HTML pages."""
