"""The search for joint placements in plain Python: what the compiled core must find, refuse and explain.

It is exact within the same bounds and takes the same steps in the same order, so that answers that are cut short are
equal too. CPUs alone it leaves to the compiled search, which has an oracle of its own (tests/oracles/placement.py).
"""
