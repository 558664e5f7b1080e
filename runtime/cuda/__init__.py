"""NVIDIA GPUs through libcuda: the driver binding, launches with frozen arguments, programs bound to fixed sizes."""
