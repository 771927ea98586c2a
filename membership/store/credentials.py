"""Who we are to an etcd that asks: certificates, and a user with a password.

The password is read from its file each time a token is asked for, so that it may change, and is kept nowhere.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import msgspec

from membership.base.errors import ConfigError


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files, the name of a user, and the path of the file with its password. Empty: not needed."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""

    def as_flags(self) -> list[str]:
        """As arguments of a command."""
        given = [(name, getattr(self, name)) for name in self.__struct_fields__]
        return [f"--etcd-{name.replace('_', '-')}={value}" for name, value in given if value]

    def check(self, *, secure: bool) -> None:
        """ConfigError if they are incomplete, cannot be read, or do not fit endpoints that are `secure` or not."""
        if secure and not self.ca:
            raise ConfigError("an https etcd endpoint needs a CA certificate", hint="give its PEM file: --etcd-ca")
        if not secure and (self.ca or self.cert or self.key):
            raise ConfigError("certificates were given for an etcd endpoint without TLS", hint="use https:// endpoints")
        if bool(self.cert) != bool(self.key):
            hint = "give both --etcd-cert and --etcd-key"
            raise ConfigError("an etcd client certificate needs its key, and the key its certificate", hint=hint)
        if bool(self.user) != bool(self.password_file):
            hint = "give both --etcd-user and --etcd-password-file"
            raise ConfigError("an etcd user needs a file with the password, and the file a user", hint=hint)
        if secure:
            self.tls()
        if self.user:
            self.password()

    def tls(self) -> ssl.SSLContext:
        """The certificates as Python's TLS takes them; ConfigError naming the file that is missing or damaged."""
        reading = self.ca
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert:
                reading = f"{self.cert} with {self.key}"
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            why = "it is not a PEM certificate, or the key is another's" if isinstance(error, ssl.SSLError) else error
            raise ConfigError(f"cannot use the etcd certificate {reading}: {why}") from error
        return context

    def password(self) -> str:
        """What the file says, without a final newline."""
        try:
            password = Path(self.password_file).read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read etcd's password for user {self.user!r}: {error}") from error
        if not password:
            raise ConfigError(f"the file {self.password_file} with etcd's password for user {self.user!r} is empty")
        return password


NO_CREDENTIALS = Credentials()
