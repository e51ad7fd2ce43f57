"""Opaque configurations of claims: what each kind may say, and how it is read."""
