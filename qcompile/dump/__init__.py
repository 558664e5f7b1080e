"""What was done to a model, on disk: one listing and one diff per pass."""
