"""The training loop: a run's inputs, the update, held-out evaluation, and the results written at the end."""
