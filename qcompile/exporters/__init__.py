"""Where a graph leaves in another system's format."""
