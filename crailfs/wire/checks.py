"""Limits of what requests hold, beyond their types: lengths in bytes or items, and ranges.

One table by field name says how long a field may be; a field of unbounded length that is not in
it is an error when this module is imported, so that no message gains one unnoticed. Whether a name
*may* be used (``/``, NUL, ``.``) is the name space's to say, not the protocol's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from crailfs import limits
from crailfs.errors import AttributeSpaceError, CrailError, InvalidError, NameTooLongError
from crailfs.wire.messages import OPERATIONS, Message

_ID_BYTES: Final = 16
_HOST_MAX_BYTES: Final = 255
_BASES_MAX: Final = 65_536
_BLOCK_LIST_MAX: Final = 65_536
_CLIENTS_MAX: Final = 65_536
_PROOF_MAX_BYTES: Final = 64


class _Length(NamedTuple):
    maximum: int
    error: type[CrailError] = InvalidError


LENGTHS: Final[dict[str, _Length]] = {
    # handshake: exact lengths are checked there
    "nonce": _Length(_PROOF_MAX_BYTES),
    "proof": _Length(_PROOF_MAX_BYTES),
    "cluster_id": _Length(_PROOF_MAX_BYTES),
    # names
    "name": _Length(limits.NAME_MAX_BYTES, NameTooLongError),
    "new_name": _Length(limits.NAME_MAX_BYTES, NameTooLongError),
    "after_name": _Length(limits.NAME_MAX_BYTES, NameTooLongError),
    "key": _Length(limits.NAME_MAX_BYTES, NameTooLongError),
    "target": _Length(limits.SYMLINK_MAX_BYTES, NameTooLongError),
    "value": _Length(limits.XATTR_VALUE_MAX_BYTES, AttributeSpaceError),
    # places
    "location": _Length(limits.LOCATION_MAX_BYTES),
    "host": _Length(limits.LOCATION_MAX_BYTES),
    "rack": _Length(limits.LOCATION_MAX_BYTES),
    "tcp_host": _Length(_HOST_MAX_BYTES),
    "unix_path": _Length(limits.PATH_MAX_BYTES),
    "boot_id": _Length(limits.LOCATION_MAX_BYTES),
    "label": _Length(limits.PATH_MAX_BYTES),
    "medium": _Length(limits.LOCATION_MAX_BYTES),
    "id": _Length(_ID_BYTES),
    "server_id": _Length(_ID_BYTES),
    "uuid": _Length(_ID_BYTES),
    "gid": _Length(_ID_BYTES),
    # lists
    "renew": _Length(limits.RENEW_MAX),
    "inodes": _Length(limits.RENEW_MAX),
    "entries": _Length(limits.INVALIDATE_MAX),
    "extents": _Length(limits.COMMIT_EXTENTS_MAX),
    "new": _Length(limits.EXTENT_BLOCKS_MAX),
    "bases": _Length(_BASES_MAX),
    "replicas": _Length(limits.REPLICAS_MAX),
    "checksums": _Length(limits.EXTENT_BLOCKS_MAX * 8),
    "runs": _Length(limits.GRANT_RUNS_MAX),
    "unused": _Length(limits.GRANT_RUNS_MAX),
    "regions": _Length(limits.REGIONS_PER_SERVER_MAX),
    "failed_blocks": _Length(_BLOCK_LIST_MAX),
    "fenced": _Length(_CLIENTS_MAX),
}

U32_FIELDS: Final = frozenset({"region", "region_id", "uid", "gid", "mode"})
_U32_MAX: Final = (1 << 32) - 1
_U64_MAX: Final = (1 << 64) - 1
_I64_MIN: Final = -(1 << 63)
_I64_MAX: Final = (1 << 63) - 1

_BOUNDED_TYPES: Final = (
    msgspec.inspect.BoolType,
    msgspec.inspect.EnumType,
    msgspec.inspect.FloatType,
    msgspec.inspect.NoneType,
)

_Check = Callable[[Any], None]


def check_request(request: Message) -> None:
    """Raises ``InvalidError``, ``NameTooLongError`` or ``AttributeSpaceError``, naming the field
    and its limit, if a value of ``request`` or of a record in it is out of its limits."""
    for check in _CHECKS[type(request)]:
        check(request)


def _checks_for(kind: type[msgspec.Struct]) -> tuple[_Check, ...]:
    """What has to hold of one type of record, field by field."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    checks: list[_Check] = []
    for field in info.fields:
        options = (
            field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
        )
        for option in options:
            checks.extend(_checks_for_field(field.name, option))
    return tuple(checks)


def _checks_for_field(name: str, kind: msgspec.inspect.Type) -> tuple[_Check, ...]:
    get = operator.attrgetter(name)
    if isinstance(kind, msgspec.inspect.IntType):
        return (_range_check(name, get),)
    if isinstance(kind, msgspec.inspect.BytesType):
        return (_length_check(name, get, "bytes"),)
    if isinstance(kind, msgspec.inspect.StrType):
        return (_length_check(name, lambda record: (get(record) or "").encode(), "bytes"),)
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return _length_check(name, get, "items"), _items_check(name, get, kind.item_type)
    if isinstance(kind, msgspec.inspect.StructType):
        nested = _checks_for(kind.cls)
        return (lambda record: _run(nested, get(record)),) if nested else ()
    assert isinstance(kind, _BOUNDED_TYPES), f"no limit is known for {name}: {kind}"
    return ()


def _run(checks: tuple[_Check, ...], record: Any) -> None:
    if record is not None:
        for check in checks:
            check(record)


def _range_check(name: str, get: Callable[[Any], int | None]) -> _Check:
    if name.endswith("_ns"):
        low, high = _I64_MIN, _I64_MAX
    else:
        low, high = 0, _U32_MAX if name in U32_FIELDS else _U64_MAX

    def check(record: Any) -> None:
        value = get(record)
        if value is not None and not low <= value <= high:
            raise InvalidError(
                f"{type(record).__name__}.{name} is {value}; it must lie in {low}..{high}"
            )

    return check


def _length_check(name: str, get: Callable[[Any], Any], unit: str) -> _Check:
    maximum, error = LENGTHS[name]

    def check(record: Any) -> None:
        value = get(record)
        if value is not None and len(value) > maximum:
            raise error(
                f"{type(record).__name__}.{name} has {len(value)} {unit}; at most {maximum}"
                " are allowed"
            )

    return check


def _items_check(name: str, get: Callable[[Any], Any], kind: msgspec.inspect.Type) -> _Check:
    if isinstance(kind, msgspec.inspect.StructType):
        nested = _checks_for(kind.cls)

        def check_records(record: Any) -> None:
            for item in get(record):
                for check in nested:
                    check(item)

        return check_records

    assert isinstance(kind, msgspec.inspect.IntType), f"no limit is known for items of {name}"

    def check_integers(record: Any) -> None:
        value = get(record)
        if value and min(value) < 0:
            raise InvalidError(f"{type(record).__name__}.{name} holds a negative number")

    return check_integers


_CHECKS: Final = {
    operation.request: _checks_for(operation.request) for operation in OPERATIONS.values()
}
