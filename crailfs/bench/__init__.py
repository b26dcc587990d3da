"""``crail bench``: the same workloads on several directories at once, and on the store API."""
