"""Files: atomic writes, hashes of what files hold, images read from files."""
