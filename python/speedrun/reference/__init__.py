"""The operators in plain PyTorch: specification, CPU backend, test oracle, benchmark baseline."""
