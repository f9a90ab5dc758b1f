"""Stands where the peer has its other kernels."""
