"""Keeps network adapters as containers and the plugins of others need them."""
