"""Several processes as one run: collectives, rendezvous, agreement of the ranks, watchdog, preemption."""
