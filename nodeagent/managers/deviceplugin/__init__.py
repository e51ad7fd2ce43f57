"""Serves resources through the device-plugin API."""
