"""Front door of `polar_express`: orthogonalises a bank of matrices. Backend: the reference."""

from speedrun.reference.polar_express import orthogonalize, polar_express

__all__ = ["orthogonalize", "polar_express"]
