"""Records to bytes and back: JSON in an envelope that names the schema version and the kind of record.

JSON, so that an operator can read the store with etcdctl. A reader tolerates fields it does not know (a newer writer of
the same schema version added them) and refuses a newer schema version, whose meaning it cannot guess.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from membership.base.errors import SchemaError
from membership.store.records import Record

SCHEMA_VERSION = 1

R = TypeVar("R", bound=Record)


class _Envelope(msgspec.Struct, frozen=True):
    v: int
    kind: str
    data: msgspec.Raw


class _Outgoing(msgspec.Struct, frozen=True):
    v: int
    kind: str
    data: Record


_envelopes = msgspec.json.Decoder(_Envelope)
_encoder = msgspec.json.Encoder()


def encode(record: Record) -> bytes:
    """Return the record as stored."""
    return _encoder.encode(_Outgoing(SCHEMA_VERSION, type(record).__name__, record))


def decode(data: bytes, kind: type[R]) -> R:
    """Return the record; SchemaError says why it cannot be read."""
    try:
        envelope = _envelopes.decode(data)
        if envelope.v > SCHEMA_VERSION:
            raise SchemaError(
                f"{envelope.kind} record has schema version {envelope.v}; this version reads up to {SCHEMA_VERSION}",
                hint="upgrade this process to the version that wrote it",
            )
        if envelope.kind != kind.__name__:
            raise SchemaError(f"expected a {kind.__name__} record, found {envelope.kind}")
        return msgspec.json.decode(envelope.data, type=kind)
    except msgspec.MsgspecError as error:
        raise SchemaError(f"damaged {kind.__name__} record: {error}") from error
