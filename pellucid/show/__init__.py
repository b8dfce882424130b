"""Views of a run: what people see of the walk, as figures and as one page."""
