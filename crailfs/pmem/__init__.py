"""Persistent memory: small typed bindings of libpmem and libpmemobj, and mappings of a region.

The C libraries come from the distribution. Everything else works without them:
``libpmem.missing()`` and ``libpmemobj.missing()`` say why the tier cannot be used.
"""
