"""The managers wired together: start order, stop order, reload."""
