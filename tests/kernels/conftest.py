"""Makes ``cases`` importable from this folder and the one below."""
