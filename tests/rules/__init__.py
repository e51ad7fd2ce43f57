"""What must hold for all files: layout, linters, packaging, documentation."""
