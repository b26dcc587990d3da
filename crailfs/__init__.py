"""CrailFS: a distributed, tiered file system for data that analytics jobs make and throw away."""

__version__ = "0.1.0"
