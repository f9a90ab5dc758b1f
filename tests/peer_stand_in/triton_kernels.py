"""Stands where the peer has its kernels; its program imports this from its own folder."""

NAME = "kernels of the stand-in"
