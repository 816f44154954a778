"""Backend `cpu`: kernels in C++ for AVX-512 with AMX, AVX-512, AVX2 and whatever else a compiler knows."""
