"""Where a model becomes a graph: torch.export, Hugging Face, GGUF."""
