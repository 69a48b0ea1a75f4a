"""The configuration of a run: schema, presets, loading from YAML and command line, and error messages."""
