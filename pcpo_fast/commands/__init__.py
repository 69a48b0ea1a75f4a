"""One file per command; each has ``add_parser`` and ``run``, and imports what is slow only in ``run``."""
