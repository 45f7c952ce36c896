"""What a user may write: the keys, the reading of TOML files, and the rules between keys."""
