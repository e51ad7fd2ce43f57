"""The device-plugin API as values: advertised ids, and what Allocate does to the ledger."""
