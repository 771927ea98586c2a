"""Records to bytes and back: JSON in an envelope that names the schema version and the kind of record.

JSON, so that an operator can read the store with etcdctl. A reader ignores unknown fields (added by a newer writer of
the same schema version) and refuses a newer schema version.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from membership.base.errors import SchemaError
from membership.store.records import Record

SCHEMA_VERSION = 1

R = TypeVar("R", bound=Record)

_STORED_NAMES = {"RebalanceRequest": "RebalanceWish"}  # classes renamed since their first record was stored


class _Envelope(msgspec.Struct, frozen=True):
    v: int
    kind: str
    data: msgspec.Raw


_envelopes = msgspec.json.Decoder(_Envelope)
_encoder = msgspec.json.Encoder()


def encode(record: Record) -> bytes:
    """Return the record as stored."""
    return _encoder.encode(_Envelope(SCHEMA_VERSION, _stored_name(type(record)), msgspec.Raw(_encoder.encode(record))))


def decode(data: bytes, kind: type[R]) -> R:
    """Return the record; SchemaError says why it cannot be read."""
    try:
        envelope = _envelopes.decode(data)
        if envelope.v > SCHEMA_VERSION:
            raise SchemaError(
                f"{envelope.kind} record has schema version {envelope.v}; this version reads up to {SCHEMA_VERSION}",
                hint="upgrade this process to the version that wrote it",
            )
        if envelope.kind != _stored_name(kind):
            raise SchemaError(f"expected a {_stored_name(kind)} record, found {envelope.kind}")
        return msgspec.json.decode(envelope.data, type=kind)
    except msgspec.MsgspecError as error:
        raise SchemaError(f"damaged {kind.__name__} record: {error}") from error


def _stored_name(kind: type[Record]) -> str:
    return _STORED_NAMES.get(kind.__name__, kind.__name__)
