"""A module per file format: names and layout of its tensors, reading and writing."""
