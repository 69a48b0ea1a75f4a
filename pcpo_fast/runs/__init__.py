"""The files of a run: run directory, checkpoints with manifests, and exports."""
