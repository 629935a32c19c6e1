"""Settings of an experiment: their composition, TOML form, errors and reference."""
