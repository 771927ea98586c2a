"""The token that an etcd with users gives us; and why an etcd with TLS refuses us, which gRPC does not say."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from typing import Any

import grpc

from membership.base.errors import ConfigError, StoreDenied
from membership.store.credentials import Credentials
from membership.store.etcd3_compat import etcdrpc
from membership.store.etcd_watch import AUTH_OFF, FORGOTTEN, Metadata, translated

TLS_CHECK_TIMEOUT_S = 2.0
RESETS = 3  # so many in a row are no accident
NO_TLS = ("WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING")


class Session:
    """One user's token, shared by all threads of a client. etcd forgets tokens: after a while, and when it restarts."""

    def __init__(self, credentials: Credentials, where: str) -> None:
        self._credentials = credentials
        self._where = where
        self._lock = threading.Lock()
        self._metadata: Metadata | None = None if credentials.user else ()

    def metadata(self, client: Any, timeout_s: float) -> Metadata:
        """What goes with each call: our token, asked for if we have none. StoreDenied: etcd does not accept us."""
        with self._lock:
            if self._metadata is None:
                self._metadata = self._authenticate(client, timeout_s)
            return self._metadata

    def forgotten(self, error: grpc.RpcError | StoreDenied) -> bool:
        """Whether etcd may have refused the call only because it does not know our token (any more).

        It has done nothing then: the call may be made again, with a new token. For a watch etcd does not always say
        which it was: then it counts as forgotten.
        """
        if not self._credentials.user or (isinstance(error, grpc.RpcError) and error.details() not in FORGOTTEN):
            return False
        with self._lock:
            self._metadata = None
        return True

    def _authenticate(self, client: Any, timeout_s: float) -> Metadata:
        user = self._credentials.user
        request = etcdrpc.AuthenticateRequest(name=user, password=self._credentials.password())
        try:
            answer = etcdrpc.AuthStub(client.channel).Authenticate(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.details() == AUTH_OFF:
                return ()
            raise translated(error, f"authenticate user {user!r}", self._where) from error
        return (("token", answer.token),)


def tls_refusal(host: str, port: int, credentials: Credentials) -> ConfigError | None:
    """Why a TLS connection cannot be made there; None if it can, or if there is no answer. gRPC does not say."""
    no_tls = ConfigError(f"what answers at {host}:{port} does not speak TLS", hint="use http:// if it is etcd")
    resets = 0
    while resets < RESETS:  # a server without TLS may close with our greeting unread; so does one that just ends
        try:
            plain = socket.create_connection((host, port), timeout=TLS_CHECK_TIMEOUT_S)
        except OSError:
            return None
        try:
            return _handshake_refusal(plain, host, port, credentials, no_tls)
        except ConnectionError:
            resets += 1
    return no_tls


def _handshake_refusal(
    plain: socket.socket, host: str, port: int, credentials: Credentials, no_tls: ConfigError
) -> ConfigError | None:
    """ConnectionError: the other side closed before it had answered."""
    try:
        with plain, credentials.tls().wrap_socket(plain, server_hostname=host) as secure:
            secure.settimeout(TLS_CHECK_TIMEOUT_S)
            with suppress(ConnectionError):
                secure.recv(1)  # a refusal of our own certificate comes after the handshake
    except ssl.SSLCertVerificationError as error:
        return ConfigError(
            f"the certificate of etcd at {host}:{port} is not accepted: {error.verify_message}",
            hint=f"is {credentials.ca} (--etcd-ca) its authority? Is it made for this name, and has it not expired?",
        )
    except ssl.SSLError as error:
        if error.reason in NO_TLS:
            return no_tls
        ours = f"our certificate {credentials.cert}" if credentials.cert else "us without a certificate"
        return ConfigError(
            f"etcd at {host}:{port} refused {ours}: {error.reason}",
            hint="give one that its authority signed and that has not expired: --etcd-cert and --etcd-key",
        )
    except ConnectionError:
        raise
    except OSError:
        return None
    return None
