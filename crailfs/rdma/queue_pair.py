"""A reliable-connected queue pair: made, connected, destroyed.

The clients' ends may do nothing to their own memory on behalf of the server; the servers' ends stay
in the state in which they can only answer (RTR): a server never sends.
"""

from __future__ import annotations

import ipaddress
import secrets
from typing import Any, Final

from crailfs.errors import InvalidError, ProtocolError
from crailfs.rdma.device import GID_BYTES, Device
from crailfs.rdma.verbs import plain_errors
from crailfs.wire.messages import QueuePairEnd, RemoteRegion

ACK_TIMEOUT: Final = 15
"""As 4.096 us << 15 = 134 ms (IBTA 9.7.6.1.3). Devices may take up to four times as long."""
RETRIES: Final = 6
"""Of a packet that is not acknowledged. So a peer that is gone is an error after 7 x 134 ms =
0.9 s, 3.8 s at most. (7 would be without end on soft-RoCE, which takes it as for RNR.)"""
HOP_LIMIT: Final = 64

_NUMBER_MAX: Final = (1 << 24) - 1
_MTU_MAX: Final = 5
_KEY_MAX: Final = (1 << 32) - 1
_ADDRESS_MAX: Final = (1 << 64) - 1
_MIN_RNR_TIMER: Final = 12
"""0.64 ms; without receives nothing is ever not ready."""


def check_end(end: QueuePairEnd) -> None:
    """Raises ``InvalidError`` for what no queue pair can be connected to."""
    problem = ""
    if len(end.gid) != GID_BYTES or not any(end.gid):
        problem = f"a GID of {len(end.gid)} bytes"
    elif not 2 <= end.number < _NUMBER_MAX:
        problem = f"number {end.number}"
    elif not 0 <= end.packet_sequence <= _NUMBER_MAX:
        problem = f"packet sequence {end.packet_sequence}"
    elif not 1 <= end.mtu <= _MTU_MAX:
        problem = f"MTU {end.mtu}"
    elif not 0 <= end.reads_max <= 255:
        problem = f"{end.reads_max} reads"
    if problem:
        raise InvalidError(f"the peer's queue pair cannot be: {problem}")


def check_region(region: RemoteRegion) -> None:
    """Raises ``ProtocolError`` for what no work request can name."""
    end = region.address + region.byte_count
    if not (0 <= region.key <= _KEY_MAX and 0 <= region.address < end and end - 1 <= _ADDRESS_MAX):
        raise ProtocolError(
            f"the storage server's region {region.region_id} cannot be: {region.byte_count} bytes "
            f"at {region.address}, key {region.key}"
        )


