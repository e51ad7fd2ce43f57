"""What runs: each manager keeps one desired state in force."""
