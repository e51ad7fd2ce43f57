"""Builds the container image of nodeagent from Debian packages and the product's wheel, without a container engine."""
