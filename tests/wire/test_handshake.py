"""The mutual proof: each single difference is noticed by the side that must notice it."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import msgspec
import pytest

from crailfs.config import Credentials
from crailfs.errors import AuthenticationError, ConfigurationError, ProtocolError, VersionError
from crailfs.limits import SECRET_MAX_BYTES, SECRET_MIN_BYTES
from crailfs.wire.handshake import AcceptingSide, ConnectingSide
from crailfs.wire.messages import Proof, Role
from tests.vectors.regenerate import CLUSTER_ID, CREDENTIALS, HANDSHAKE

OTHER_CLUSTER = b"another cluster!"
OTHER_SECRET = b"another secret, as long"


def sides(
    connecting: Credentials = CREDENTIALS, accepting: Credentials = CREDENTIALS
) -> tuple[ConnectingSide, AcceptingSide]:
    return ConnectingSide(connecting, Role.CLIENT, 42), AcceptingSide(accepting, 3)


def changed(message: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(message, **fields)


@pytest.mark.parametrize("cluster_id", [CLUSTER_ID, b""])
def test_both_sides_accept_each_other(cluster_id: bytes) -> None:
    connecting, accepting = sides(changed(CREDENTIALS, cluster_id=cluster_id))
    challenge = accepting.challenge(connecting.hello)
    assert (challenge.cluster_id, challenge.server_epoch) == (CLUSTER_ID, 3)
    hello = accepting.check(connecting.answer(challenge))
    assert (hello.role, hello.client_id) == (Role.CLIENT, 42)


def test_nonces_and_so_proofs_are_never_the_same_twice() -> None:
    proofs = set()
    for _ in range(10):
        connecting, accepting = sides()
        challenge = accepting.challenge(connecting.hello)
        proofs |= {challenge.proof, connecting.answer(challenge).proof}
    assert len(proofs) == 20


def test_a_server_without_the_secret_is_refused_before_anything_is_proved_to_it() -> None:
    connecting, accepting = sides(accepting=changed(CREDENTIALS, secret=OTHER_SECRET))
    with pytest.raises(AuthenticationError, match="server does not know"):
        connecting.answer(accepting.challenge(connecting.hello))


def test_a_client_without_the_secret_is_refused() -> None:
    connecting, accepting = sides()
    stranger = ConnectingSide(changed(CREDENTIALS, secret=OTHER_SECRET), Role.CLIENT, 42)
    challenge = accepting.challenge(connecting.hello)
    with pytest.raises(AuthenticationError):
        stranger.answer(challenge)
    for proof in (b"", bytes(32), challenge.proof):
        with pytest.raises(AuthenticationError, match="peer does not know"):
            accepting.check(Proof(proof))


def test_another_cluster_is_refused_by_both_sides() -> None:
    connecting, accepting = sides(changed(CREDENTIALS, cluster_id=OTHER_CLUSTER))
    with pytest.raises(AuthenticationError, match=OTHER_CLUSTER.hex()):
        accepting.challenge(connecting.hello)
    challenge = sides()[1].challenge(changed(connecting.hello, cluster_id=b""))
    with pytest.raises(AuthenticationError, match=CLUSTER_ID.hex()):
        connecting.answer(challenge)


@pytest.mark.parametrize(
    "change", [{"role": Role.OPERATOR}, {"client_id": 43}, {"nonce": bytes(32)}]
)
def test_what_the_client_said_cannot_be_changed_on_the_way(change: dict[str, Any]) -> None:
    connecting, accepting = sides()
    with pytest.raises(AuthenticationError):
        connecting.answer(accepting.challenge(changed(connecting.hello, **change)))


@pytest.mark.parametrize("change", [{"server_epoch": 4}, {"nonce": bytes(32)}])
def test_what_the_server_said_cannot_be_changed_on_the_way(change: dict[str, Any]) -> None:
    connecting, accepting = sides()
    with pytest.raises(AuthenticationError):
        connecting.answer(changed(accepting.challenge(connecting.hello), **change))


def test_versions_must_agree() -> None:
    connecting, accepting = sides()
    with pytest.raises(VersionError):
        accepting.challenge(changed(connecting.hello, version=2))
    challenge = accepting.challenge(connecting.hello)
    with pytest.raises(VersionError):
        connecting.answer(changed(challenge, version=2))


@pytest.mark.parametrize("nonce", [b"", bytes(31), bytes(33)])
def test_nonces_have_their_length(nonce: bytes) -> None:
    connecting, accepting = sides()
    with pytest.raises(ProtocolError, match="nonce"):
        accepting.challenge(changed(connecting.hello, nonce=nonce))
    challenge = accepting.challenge(connecting.hello)
    with pytest.raises(ProtocolError, match="nonce"):
        connecting.answer(changed(challenge, nonce=nonce))


def test_steps_come_in_order_and_once() -> None:
    connecting, accepting = sides()
    with pytest.raises(ProtocolError, match="before HELLO"):
        accepting.check(Proof(bytes(32)))
    accepting.challenge(connecting.hello)
    with pytest.raises(ProtocolError, match="twice"):
        accepting.challenge(connecting.hello)


@pytest.mark.parametrize("length", [0, SECRET_MIN_BYTES - 1, SECRET_MAX_BYTES + 1])
def test_secrets_have_their_limits(length: int) -> None:
    credentials = Credentials(cluster_id=CLUSTER_ID, secret=bytes(length))
    with pytest.raises(ConfigurationError, match="secret"):
        ConnectingSide(credentials, Role.CLIENT, 1)
    with pytest.raises(ConfigurationError, match="secret"):
        AcceptingSide(credentials, 1)


def test_a_server_has_a_cluster_id() -> None:
    with pytest.raises(ConfigurationError, match="cluster id"):
        AcceptingSide(changed(CREDENTIALS, cluster_id=b""), 1)


def test_the_golden_proofs_are_as_the_document_says() -> None:
    """Computed here from docs/protocol.md's words, without the module under test."""
    vector = json.loads(HANDSHAKE.read_text())
    hello, challenge = vector["hello"], vector["challenge"]
    said = (
        bytes([1, hello["role"]])
        + hello["client_id"].to_bytes(8, "big")
        + bytes.fromhex(hello["nonce"]["hex"])
        + bytes.fromhex(challenge["cluster_id"]["hex"])
        + challenge["server_epoch"].to_bytes(8, "big")
        + bytes.fromhex(challenge["nonce"]["hex"])
    )
    secret = bytes.fromhex(vector["secret"])
    for side, proof in (
        (b"accepting", challenge["proof"]["hex"]),
        (b"connecting", vector["proof"]["proof"]["hex"]),
    ):
        label = b"crailfs " + side + b" side\0"
        assert hmac.new(secret, label + said, hashlib.sha256).hexdigest() == proof
