"""The kernels, in Triton's language: no host code, no torch. Each file says which op its kernels are for."""
