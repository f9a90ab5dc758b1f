"""Speedrun: the NanoGPT speedrun as a package. Importing it starts nothing."""

__version__ = "0.1.0"
