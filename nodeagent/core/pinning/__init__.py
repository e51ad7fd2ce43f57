"""From the ledger and the containers to what each cgroup must be."""
