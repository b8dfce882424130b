"""Two training steps held against each other: losses, gradients, updates."""
