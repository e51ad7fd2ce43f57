"""The user-space files of NVIDIA's driver: where they are on the host, and what a container gets of them."""
