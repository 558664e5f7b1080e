"""The C++ backend: kernels for CPUs as one readable source per artifact, compiled by the machine's own compiler."""
