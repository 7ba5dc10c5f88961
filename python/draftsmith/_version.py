"""The version of the wheel: that of the program. The wheel is not made where they differ."""

__version__ = "0.1.0"
