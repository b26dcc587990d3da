"""Rebuilding the files of a lost name space from what the regions themselves note of each block."""
