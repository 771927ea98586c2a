"""An etcd with TLS and users: what a user with rights on its own keys needs, and what each refusal says."""

from __future__ import annotations

import select
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
from structlog.testing import capture_logs

from chaos.faults.proxy import Faults, TcpProxy, Way
from elastic.serve.etcd_server import EtcdServer
from membership.base.errors import ConfigError, StoreDenied, StoreUnavailable
from membership.store.credentials import Credentials
from membership.store.etcd import EtcdStore, connect
from membership.store.etcd_session import tls_refusal
from membership.store.interface import Compare, Get, Put
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from tests.support.helpers import eventually, stopped
from tests.support.secured_etcd import PASSWORD, USER, Authority, SecuredEtcd, secured_etcd

pytestmark = pytest.mark.contract

T = 30.0
KEYS = Keys("ours")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[SecuredEtcd]:
    """One that a test may break. USER has rights on one cluster's keys, and on nothing else."""
    with secured_etcd(tmp_path / "own", KEYS.prefix) as etcd:
        yield etcd


def test_a_cluster_touches_no_key_but_its_own(own: SecuredEtcd) -> None:
    with closing(own.connect(prefix=KEYS.prefix)) as store, Mirror(store, KEYS.cluster) as mirror:
        with LeaseKeeper(store, 60.0) as keeper:
            store.put(KEYS.config, b"", keeper.lease)
            assert store.txn([Compare(KEYS.config, "version", "=", 1)], [Get(KEYS.prefix, prefix=True)]).succeeded
            own.server.kill()
            eventually(lambda: not mirror.synced, T, "the mirror to notice")
            own.server.restart()  # tokens are gone, and the connection is doubtful: it is probed before the write
            store.put(KEYS.desired, b"")
        eventually(lambda: mirror.synced, T, "the mirror to watch again")


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.get("/other"),
        lambda store: store.range("/"),
        lambda store: store.put("/other", b""),
        lambda store: store.delete("/other"),
        lambda store: store.txn([], [Put("/other", b"")]),
        lambda store: store.watch("/other", 0),
    ],
    ids=["get", "range", "put", "delete", "txn", "watch"],
)
def test_a_key_without_a_right_is_named(secured: SecuredEtcd, call: Callable[[EtcdStore], object]) -> None:
    with closing(secured.connect(prefix="/test/")) as store:
        with pytest.raises(StoreDenied, match=r"/(other)?: etcdserver: permission denied|/other from") as caught:
            call(store)
        assert caught.value.definite
        assert "grant-permission" in caught.value.hint
        assert store.put("/test/still", b"")


def test_rights_taken_away_freeze_a_mirror_until_they_are_back(own: SecuredEtcd) -> None:
    with closing(own.connect(prefix=KEYS.prefix)) as store, Mirror(store, KEYS.cluster, probe_every_s=0.1) as mirror:
        eventually(lambda: mirror.synced, T, "the first watch")
        own.revoke(KEYS.prefix)
        eventually(lambda: not mirror.synced, T, "the mirror to notice")
        own.grant(KEYS.prefix)
        eventually(lambda: mirror.synced, T, "the mirror to be back")


