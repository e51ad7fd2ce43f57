"""Network interfaces through rtnetlink, in any network namespace."""
