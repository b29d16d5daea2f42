"""What a run's folder tells of it, read while it is written and without torch: how far a run is, and beside others."""
