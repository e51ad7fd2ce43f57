"""The ledger: who holds what, what can be granted and what may be released."""
