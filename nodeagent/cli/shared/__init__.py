"""What the verbs have in common: where facts come from, and how they are shown."""