class QueuePair:
    """One end. ``requests_max`` 0: it only answers."""

    def __init__(self, device: Device, completions: Any, *, requests_max: int = 0) -> None:
        """Raises ``UnavailableError``."""
        self._device = device
        self._sends = requests_max > 0
        enums, qp = device.verbs.enums, device.verbs.qp
        capacity = qp.QPCap(max_send_wr=max(1, requests_max), max_recv_wr=1)
        with plain_errors("making a queue pair"):
            if self._sends:
                operations = enums.IBV_QP_EX_WITH_RDMA_WRITE | enums.IBV_QP_EX_WITH_RDMA_READ
                if device.can_flush:
                    operations |= enums.IBV_QP_EX_WITH_FLUSH
                mask = enums.IBV_QP_INIT_ATTR_PD | enums.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS
                attributes = qp.QPInitAttrEx(
                    qp_type=enums.IBV_QPT_RC, scq=completions, rcq=completions, cap=capacity,
                    pd=device.domain, comp_mask=mask, send_ops_flags=operations, sq_sig_all=0,
                )  # fmt: skip
                self.pair: Any = qp.QPEx(device.context, attributes)
            else:
                attributes = qp.QPInitAttr(
                    qp_type=enums.IBV_QPT_RC, scq=completions, rcq=completions, cap=capacity
                )
                self.pair = qp.QP(device.domain, attributes)
        self.end = QueuePairEnd(
            gid=device.port.gid,
            number=self.pair.qp_num,
            packet_sequence=secrets.randbelow(_NUMBER_MAX + 1),
            mtu=device.mtu,
            can_flush=device.can_flush,
            reads_max=0 if self._sends else device.reads_as_target_max,
        )

    def connect(self, peer: QueuePairEnd, access: int = 0) -> None:
        """Bring it up to ``peer``, who may do ``access`` (``IBV_ACCESS_...``) to memory here.

        Raises ``InvalidError`` and ``UnavailableError``.
        """
        check_end(peer)
        with plain_errors(f"connecting a queue pair to {ipaddress.IPv6Address(peer.gid)}"):
            self._to_init(access)
            self._to_receive(peer)
            if self._sends:
                self._to_send(peer)

    def destroy(self) -> None:
        """Afterwards no packet of the peer reaches memory through it, and none is sent."""
        with plain_errors("destroying a queue pair"):
            self.pair.close()

    def _to_init(self, access: int) -> None:
        enums, attributes = self._device.verbs.enums, self._device.verbs.qp.QPAttr()
        attributes.qp_state = enums.IBV_QPS_INIT
        attributes.pkey_index = 0
        attributes.port_num = self._device.port.number
        attributes.qp_access_flags = access
        self.pair.modify(
            attributes,
            enums.IBV_QP_STATE
            | enums.IBV_QP_PKEY_INDEX
            | enums.IBV_QP_PORT
            | enums.IBV_QP_ACCESS_FLAGS,
        )

    def _to_receive(self, peer: QueuePairEnd) -> None:
        verbs, port = self._device.verbs, self._device.port
        enums, attributes = verbs.enums, verbs.qp.QPAttr()
        route = verbs.addr.GlobalRoute(
            dgid=verbs.addr.GID(peer.gid.hex(":", 2)),
            sgid_index=port.gid_index,
            hop_limit=HOP_LIMIT,
        )
        attributes.qp_state = enums.IBV_QPS_RTR
        attributes.ah_attr = verbs.addr.AHAttr(gr=route, is_global=1, port_num=port.number)
        attributes.path_mtu = min(self.end.mtu, peer.mtu)
        attributes.dest_qp_num = peer.number
        attributes.rq_psn = peer.packet_sequence
        attributes.max_dest_rd_atomic = self.end.reads_max
        attributes.min_rnr_timer = _MIN_RNR_TIMER
        self.pair.modify(
            attributes,
            enums.IBV_QP_STATE
            | enums.IBV_QP_AV
            | enums.IBV_QP_PATH_MTU
            | enums.IBV_QP_DEST_QPN
            | enums.IBV_QP_RQ_PSN
            | enums.IBV_QP_MAX_DEST_RD_ATOMIC
            | enums.IBV_QP_MIN_RNR_TIMER,
        )

    def _to_send(self, peer: QueuePairEnd) -> None:
        enums, attributes = self._device.verbs.enums, self._device.verbs.qp.QPAttr()
        attributes.qp_state = enums.IBV_QPS_RTS
        attributes.timeout = ACK_TIMEOUT
        attributes.retry_cnt = RETRIES
        attributes.rnr_retry = RETRIES
        attributes.sq_psn = self.end.packet_sequence
        attributes.max_rd_atomic = reads_max(self._device, peer)
        self.pair.modify(
            attributes,
            enums.IBV_QP_STATE
            | enums.IBV_QP_TIMEOUT
            | enums.IBV_QP_RETRY_CNT
            | enums.IBV_QP_RNR_RETRY
            | enums.IBV_QP_SQ_PSN
            | enums.IBV_QP_MAX_QP_RD_ATOMIC,
        )


def reads_max(device: Device, target: QueuePairEnd) -> int:
    """RDMA READs that ``device`` may have outstanding at ``target``."""
    return min(device.reads_as_initiator_max, target.reads_max)
