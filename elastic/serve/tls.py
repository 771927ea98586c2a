"""TLS of the gateway's ports: certificates that are read again when their files change, and who trusts them here."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from functools import cache
from pathlib import Path

import structlog

from elastic.serve.options import ApiOptions
from membership.base.errors import ConfigError

log = structlog.get_logger(__name__)


class Certificates:
    """What a port shows its clients, and asks of them. A changed file that cannot be used changes nothing."""

    def __init__(self, api: ApiOptions) -> None:
        """ConfigError: the files cannot be used."""
        self._api = api
        self._files = [path for path in (api.ssl_certfile, api.ssl_keyfile, api.ssl_ca_certs) if path is not None]
        self._stamp = self._stamp_now()
        self._context = _context(api)

    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        stamp = self._stamp_now()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._context = _context(self._api)
            except ConfigError as error:
                log.error("certificates_kept", error=str(error), hint=error.hint)
            else:
                log.info("certificates_read", files=list(map(str, self._files)))
        return self._context

    def _stamp_now(self) -> object:
        return tuple(map(stamp_of, self._files))


def certificates_of(api: ApiOptions) -> Certificates | None:
    """What `--ssl-certfile` and its like say; None: no TLS. ConfigError: they do not go together, or cannot be used."""
    if api.ssl_certfile is not None:
        if api.ssl_cert_reqs and api.ssl_ca_certs is None:
            raise ConfigError("--ssl-cert-reqs needs --ssl-ca-certs", hint="name the authority of the clients")
        return Certificates(api)
    for flag, given in (
        ("--ssl-keyfile", api.ssl_keyfile), ("--ssl-ca-certs", api.ssl_ca_certs), ("--ssl-cert-reqs", api.ssl_cert_reqs)
    ):  # fmt: skip
        if given:
            raise ConfigError(f"{flag} needs --ssl-certfile", hint="name the certificate of the port")
    return None


def authorities(url: str) -> ssl.SSLContext | bool:
    """The authorities that httpx is to trust (its `verify`): the machine's, but for HTTPS only.

    It reads all of them for each client otherwise, which takes 20 ms of a processor.
    """
    return _trusts_none() if url.startswith("http:") else True


@cache
def _trusts_none() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def pinned(certificate: str) -> ssl.SSLContext:
    """For clients on this machine, which know the port's certificate: they trust it and no other one, by any name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load(lambda: context.load_verify_locations(certificate), "--ssl-certfile", certificate)
    return context


def trusting(authority: Path) -> ssl.SSLContext:
    """For clients that trust this authority and no other one. ConfigError: its file cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(lambda: context.load_verify_locations(authority), "--cacert", authority)
    return context


def stamp_of(path: Path) -> object:
    """What changes whenever the file does."""
    try:
        info = os.stat(path)
    except OSError as error:
        return error.errno
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _context(api: ApiOptions) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    certificate, key, authorities = api.ssl_certfile, api.ssl_keyfile, api.ssl_ca_certs
    if certificate is not None:
        _load(lambda: context.load_cert_chain(certificate, key), "--ssl-certfile", certificate, key)
    if authorities is not None:
        _load(lambda: context.load_verify_locations(authorities), "--ssl-ca-certs", authorities)
        # A client without a certificate gets an answer to what probes ask: see Access.
        context.verify_mode = ssl.CERT_OPTIONAL if api.ssl_cert_reqs else ssl.CERT_NONE
    return context


def _load(load: Callable[[], None], flag: str, *given: str | Path | None) -> None:
    files = " and ".join(str(file) for file in given if file is not None)
    try:
        load()
    except ssl.SSLError as error:
        raise ConfigError(f"{files}: {error.reason or error}", hint="give PEM files that go together") from error
    except OSError as error:
        raise ConfigError(f"{files} cannot be read: {error.strerror}", hint=f"check {flag}") from error
