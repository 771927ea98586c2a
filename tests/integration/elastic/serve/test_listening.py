"""Where a gateway listens: both addresses, all kinds of them, and sockets that outlive the process that serves them."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from elastic.demo.model import shipped_demo_model
from elastic.serve.listening import LISTEN_FDS, Listeners, bind, inherited_listeners, listening, url_of
from elastic.serve.options import GatewayOptions, ServeOptions
from elastic.serve.role_process import RoleProcess
from elastic.serve.supervisor import Supervisor
from membership.base.endings import OomKills
from membership.base.errors import ConfigError
from tests.support.gateway_process import free_port

pytestmark = pytest.mark.integration

OPTIONS = GatewayOptions(port=0, admin_port=0)


@pytest.mark.parametrize(
    ("host", "url", "from_elsewhere"),
    [
        ("127.0.0.1", "http://127.0.0.1:", "http://127.0.0.1:"),
        ("127.1", "http://127.0.0.1:", "http://127.0.0.1:"),
        ("0.0.0.0", "http://127.0.0.1:", "http://me:"),
        ("::1", "http://[::1]:", "http://[::1]:"),
        ("::", "http://[::1]:", "http://me:"),
    ],
)
def test_any_address_has_its_url(host: str, url: str, from_elsewhere: str) -> None:
    with listening(replace(OPTIONS, host=host, admin_host=host)) as bound:
        for each in bound:
            port = each.getsockname()[1]
            assert url_of(each) == f"{url}{port}"
            assert url_of(each, any_host="me") == f"{from_elsewhere}{port}"
            with socket.create_connection((httpx.URL(url_of(each)).host, port), timeout=10):
                each.accept()[0].close()


def test_the_admin_address_is_its_own_and_loopback_by_default() -> None:
    with listening(replace(OPTIONS, host="0.0.0.0")) as bound:
        assert bound.api.getsockname()[0] == "0.0.0.0"
        assert bound.admin.getsockname()[0] == "127.0.0.1"


def test_one_number_for_both_ports_is_refused_before_anything_starts(tmp_path: Path) -> None:
    port = free_port()
    same = replace(OPTIONS, port=port, admin_port=port)
    with pytest.raises(ConfigError, match=f"both {port}") as refused, listening(same):
        pass
    assert "--admin-port" in refused.value.hint
    options = ServeOptions(model=shipped_demo_model(), port=port, admin_port=port, state_dir=tmp_path / "state")
    with pytest.raises(ConfigError, match=f"both {port}"), Supervisor(options):
        pass
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64, "256.1.1.1", "[::1", ""])
def test_what_is_no_address_is_one_clear_error(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on") as refused, listening(replace(OPTIONS, admin_host=host)):
        pass
    assert "--admin-host" in refused.value.hint


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_answer_in_two_pieces_does_not_wait_for_the_client_to_confirm_the_first(host: str) -> None:
    """Nagle's algorithm is off on what is accepted, as asyncio has it only for sockets that name their protocol."""

    async def nagle_is_off() -> bool:
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def client(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(bool(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        with bind(host, 0, ("--host", "--port")) as bound:
            bound.setblocking(False)
            async with await asyncio.start_server(client, sock=bound):
                _, writer = await asyncio.open_connection(*bound.getsockname()[:2])
                try:
                    return await asyncio.wait_for(found, 30.0)
                finally:
                    writer.close()

    assert asyncio.run(nagle_is_off())


def test_the_same_number_on_two_addresses() -> None:
    with listening(replace(OPTIONS, host="127.0.0.2")) as first:
        port = first.api.getsockname()[1]
        with listening(
            replace(OPTIONS, host="127.0.0.3", port=port, admin_host="127.0.0.4", admin_port=port)
        ) as second:
            assert [each.getsockname()[:2] for each in second] == [("127.0.0.3", port), ("127.0.0.4", port)]


def test_a_port_is_never_free_while_a_gateway_dies_and_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects in between waits; nobody else can take the port."""
    monkeypatch.setattr("elastic.serve.role_process.ENTRY", "tests.support.answers_one")
    with listening(OPTIONS) as bound:
        role = RoleProcess("gateway", [], tmp_path / "log", listeners=bound)
        addresses = [each.getsockname() for each in bound]
        for _ in range(2):
            waiting = [socket.create_connection(address, timeout=30) for address in addresses]  # no process serves
            for address in addresses:
                with pytest.raises(ConfigError, match="Address already in use"):
                    bind(*address, ("--host", "--port"))
            role.start(0.0)
            process = role.process
            assert process is not None
            for client in waiting:
                with client:
                    assert client.recv(100) == b"%d" % process.pid
            process.wait(timeout=30)
            role.on_exit(1.0, OomKills(lambda: None))
    with socket.socket() as late, pytest.raises(ConnectionRefusedError):
        late.connect(addresses[0])


def test_a_process_that_inherits_them_keeps_them_to_itself() -> None:
    with listening(OPTIONS) as bound:
        copies = Listeners(bound.api.dup(), bound.admin.dup())
        environ = {LISTEN_FDS: ",".join(str(each.detach()) for each in copies)}
        with listening(OPTIONS, inherited_listeners(environ)) as adopted:
            assert [each.getsockname() for each in adopted] == [each.getsockname() for each in bound]
            assert not any(each.get_inheritable() for each in adopted)
            assert environ == {}
    assert inherited_listeners(environ) is None
