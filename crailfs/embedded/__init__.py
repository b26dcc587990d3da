"""The file system of one host: its state, its sizes, the supervisor of its processes."""
