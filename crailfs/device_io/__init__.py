"""Direct I/O on a file or block device, many requests in flight, from one event loop.

``DirectFile`` is what others use. Below it an ``Engine`` moves aligned memory: ``ring`` through
io_uring, ``threads`` where the kernel or the platform has none.
"""

from __future__ import annotations

from crailfs.device_io.buffers import ALIGNMENT_BYTES as ALIGNMENT_BYTES
from crailfs.device_io.buffers import AlignedBuffers as AlignedBuffers
from crailfs.device_io.direct_file import DirectFile as DirectFile
from crailfs.device_io.direct_file import check_position as check_position
from crailfs.device_io.direct_file import open_direct as open_direct
from crailfs.device_io.engine import engine_name as engine_name
