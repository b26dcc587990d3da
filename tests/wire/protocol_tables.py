"""Writes the tables of docs/protocol.md from the code: ``python -m tests.wire.protocol_tables``.

What each field means is taken from the docstrings in ``messages.py`` and ``records.py``.
"""

from __future__ import annotations

import ast
import errno
import inspect
import itertools
from pathlib import Path
from typing import Any

import msgspec

from crailfs import limits, records
from crailfs.errors import ERRORS_BY_CODE
from crailfs.wire import checks, messages
from crailfs.wire.messages import OPERATIONS, Opcode

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
BEGIN = "<!-- from here on written by tests/wire/protocol_tables.py -->"
PUSHES = frozenset({Opcode.INVALIDATE})
PROTOCOL_LIMITS = (
    "BODY_MAX_BYTES", "PAYLOAD_MAX_BYTES", "HANDSHAKE_BODY_MAX_BYTES", "HANDSHAKE_TIMEOUT_MS",
    "FRAME_TIMEOUT_MS", "CONNECTIONS_MAX", "UNAUTHENTICATED_CONNECTIONS_MAX",
    "REQUESTS_IN_FLIGHT_MAX", "SECRET_MIN_BYTES", "SECRET_MAX_BYTES", "REPLIES_KEPT_PER_CLIENT_MAX",
)  # fmt: skip


def tables() -> str:
    return "\n\n".join(
        [
            BEGIN,
            _operations(),
            _records(),
            _enumerations(),
            _errors(),
            _limits(),
            _lengths(),
        ]
    )


def _table(title: str, columns: str, rows: list[str]) -> str:
    ruler = "|".join("---" for _ in columns.split("|"))
    lines = [f"## {title}", "", f"| {columns} |", f"|{ruler}|"]
    return "\n".join(lines + [f"| {row} |" for row in rows])


def _operations() -> str:
    rows = []
    for opcode, operation in OPERATIONS.items():
        notes = []
        if opcode in PUSHES:
            notes.append("pushed by the server")
        if operation.mutates and not operation.request_payload:
            notes.append("exactly once")
        if operation.request_payload:
            notes.append("payload in the request")
        if operation.reply_payload:
            notes.append("payload in the reply")
        names = [_link(operation.request.__name__), _link(operation.reply.__name__)]
        rows.append(f"{opcode.value} | `{opcode.name}` | {' | '.join(names)} | {', '.join(notes)}")
    return _table("Operations", "opcode | name | request | reply | notes", rows)


def _records() -> str:
    parts = [
        "## Messages and records",
        "",
        "Fields in the order of the array. `= x` is the value of a field that the sender left out"
        " at the end.",
    ]
    for kind in _record_types():
        about, fields = _docstrings(kind)
        parts += ["", f"### {kind.__name__}", ""]
        if about:
            parts += [about, ""]
        info = msgspec.inspect.type_info(kind)
        assert isinstance(info, msgspec.inspect.StructType)
        if not info.fields:
            parts.append("No fields: an empty array.")
        for index, field in enumerate(info.fields):
            default = "" if field.default is msgspec.NODEFAULT else f" = {_shown(field.default)}"
            meaning = f": {fields[field.name]}" if field.name in fields else ""
            parts.append(f"{index}. `{field.name}` {_type_name(field.type)}{default}{meaning}")
    return "\n".join(parts)


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "nil", False: "false", True: "true"}[default]
    if isinstance(default, int | float):
        return f"{default:g}"
    if isinstance(default, msgspec.Struct):
        return "all defaults"
    return "empty" if len(default) == 0 else repr(default)


def _record_types() -> list[type]:
    """Messages in the order of their operations, then the records in them, each once."""
    found: dict[type, None] = {}
    for operation in OPERATIONS.values():
        found |= {operation.request: None, operation.reply: None}
    waiting = list(found)
    while waiting:
        info = msgspec.inspect.type_info(waiting.pop(0))
        assert isinstance(info, msgspec.inspect.StructType)
        for field in info.fields:
            for nested in _nested(field.type):
                if nested not in found:
                    found[nested] = None
                    waiting.append(nested)
    return list(found)


def _nested(kind: msgspec.inspect.Type) -> list[type]:
    if isinstance(kind, msgspec.inspect.StructType):
        return [kind.cls]
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return _nested(kind.item_type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return [nested for option in kind.types for nested in _nested(option)]
    return []


def _type_name(kind: msgspec.inspect.Type) -> str:
    i = msgspec.inspect
    if isinstance(kind, i.StructType | i.EnumType):
        return _link(kind.cls.__name__)
    if isinstance(kind, i.VarTupleType):
        return f"array of {_type_name(kind.item_type)}"
    if isinstance(kind, i.DictType):
        return f"map from {_type_name(kind.key_type)} to {_type_name(kind.value_type)}"
    if isinstance(kind, i.UnionType):
        return " or ".join(_type_name(option) for option in kind.types)
    names: dict[type, str] = {
        i.IntType: "integer", i.BytesType: "bytes", i.StrType: "text", i.BoolType: "boolean",
        i.FloatType: "float", i.NoneType: "nil",
    }  # fmt: skip
    return names[type(kind)]


def _docstrings(kind: type) -> tuple[str, dict[str, str]]:
    """What the class says of itself, and of its fields."""
    tree = ast.parse(inspect.getsource(kind))
    body = tree.body[0].body  # type: ignore[attr-defined]
    fields: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            assert isinstance(following.value, ast.Constant)
            fields[statement.target.id] = _one_line(following.value.value)
    return _one_line(kind.__doc__ or ""), fields


def _enumerations() -> str:
    rows = []
    for module in (records, messages):
        for name, kind in vars(module).items():
            if (
                isinstance(kind, type)
                and issubclass(kind, messages.enum.IntEnum | messages.enum.IntFlag)
                and kind.__module__ == module.__name__
                and kind is not Opcode
            ):
                values = ", ".join(f"{member.value} {member.name}" for member in kind)
                rows.append(f'<a id="{name.lower()}"></a>`{name}` | {values}')
    return _table("Enumerations and flags", "name | values", rows)


def _errors() -> str:
    rows = [
        f"{code} | `{kind.__name__}` | {errno.errorcode[kind.errno]} |"
        f" {'yes' if kind.retryable else 'no'} | {_one_line(kind.__doc__ or '')}"
        for code, kind in sorted(ERRORS_BY_CODE.items())
    ]
    return _table("Errors", "status | error | errno on the mount | retryable | meaning", rows)


def _limits() -> str:
    rows = [f"`{name}` | {getattr(limits, name):,}" for name in PROTOCOL_LIMITS]
    return _table("Limits of a connection", "limit | value", rows)


def _lengths() -> str:
    rows = [
        f"`{field}` | {maximum:,} | `{error.__name__}`"
        for field, (maximum, error) in sorted(checks.LENGTHS.items())
    ]
    text = _table("Limits of fields in requests", "field | bytes or items | otherwise", rows)
    return (
        text + "\n\nIntegers are 0 to 2^64 - 1; `*_ns` -2^63 to 2^63 - 1; "
        + ", ".join(f"`{field}`" for field in sorted(checks.U32_FIELDS))
        + " 0 to 2^32 - 1; otherwise `InvalidError`.\n"
    )  # fmt: skip


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _one_line(text: Any) -> str:
    return " ".join(str(text).split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    written = DOCUMENT.read_text().split(BEGIN)[0]
    DOCUMENT.write_text(written + tables())
