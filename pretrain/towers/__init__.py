"""What the two towers are: their description, starting weights, scale and bias, locks, and recomputation."""
