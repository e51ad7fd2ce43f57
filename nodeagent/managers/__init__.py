"""The managers: each keeps one desired state in force."""
