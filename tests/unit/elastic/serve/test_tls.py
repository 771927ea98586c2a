"""Which flags of TLS go together, and files that cannot be used."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from elastic.serve.options import ApiOptions
from elastic.serve.tls import authorities, certificates_of, trusting
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit

SOME = Path("some.pem")


def test_no_flag_means_no_tls() -> None:
    assert certificates_of(ApiOptions()) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ApiOptions(ssl_keyfile=SOME), "--ssl-keyfile needs --ssl-certfile"),
        (ApiOptions(ssl_ca_certs=SOME), "--ssl-ca-certs needs --ssl-certfile"),
        (ApiOptions(ssl_cert_reqs=1), "--ssl-cert-reqs needs --ssl-certfile"),
        (ApiOptions(ssl_certfile=SOME, ssl_cert_reqs=2), "--ssl-cert-reqs needs --ssl-ca-certs"),
        (ApiOptions(ssl_certfile=SOME), r"^some\.pem cannot be read"),
        (ApiOptions(ssl_certfile=SOME, ssl_keyfile=Path("key.pem")), r"some\.pem and key\.pem cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(
    given: ApiOptions, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        certificates_of(given)


def test_files_that_are_no_certificates_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("x")
    with pytest.raises(ConfigError, match="damaged"):
        certificates_of(ApiOptions(ssl_certfile=damaged))
    with pytest.raises(ConfigError, match="damaged"):
        trusting(damaged)


def test_a_client_is_told_which_flag_names_a_file_that_is_missing(tmp_path: Path) -> None:
    """It was --ssl-certfile, which no client command has."""
    with pytest.raises(ConfigError, match="cannot be read") as refused:
        trusting(tmp_path / "missing.pem")
    assert refused.value.hint == "check --cacert"


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("http://a", False),
        ("http://[::1]:1", False),
        ("https://a", True),
        ("HTTP://a", True),
        ("", True),
    ],
)
def test_who_signs_certificates_matters_for_https_alone(url: str, *, read: bool) -> None:
    """What looks again and again until a cluster is ready need not read all of the machine's authorities for it."""
    trusted = authorities(url)
    assert (trusted is True) == read
    if trusted is not True:
        assert isinstance(trusted, ssl.SSLContext)
        assert trusted.verify_mode == ssl.CERT_REQUIRED
        assert trusted.get_ca_certs() == []
        assert authorities(url) is trusted
