"""Files: atomic writes, locks, hashes of what files hold, images read from files."""
