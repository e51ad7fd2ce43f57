"""The single owner of inventory, ledger and health; every decision is durable before it takes effect."""
