"""TLS on the gateway's ports: certificates, also of clients, that are replaced while it serves; slow handshakes."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import copyfile

import httpx
import openai
import pytest

from elastic.cli.client import AdminClient
from elastic.serve.options import ApiOptions
from elastic.serve.tls import pinned, trusting
from tests.support.gateway_cluster import MODEL, TOKEN, GatewayCluster, RunningGateway, wait_ready
from tests.support.secured_etcd import Authority

pytestmark = pytest.mark.integration

TEXT = "hello world"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayCluster]:
    cluster = GatewayCluster(tmp_path_factory.mktemp("tls"))
    cluster.publish_view()
    with cluster.engine(cluster.says(TEXT)):
        yield cluster


@pytest.fixture(scope="module")
def authority(cluster: GatewayCluster) -> Authority:
    return Authority(cluster.path / "authority")


@pytest.fixture(scope="module")
def files(cluster: GatewayCluster, authority: Authority) -> ApiOptions:
    """A certificate in files of its own, which a test may replace."""
    files = ApiOptions(ssl_certfile=cluster.path / "tls.pem", ssl_keyfile=cluster.path / "tls.key")
    show(files, authority, "first")
    return files


@pytest.fixture(scope="module")
def gateway(cluster: GatewayCluster, files: ApiOptions, authority: Authority) -> Iterator[RunningGateway]:
    with cluster.gateway(api=files) as running:
        wait_ready(running, trusting(Path(authority.pem)))  # its sockets to the engine are no test's
        yield running


def show(files: ApiOptions, authority: Authority, name: str) -> None:
    for made, wanted in zip(authority.issue(name), (files.ssl_certfile, files.ssl_keyfile), strict=True):
        assert wanted is not None
        copyfile(made, wanted)


def says(gateway: RunningGateway, trust: ssl.SSLContext) -> str:
    with gateway.client(trust=trust) as client:
        return client.completions.create(model=MODEL, prompt="x", max_tokens=60).choices[0].text


def local(url: str) -> str:
    """The certificates name localhost."""
    return f"https://localhost:{httpx.URL(url).port}"


def test_https_with_the_official_client(gateway: RunningGateway, authority: Authority) -> None:
    assert gateway.url.startswith("https://127.0.0.1:")
    assert gateway.admin_url.startswith("http://127.0.0.1:")  # which only this machine can reach
    trust = trusting(Path(authority.pem))
    assert says(gateway, trust) == TEXT
    with gateway.client(trust=trust) as client:
        stream = client.completions.create(model=MODEL, prompt="x", max_tokens=60, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == TEXT
    with pytest.raises(openai.APIConnectionError):
        says(gateway, ssl.create_default_context())
    with pytest.raises(httpx.HTTPError):
        httpx.get(gateway.url.replace("https", "http"), timeout=20)


def test_commands_reach_an_admin_port_that_is_not_on_loopback(
    cluster: GatewayCluster, files: ApiOptions, authority: Authority
) -> None:
    with cluster.gateway("open", api=files, admin_host="0.0.0.0") as gateway:
        assert (gateway.url[:6], gateway.admin_url[:6]) == ("https:", "https:")
        for trust in (trusting(Path(authority.pem)), pinned(str(files.ssl_certfile))):
            client = AdminClient(local(gateway.admin_url), TOKEN, trust=trust)
            assert client.view().epoch == 1
            client.close()


def test_a_new_certificate_counts_for_the_next_connection(
    gateway: RunningGateway, files: ApiOptions, authority: Authority, tmp_path: Path
) -> None:
    old, other = trusting(Path(authority.pem)), Authority(tmp_path / "other")
    new = trusting(Path(other.pem))
    with httpx.Client(base_url=gateway.url, verify=old, timeout=20) as kept:
        assert kept.get("/livez").is_success
        show(files, other, "second")
        assert says(gateway, new) == TEXT
        with pytest.raises(openai.APIConnectionError):
            says(gateway, old)
        assert kept.get("/livez").is_success  # over the connection that it has
    assert files.ssl_certfile is not None
    files.ssl_certfile.write_text("damaged")
    assert says(gateway, new) == TEXT
    show(files, authority, "third")
    assert says(gateway, old) == TEXT


def test_who_does_not_finish_a_handshake_delays_nobody(gateway: RunningGateway, authority: Authority) -> None:
    where = ("127.0.0.1", httpx.URL(gateway.url).port or 0)
    with ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(where, timeout=30)) for _ in range(50)]
        silent[0].sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a hello
        assert says(gateway, trusting(Path(authority.pem))) == TEXT
        silent[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in silent[1].recv(4096)


def test_certificates_of_clients(cluster: GatewayCluster, authority: Authority, tmp_path: Path) -> None:
    pem, key = map(Path, authority.issue("server"))
    asked = ApiOptions(ssl_certfile=pem, ssl_keyfile=key, ssl_ca_certs=Path(authority.pem), ssl_cert_reqs=2)
    stranger = Authority(tmp_path / "stranger")
    with cluster.gateway("certified", api=asked) as gateway:
        nobody, known, unknown = (trusting(Path(authority.pem)) for _ in range(3))
        known.load_cert_chain(*authority.issue("client"))
        unknown.load_cert_chain(*stranger.issue("client"))
        answer = httpx.get(f"{gateway.url}/v1/models", verify=nobody, timeout=20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "client_certificate_required")
        assert httpx.get(f"{gateway.url}/livez", verify=nobody, timeout=20).is_success
        assert says(gateway, known) == TEXT
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{gateway.url}/livez", verify=unknown, timeout=20)
