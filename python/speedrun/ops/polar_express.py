"""Front door of `polar_express`: orthogonalises a bank of matrices. Backend: the reference."""

from speedrun.reference.polar_express import polar_express

__all__ = ["polar_express"]
