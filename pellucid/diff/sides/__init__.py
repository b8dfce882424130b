"""What a diff compares: models, recordings, live modules, and the maps from their names to ours."""
