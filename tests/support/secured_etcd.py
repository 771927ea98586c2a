"""An etcd that trusts nobody: TLS with client certificates, and users. Its authorities are made by openssl."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from elastic.serve.etcd_server import EtcdServer, free_ports
from membership.store.credentials import Credentials
from membership.store.etcd import EtcdStore, connect
from membership.store.etcd3_compat import etcd3, etcdrpc
from membership.store.interface import prefix_end

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
USER, PASSWORD = "server", "correct horse, battery"


class Authority:
    """A certificate authority of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pem, self._key = str(folder / "ca.pem"), str(folder / "ca.key")
        if folder.exists():
            return  # it was made before
        folder.mkdir()
        _openssl("req", "-x509", *NEW_KEY, "-keyout", self._key, "-out", self.pem, "-subj", "/CN=ours", "-days", "2")

    def issue(self, name: str, days: int = 2) -> tuple[str, str]:
        """Paths of a certificate for loopback and its key. `days` = -1: it has expired."""
        pem, key, request = (str(self.folder / f"{name}.{ending}") for ending in ("pem", "key", "csr"))
        names = ("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        _openssl("req", *NEW_KEY, "-keyout", key, "-out", request, *names)
        signing = ("-CA", self.pem, "-CAkey", self._key, "-copy_extensions", "copy", "-days", str(days))
        _openssl("x509", "-req", "-in", request, "-out", pem, *signing)
        return pem, key


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


class SecuredEtcd:
    """`url` wants TLS. `server.url` is for its health check, on loopback without TLS."""

    def __init__(self, folder: Path, server: EtcdServer, url: str, credentials: Credentials) -> None:
        self.folder, self.server, self.url, self.credentials = folder, server, url, credentials

    def connect(self, **settings: Any) -> EtcdStore:
        """As USER."""
        return connect([self.url], self.credentials, **settings)

    def grant(self, prefix: str) -> None:
        """Let USER read and write these keys too."""
        self.as_root("RoleGrantPermission", name=USER, perm=permission(prefix))

    def revoke(self, prefix: str) -> None:
        """Take that away."""
        key = prefix.encode()
        self.as_root("RoleRevokePermission", role=USER, key=key, range_end=prefix_end(key))

    def as_root(self, call: str, **fields: Any) -> None:
        """One call to etcd's own users and roles."""
        with closing(etcd3.Etcd3Client(*self.server.url.removeprefix("http://").split(":"))) as client:
            stub = etcdrpc.AuthStub(client.channel)
            token = stub.Authenticate(etcdrpc.AuthenticateRequest(name="root", password="root"), timeout=20).token
            _ask(stub, call, fields, (("token", token),))


def permission(prefix: str) -> dict[str, Any]:
    """To read and write all keys that begin with `prefix`."""
    key = prefix.encode()
    return {"permType": 2, "key": key, "range_end": prefix_end(key)}


def _ask(stub: Any, call: str, fields: Mapping[str, Any], metadata: Any = ()) -> None:
    name = "AuthEnableRequest" if call == "AuthEnable" else f"Auth{call}Request"
    request = getattr(etcdrpc, name)(**fields)
    getattr(stub, call)(request, timeout=20, metadata=metadata)


@contextmanager
def secured_etcd(folder: Path, *prefixes: str, token_ttl_s: int = 300, days: int = 2) -> Iterator[SecuredEtcd]:
    """Start it. USER may read and write keys under `prefixes`, and no others. `days`: see `Authority.issue`."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = Authority(folder / "ca")
    (server_pem, server_key), (client_pem, client_key) = authority.issue("etcd", days), authority.issue("client")
    plain, secure, peer = free_ports(3)
    url = f"https://127.0.0.1:{secure}"
    flags = {
        "listen-client-urls": f"http://127.0.0.1:{plain},{url}",
        "advertise-client-urls": url,
        "cert-file": server_pem,
        "key-file": server_key,
        "trusted-ca-file": authority.pem,
        "client-cert-auth": "true",
        "auth-token-ttl": str(token_ttl_s),
        "bcrypt-cost": "4",
    }
    password_file = folder / "password"
    password_file.write_text(PASSWORD + "\n")
    credentials = Credentials(
        ca=authority.pem, cert=client_pem, key=client_key, user=USER, password_file=str(password_file)
    )
    with EtcdServer(folder / "etcd", ports=(plain, peer), flags=flags) as server:
        with closing(etcd3.Etcd3Client("127.0.0.1", plain)) as client:
            stub = etcdrpc.AuthStub(client.channel)
            for name, password in (("root", "root"), (USER, PASSWORD)):
                _ask(stub, "RoleAdd", {"name": name})
                _ask(stub, "UserAdd", {"name": name, "password": password})
                _ask(stub, "UserGrantRole", {"user": name, "role": name})
            for prefix in prefixes:
                _ask(stub, "RoleGrantPermission", {"name": USER, "perm": permission(prefix)})
            _ask(stub, "AuthEnable", {})
        yield SecuredEtcd(folder, server, url, credentials)
