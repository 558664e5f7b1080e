"""The C++ backend's place: it will emit CPU kernels; until then `torch_cpu` serves every `cpu-*` target."""
