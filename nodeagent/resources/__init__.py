"""A configured resource: the core's resource joined with a host kind."""
