"""Where a server is, what it may be called in a log, and the key that it wants."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from depthlm_ros.errors import ConfigError

EXAMPLE = "http://localhost:8000"


@dataclass(frozen=True)
class Address:
    """A server's address.

    Attributes:
        base: scheme, host, port and the path before "/v1"; no slash at its end. Safe to show.
        private: whether the host is this machine or a neighbour: a loopback or private address, or a name that no
            public name server knows. Such hosts are never asked through a proxy.
        secure: whether it is reached with TLS.
    """

    base: str
    private: bool
    secure: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """Reads a URL, with or without "/v1" at its end.

        Raises:
            ConfigError: no URL, another scheme, or something in it that doesn't belong there.
        """
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
            # As it is looked up: other scripts have dots and digits of their own.
            looked_up = (host or "").encode("idna").decode("ascii")
        except UnicodeError as error:
            raise ConfigError(
                f"server_urls: {url!r} has a host that can't be looked up ({error}); give one like {EXAMPLE}"
            ) from error
        except ValueError as error:
            raise ConfigError(f"server_urls: a URL can't be read ({error}); give one like {EXAMPLE}") from error
        if parts.username is not None or parts.password is not None:
            # It would end up in logs and diagnostics.
            raise ConfigError(
                f"server_urls: the URL of {host} holds a user name or a password; leave them out, and give the key in "
                "the environment variable that server_key_variable names"
            )
        if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in host):
            raise ConfigError(f"server_urls: {url!r} is no URL of a server; give one like {EXAMPLE}")
        if parts.query or parts.fragment:
            raise ConfigError(f"server_urls: the URL of {host} has a part after ? or #; give one like {EXAMPLE}")
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        shown = f"[{host}]" if ":" in host else host
        place = shown if port is None else f"{shown}:{port}"
        return cls(f"{parts.scheme}://{place}{path}", _is_private(looked_up), parts.scheme == "https")


@dataclass(frozen=True)
class Key:
    """A server's key; empty for none. Neither shown nor logged."""

    text: str = field(default="", repr=False)
    variable: str = ""

    @classmethod
    def read(cls, variable: str) -> Key:
        """Takes it from the environment.

        Raises:
            ConfigError: it can't be a header's value.
        """
        text = os.environ.get(variable, "").strip() if variable else ""
        if any(not "!" <= c <= "~" for c in text):
            raise ConfigError(
                f"the key in {variable} holds characters that no HTTP header may have; write it there once more"
            )
        return cls(text, variable)

    def check(self, address: Address) -> None:
        """Refuses to send it where anybody on the way could read it.

        Raises:
            ConfigError: plain HTTP to a public host.
        """
        if self.text and not address.secure and not address.private:
            raise ConfigError(
                f"{address.base} would get the key of {self.variable} unencrypted; give its https:// URL, or unset "
                f"{self.variable} if it wants no key"
            )

    def headers(self) -> dict[str, str]:
        """What is sent along."""
        return {"Authorization": f"Bearer {self.text}"} if self.text else {}

    def hide(self, said: str) -> str:
        """What a server said, without the key: some repeat it in their refusal."""
        return said.replace(self.text, "***") if self.text else said


def _is_private(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        name = host.rstrip(".").lower()
        if re.fullmatch("[0-9]+|0x[0-9a-f]*", name):
            # Looked up as one: 134744072 is 8.8.8.8.
            return False
        return "." not in name or name.endswith((".local", ".localhost", ".internal", ".lan", ".home.arpa"))
    return address.is_private or address.is_loopback or address.is_link_local
