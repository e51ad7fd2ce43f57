"""The one owner of inventory, ledger and health; every decision is durable first."""
