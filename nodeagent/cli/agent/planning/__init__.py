"""Verbs that plan with the running agent's ledger: what to move, and how much more fits."""
