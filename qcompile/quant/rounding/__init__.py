"""How weights are rounded to a format, one file per method: pure functions from tensors to a packed weight."""
