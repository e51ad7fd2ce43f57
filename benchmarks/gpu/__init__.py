"""What only a real GPU of NVIDIA's can show: python -m benchmarks.gpu, as root, on a node with one or more.

It changes no setting of the card: no MIG mode, no instance, no clocks, no compute mode. Each part stands by itself.
"""
