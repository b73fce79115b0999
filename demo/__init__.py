"""The whole path on songs made of arithmetic: ``python -m demo``."""
