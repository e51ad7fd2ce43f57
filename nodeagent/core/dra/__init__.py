"""Dynamic Resource Allocation as values: pools of devices, and what Prepare does to the ledger."""
