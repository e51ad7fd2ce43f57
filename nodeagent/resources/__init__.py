"""A configured resource: the core's resource combined with a host kind."""
