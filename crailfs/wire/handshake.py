"""Mutual proof that both ends know the cluster's secret, without sending it. No I/O.

    connecting side                                accepting side
    HELLO(version, role, client id, nonce,
          cluster id or empty)               ->
                                             <-    CHALLENGE(version, cluster id, epoch, nonce,
                                                             proof of the accepting side)
    PROOF(proof of the connecting side)      ->
                                             <-    WELCOME, or an error

A proof is HMAC-SHA256 under the secret of a label, which differs for the two sides so that neither
proof can be sent back as the other, and of everything that both sides have said of themselves.
docs/protocol.md gives the bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import Final

from crailfs.config import Credentials
from crailfs.errors import AuthenticationError, ConfigurationError, ProtocolError, VersionError
from crailfs.limits import PROTOCOL_VERSION, SECRET_MAX_BYTES, SECRET_MIN_BYTES
from crailfs.wire.messages import Challenge, Hello, Proof, Role

NONCE_BYTES: Final = 32
CLUSTER_ID_BYTES: Final = 16
PROOF_BYTES: Final = 32

_ACCEPTING_LABEL: Final = b"crailfs accepting side"
_CONNECTING_LABEL: Final = b"crailfs connecting side"
_IDENTITIES: Final = struct.Struct(">BBQ32s16sQ32s")


def _proof(
    label: bytes, secret: bytes, hello: Hello, cluster_id: bytes, epoch: int, nonce: bytes
) -> bytes:
    said = _IDENTITIES.pack(
        PROTOCOL_VERSION, hello.role, hello.client_id, hello.nonce, cluster_id, epoch, nonce
    )
    return hmac.digest(secret, label + b"\0" + said, hashlib.sha256)


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise VersionError(
            f"peer speaks protocol version {version}, this side {PROTOCOL_VERSION}: run the same"
            " release of CrailFS on both"
        )


def _check_length(what: str, value: bytes, expected_bytes: int) -> None:
    if len(value) != expected_bytes:
        raise ProtocolError(f"{what} has {len(value)} bytes instead of {expected_bytes}")


def check_credentials(credentials: Credentials, *, cluster_id_required: bool) -> None:
    """Raises ``ConfigurationError`` if they cannot serve in a handshake."""
    if not SECRET_MIN_BYTES <= len(credentials.secret) <= SECRET_MAX_BYTES:
        raise ConfigurationError(
            f"the cluster's secret has {len(credentials.secret)} bytes; it needs"
            f" {SECRET_MIN_BYTES} to {SECRET_MAX_BYTES}"
        )
    allowed = (CLUSTER_ID_BYTES,) if cluster_id_required else (0, CLUSTER_ID_BYTES)
    if len(credentials.cluster_id) not in allowed:
        raise ConfigurationError(
            f"the cluster id has {len(credentials.cluster_id)} bytes instead of {CLUSTER_ID_BYTES}"
        )


class ConnectingSide:
    """The handshake of whoever opened the connection."""

    def __init__(
        self, credentials: Credentials, role: Role, client_id: int, *, nonce: bytes | None = None
    ) -> None:
        check_credentials(credentials, cluster_id_required=False)
        self._credentials = credentials
        self.hello = Hello(
            version=PROTOCOL_VERSION,
            role=role,
            client_id=client_id,
            nonce=secrets.token_bytes(NONCE_BYTES) if nonce is None else nonce,
            cluster_id=credentials.cluster_id,
        )

    def answer(self, challenge: Challenge) -> Proof:
        """Checks the accepting side and returns what proves this one.

        Raises ``AuthenticationError``, ``VersionError`` or ``ProtocolError``.
        """
        _check_version(challenge.version)
        _check_length("cluster id", challenge.cluster_id, CLUSTER_ID_BYTES)
        _check_length("nonce", challenge.nonce, NONCE_BYTES)
        ours = self._credentials
        if ours.cluster_id and ours.cluster_id != challenge.cluster_id:
            raise AuthenticationError(
                f"the server belongs to cluster {challenge.cluster_id.hex()}, not to"
                f" {ours.cluster_id.hex()}: check the address and the cluster id"
            )
        told = challenge.cluster_id, challenge.server_epoch, challenge.nonce
        expected = _proof(_ACCEPTING_LABEL, ours.secret, self.hello, *told)
        if not hmac.compare_digest(expected, challenge.proof):
            raise AuthenticationError(
                "the server does not know this cluster's secret: check the address and the secret"
            )
        return Proof(_proof(_CONNECTING_LABEL, ours.secret, self.hello, *told))


class AcceptingSide:
    """The handshake of whoever was connected to: ``challenge``, then ``check``."""

    def __init__(self, credentials: Credentials, epoch: int, *, nonce: bytes | None = None) -> None:
        check_credentials(credentials, cluster_id_required=True)
        self._credentials = credentials
        self._epoch = epoch
        self._nonce = secrets.token_bytes(NONCE_BYTES) if nonce is None else nonce
        self.hello: Hello | None = None
        """What the peer said of itself; to be believed only once ``check`` has returned."""

    def challenge(self, hello: Hello) -> Challenge:
        """Raises ``AuthenticationError``, ``VersionError`` or ``ProtocolError``."""
        if self.hello is not None:
            raise ProtocolError("the peer said HELLO twice")
        _check_version(hello.version)
        _check_length("nonce", hello.nonce, NONCE_BYTES)
        ours = self._credentials
        if hello.client_id < 0:
            raise ProtocolError(f"client id {hello.client_id} is negative")
        if hello.cluster_id and hello.cluster_id != ours.cluster_id:
            raise AuthenticationError(
                f"this server belongs to cluster {ours.cluster_id.hex()}, not to"
                f" {hello.cluster_id.hex()}: check the address and the cluster id"
            )
        self.hello = hello
        return Challenge(
            version=PROTOCOL_VERSION,
            cluster_id=ours.cluster_id,
            server_epoch=self._epoch,
            nonce=self._nonce,
            proof=self._prove(_ACCEPTING_LABEL, hello),
        )

    def check(self, proof: Proof) -> Hello:
        """Raises ``AuthenticationError`` unless the peer knows the secret."""
        if self.hello is None:
            raise ProtocolError("the peer sent PROOF before HELLO")
        if not hmac.compare_digest(self._prove(_CONNECTING_LABEL, self.hello), proof.proof):
            raise AuthenticationError(
                "the peer does not know this cluster's secret: give it the same secret"
            )
        return self.hello

    def _prove(self, label: bytes, hello: Hello) -> bytes:
        return _proof(
            label, self._credentials.secret, hello, self._credentials.cluster_id, self._epoch,
            self._nonce,
        )  # fmt: skip
