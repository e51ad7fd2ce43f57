"""The container image, built and run: NODEAGENT_IMAGE=1 make test TESTS=tests/image."""
