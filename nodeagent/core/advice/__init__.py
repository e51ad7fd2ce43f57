"""What would be if: which pods stand in the way of a request, which to move, how many more fit. Decides nothing."""
