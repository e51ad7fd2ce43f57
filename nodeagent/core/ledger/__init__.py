"""Who holds what: grants, what may be granted, what may be released."""
