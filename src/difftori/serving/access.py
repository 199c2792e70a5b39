"""Who may use a policy server: the token of its clients, and the addresses that need one."""

import ipaddress
import os
from pathlib import Path

from difftori.errors import ConfigError

_LENGTH = 16
_FIX = "Fix: python -c 'import secrets; print(secrets.token_urlsafe())' > FILE; chmod 600 FILE"


def read_token(path: Path) -> str:
    """Return the token in a file, without the white space around it.

    Raises ConfigError if there is no file, if other users may access it, or if it does not hold one word of at least 16 characters.
    """
    try:
        with path.open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(4096)
    except OSError as error:
        raise ConfigError([f"--token-file: {path} cannot be read: {error.strerror}. {_FIX}"]) from error
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            [f"--token-file: other users may access {path} (mode {mode & 0o777:o}). Fix: chmod 600 {path}"]
        )
    token = content.decode("ascii", "replace").strip()
    if len(token) < _LENGTH or not all("!" <= letter <= "~" for letter in token):
        raise ConfigError(
            [f"--token-file: {path} does not hold one word of at least {_LENGTH} ASCII characters. {_FIX}"]
        )
    return token


def require_token(host: str, token: str | None) -> None:
    """Raise ConfigError if other machines can reach `host` and there is no token."""
    if token is None and not _is_loopback(host):
        raise ConfigError([f"--host: other machines can reach {host!r}, so a token is needed. Fix: give --token-file"])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
