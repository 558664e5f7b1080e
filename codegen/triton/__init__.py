"""The Triton backend: one complete, readable source file per kernel, built ahead of time without a GPU."""
