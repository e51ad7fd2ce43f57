"""The API server: credentials, connections and requests."""
