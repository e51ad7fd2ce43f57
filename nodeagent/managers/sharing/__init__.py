"""Keeps MPS daemons and time slices of GPUs as the ledger has them."""
