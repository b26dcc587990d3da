"""Every bound of the system in one place, asserted against each other at import.

Sizes are in bytes and times in milliseconds unless the name says otherwise. A peer's message is
held against these before anything is allocated for it.
"""

from typing import Final

from crailfs.units import GIB, KIB, MIB

# --- protocol -----------------------------------------------------------------------------------
PROTOCOL_VERSION: Final = 1
HEADER_BYTES: Final = 24
BODY_MAX_BYTES: Final = 4 * MIB
PAYLOAD_MAX_BYTES: Final = 4 * MIB
HANDSHAKE_BODY_MAX_BYTES: Final = 4 * KIB
"""Before a peer has shown the cluster's secret it may make us hold no more than this."""
HANDSHAKE_TIMEOUT_MS: Final = 5_000
FRAME_TIMEOUT_MS: Final = 30_000
"""From a frame's first byte to its last: a slow-drip sender is cut off after this."""
CONNECTIONS_MAX: Final = 4_096
UNAUTHENTICATED_CONNECTIONS_MAX: Final = 1_024
REQUESTS_IN_FLIGHT_MAX: Final = 1_024
"""Per connection; a sender beyond it is not read from until some are answered."""
SECRET_MIN_BYTES: Final = 16
SECRET_MAX_BYTES: Final = 1 * KIB

# --- name space ---------------------------------------------------------------------------------
NAME_MAX_BYTES: Final = 255
PATH_MAX_BYTES: Final = 4_095
SYMLINK_MAX_BYTES: Final = 4_095
LINK_COUNT_MAX: Final = 1_000_000
DIRECTORY_PAGE_ENTRIES_MAX: Final = 4_096
XATTR_NAME_MAX_BYTES: Final = 255
XATTR_VALUE_MAX_BYTES: Final = 64 * KIB
XATTR_TOTAL_MAX_BYTES: Final = 256 * KIB
"""All names and values of one node."""
LOCATION_MAX_BYTES: Final = 64
TTL_MAX_S: Final = 100 * 366 * 86_400
FILE_SIZE_MAX_BYTES: Final = (1 << 63) - 1 - 16 * MIB

# --- space --------------------------------------------------------------------------------------
BLOCK_SIZE_DEFAULT_BYTES: Final = 64 * KIB
BLOCK_SIZE_MIN_BYTES: Final = 4 * KIB
BLOCK_SIZE_MAX_BYTES: Final = 1 * MIB
EXTENT_BLOCKS_MAX: Final = 128
"""Blocks in one extent record: keeps its checksums (8 B each) well inside an LMDB page."""
GRANT_BLOCKS_MAX: Final = 4_096
GRANT_RUNS_MAX: Final = 4_096
COMMIT_EXTENTS_MAX: Final = 8_192
EXTENT_PAGE_MAX: Final = 1_024
REGION_BLOCKS_MAX: Final = 1 << 36
REGIONS_PER_SERVER_MAX: Final = 256
REPLICAS_MAX: Final = 8
HEADER_CHANGES_MAX: Final = 2_048
"""In one answer to a storage server."""
HEADER_CHANGE_BLOCKS_MAX: Final = 65_536
"""In one change that says that blocks are nobody's, and in one answer."""
HEADER_PAGE_MAX: Final = 16_384
RENEW_MAX: Final = 65_536
INVALIDATE_MAX: Final = 4_096

# --- time ---------------------------------------------------------------------------------------
LEASE_MS: Final = 5_000
"""How long a client may trust what it cached without hearing from the metadata server."""
KEEPALIVE_INTERVAL_MS: Final = 1_000
SESSION_TIMEOUT_MS: Final = 10_000
"""A client silent for this long has lost its session: its grants go back, its orphans go."""
STORAGE_HEARTBEAT_INTERVAL_MS: Final = 500
STORAGE_TIMEOUT_MS: Final = 5_000
OPERATION_TIMEOUT_MS: Final = 30_000
"""A client operation that finds no server ends with an error after this; it never hangs."""
CONNECT_TIMEOUT_MS: Final = 3_000
RECONNECT_DELAY_MIN_MS: Final = 10
RECONNECT_DELAY_MAX_MS: Final = 1_000
JOURNAL_SYNC_INTERVAL_MS: Final = 1_000
"""The most that a power cut can take of acknowledged metadata."""
CHECKPOINT_INTERVAL_MS: Final = 10_000
JOURNAL_CHECKPOINT_BYTES: Final = 16 * MIB

# --- memory -------------------------------------------------------------------------------------
CLIENT_NODES_CACHED_MAX: Final = 100_000
CLIENT_EXTENTS_CACHED_MAX: Final = 200_000
CLIENT_WRITE_BEHIND_MAX_BYTES: Final = 64 * MIB
CLIENT_READ_AHEAD_MAX_BYTES: Final = 8 * MIB
REPLIES_KEPT_PER_CLIENT_MAX: Final = 4_096
LMDB_MAP_BYTES: Final = 64 * GIB
"""Address space, not memory: the largest that the name space can become."""

assert HANDSHAKE_BODY_MAX_BYTES <= BODY_MAX_BYTES
assert BLOCK_SIZE_MIN_BYTES <= BLOCK_SIZE_DEFAULT_BYTES <= BLOCK_SIZE_MAX_BYTES <= PAYLOAD_MAX_BYTES
assert KEEPALIVE_INTERVAL_MS * 3 <= LEASE_MS < SESSION_TIMEOUT_MS < OPERATION_TIMEOUT_MS
assert STORAGE_HEARTBEAT_INTERVAL_MS * 3 <= STORAGE_TIMEOUT_MS < OPERATION_TIMEOUT_MS
assert EXTENT_BLOCKS_MAX * 8 <= 1_024
assert XATTR_VALUE_MAX_BYTES <= XATTR_TOTAL_MAX_BYTES < BODY_MAX_BYTES
assert DIRECTORY_PAGE_ENTRIES_MAX * (NAME_MAX_BYTES + 256) < BODY_MAX_BYTES
assert EXTENT_PAGE_MAX * (EXTENT_BLOCKS_MAX * 8 + 128) < BODY_MAX_BYTES
assert HEADER_CHANGES_MAX * (EXTENT_BLOCKS_MAX * 8 + 128) < BODY_MAX_BYTES
assert HEADER_PAGE_MAX * 72 < BODY_MAX_BYTES
assert RENEW_MAX * 9 < BODY_MAX_BYTES
