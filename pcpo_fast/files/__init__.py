"""Files: atomic writes, locks, content hashes, reading images."""
