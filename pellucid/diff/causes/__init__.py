"""What goes wrong in ports: hypotheses, and the search for the one that reproduces B's values."""
