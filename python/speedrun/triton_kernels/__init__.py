"""Triton versions of the operators, for any NVIDIA GPU. Imported only when one of them is used."""
