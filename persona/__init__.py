"""persona: a private language model that learns each of its users."""

__version__ = "0.1.0"
