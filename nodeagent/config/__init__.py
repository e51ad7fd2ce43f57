"""The configuration file: schema, loading and validation."""
