"""What a run leaves on disk: its directory, checkpoints with manifests, and exports."""