def test_a_token_that_ended_is_asked_for_again(own: SecuredEtcd) -> None:
    """etcd forgets all tokens when it restarts, as it does with each after its time. Threads may notice at once."""
    with closing(own.connect(prefix=KEYS.prefix)) as store:
        lease = store.grant(60)
        own.server.restart()
        store.probe(T)
        own.server.restart()
        eventually(lambda: answered(store), T, "the connection to be back")
        threads = [threading.Thread(target=store.put, args=(f"{KEYS.prefix}{n}", b"", lease)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(T)
        assert len(store.range(KEYS.prefix)[1]) == 8
        assert store.keepalive(lease) > 0
        with closing(store.watch(KEYS.prefix, 0)):
            store.revoke(lease)


def answered(store: EtcdStore) -> bool:
    try:
        store.probe(0.5)
    except StoreDenied:
        raise
    except Exception:  # noqa: BLE001 - any other failure is the connection's
        return False
    return True


def test_a_password_may_change_while_it_is_served(own: SecuredEtcd) -> None:
    with closing(own.connect(prefix=KEYS.prefix)) as store:
        own.as_root("UserChangePassword", name=USER, password="another")
        own.server.restart()
        with pytest.raises(StoreDenied, match="authentication failed") as caught:
            store.probe(T)
        assert "--etcd-password-file" in caught.value.hint
        Path(own.credentials.password_file).write_text("another\n")
        store.probe(T)


def test_certificates_may_change_while_it_is_served(own: SecuredEtcd, tmp_path: Path) -> None:
    """All of them, as with another authority; first the client's are not all there yet."""
    other = Authority(tmp_path / "other")
    made = {Path(path).name: path for name in ("etcd", "client") for path in other.issue(name)}
    with closing(own.connect(prefix=KEYS.prefix)) as store, Mirror(store, KEYS.cluster, probe_every_s=0.1) as mirror:
        store.put(KEYS.desired, b"")
        eventually(lambda: mirror.synced, T, "the first watch")
        own.server.kill()
        ours = Path(own.credentials.ca).parent
        shutil.copy(other.pem, own.credentials.ca)
        for name in ("etcd.pem", "etcd.key", "client.pem"):
            shutil.copy(made[name], ours / name)
        own.server.restart()
        with pytest.raises(StoreUnavailable):
            store.probe(1.0)
        shutil.copy(made["client.key"], own.credentials.key)
        store.probe(T)
        store.put(KEYS.desired, b"")
        eventually(lambda: mirror.synced, T, "the mirror to watch again")


def replaced(own: SecuredEtcd, tmp_path: Path) -> dict[str, str]:
    """The clients' files are another authority's by now, etcd's are still to be replaced by those of this one."""
    other = Authority(tmp_path / "other")
    (server, server_key), (client, client_key) = other.issue("etcd"), other.issue("client")
    shutil.copy(other.pem, own.credentials.ca)
    shutil.copy(client, own.credentials.cert)
    shutil.copy(client_key, own.credentials.key)
    return {"etcd.pem": server, "etcd.key": server_key}


def test_a_slow_answer_while_certificates_are_rotated_costs_no_connection(own: SecuredEtcd, tmp_path: Path) -> None:
    """The clients' come first, and etcd knows the old ones only. Once it has the new ones, too, they are used."""
    with closing(own.connect(prefix=KEYS.prefix)) as store:
        lease = store.grant(600)
        servers = replaced(own, tmp_path)
        with capture_logs() as logged:
            for _ in range(3):
                with stopped(own.server.pid), pytest.raises(StoreUnavailable):
                    store.keepalives([lease], timeout_s=0.2)
                store.probe(T)
                assert store.put(KEYS.desired, b"")
        assert [each["event"] for each in logged] == ["etcd_certificates_not_accepted_yet"], "it is said once"
        for name, path in servers.items():
            shutil.copy(path, Path(own.credentials.ca).parent / name)
        own.server.restart()
        store.probe(T)
        assert store.put(KEYS.desired, b"")


def test_certificates_may_change_where_etcd_is_far(own: SecuredEtcd, tmp_path: Path) -> None:
    """A new connection takes longer there than gRPC's first attempt at it."""
    far = Faults(up=Way(delay_s=0.06), down=Way(delay_s=0.06))
    with (
        TcpProxy("127.0.0.1", urlsplit(own.url).port or 0) as proxy,
        closing(connect([proxy.url.replace("http:", "https:")], own.credentials, prefix=KEYS.prefix)) as store,
    ):
        store.put(KEYS.desired, b"")
        proxy.set(far)
        for name, path in replaced(own, tmp_path).items():
            shutil.copy(path, Path(own.credentials.ca).parent / name)
        own.server.restart()
        store.probe(T)
        assert store.put(KEYS.desired, b"")


def test_files_that_do_not_fit_each_other_are_named_once(own: SecuredEtcd, tmp_path: Path) -> None:
    _, key = Authority(tmp_path / "other").issue("client")
    with closing(own.connect(prefix=KEYS.prefix)) as store:
        shutil.copy(key, own.credentials.key)
        own.server.kill()
        with capture_logs() as logged:
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    store.put(KEYS.desired, b"")
        assert [each["event"] for each in logged] == ["etcd_certificates_unusable"]
        assert own.credentials.key in logged[0]["error"]


def test_a_password_is_in_no_error_and_no_repr(own: SecuredEtcd) -> None:
    own.as_root("UserChangePassword", name=USER, password="another")
    with pytest.raises(StoreDenied) as caught:
        own.connect(prefix=KEYS.prefix)
    assert PASSWORD not in f"{caught.value!r} {caught.value.hint} {own.credentials!r}"


def test_users_without_tls_and_none_where_there_are_none(etcd: EtcdServer, own: SecuredEtcd) -> None:
    ours = Credentials(user=USER, password_file=own.credentials.password_file)
    connect([own.server.url], ours, prefix=KEYS.prefix).close()
    connect([etcd.url], ours).close()  # etcd without users: as etcd's own clients, we do not insist
    with pytest.raises(StoreDenied, match="user name is empty") as caught:
        connect([own.server.url], prefix=KEYS.prefix)
    assert "--etcd-user" in caught.value.hint


def test_certificates_that_are_not_accepted(secured: SecuredEtcd, tmp_path: Path) -> None:
    good, other = secured.credentials, Authority(tmp_path / "other")
    pem, key = other.issue("stranger")
    old_pem, old_key = Authority(secured.folder / "ca").issue("old", days=-1)
    for credentials, says, hint in (
        (msgspec.structs.replace(good, ca=other.pem), "is not accepted: ", "--etcd-ca"),
        (msgspec.structs.replace(good, cert=pem, key=key), f"refused our certificate {pem}", "--etcd-cert"),
        (msgspec.structs.replace(good, cert=old_pem, key=old_key), f"refused our certificate {old_pem}", "--etcd-cert"),
        (msgspec.structs.replace(good, cert="", key=""), "refused us without a certificate", "--etcd-cert"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            connect([secured.url], credentials, prefix="/test/")
        assert hint in caught.value.hint
    with pytest.raises(ConfigError, match="does not speak TLS"):
        connect([secured.server.url.replace("http:", "https:")], good)


def test_a_server_without_tls_that_closes_with_our_greeting_unread(secured: SecuredEtcd) -> None:
    """The kernel then answers with a reset and not with an end of file. Once may be a server that ends: asked again."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
        port = server.getsockname()[1]

        def close_at_once(times: int, then: Callable[[], None]) -> None:
            for _ in range(times):
                taken, _address = server.accept()
                select.select([taken], [], [], T)
                taken.close()
            then()

        served = threads.submit(close_at_once, 3, lambda: None)
        refusal = tls_refusal("127.0.0.1", port, secured.credentials)
        served.result(T)
        assert "does not speak TLS" in str(refusal)
        ended = threads.submit(close_at_once, 1, server.close)
        assert tls_refusal("127.0.0.1", port, secured.credentials) is None
        ended.result(T)


def test_a_server_whose_certificate_has_expired(tmp_path: Path) -> None:
    with (
        secured_etcd(tmp_path / "own", KEYS.prefix, days=-1) as etcd,
        pytest.raises(ConfigError, match="certificate has expired"),
    ):
        etcd.connect(prefix=KEYS.prefix)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), (b"", "is empty"), (b"\n", "is empty"), (b"\xff", "decode")]
)
def test_a_password_that_cannot_be_read(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        connect(["http://127.0.0.1:1"], Credentials(user="u", password_file=str(file)))


@pytest.mark.parametrize("given", [{"user": "u"}, {"password_file": "/p"}])
def test_a_user_and_the_password_go_together(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="needs a file with the password"):
        connect(["http://127.0.0.1:1"], Credentials(**given))


def test_certificates_that_are_none(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    ca = Authority(tmp_path / "ca")
    (pem, _), (_, key) = ca.issue("one"), ca.issue("two")
    for files in ({"ca": str(junk)}, {"ca": ca.pem, "cert": pem, "key": key}):
        with pytest.raises(ConfigError, match="not a PEM certificate, or the key is another's"):
            connect(["https://127.0.0.1:1"], Credentials(**files))


def test_a_url_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="holds a user's name") as caught:
        connect(["http://me:secret@127.0.0.1:1"])
    assert "secret" not in str(caught.value)
