"""The API server: how it is reached, and requests to it."""
