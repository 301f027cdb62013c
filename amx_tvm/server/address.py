"""Where a server listens, and whether it can: asked before a model is loaded."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

from amx_tvm.errors import AmxError


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes
    ----------
    host, port : str, int
        The address; 127.0.0.1 is reached from this machine only.
    certificate, private_key : str, optional
        Files in PEM form: HTTPS.
    drain_s : float
        Seconds that answers under way get to end when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: str | None = None
    private_key: str | None = None
    drain_s: int = 60

    def check(self) -> None:
        """Refuse files that cannot be read and an address that cannot be listened at.

        Raises
        ------
        AmxError
            The message has the system's reason.
        """
        if self.certificate:
            self._read_certificate(self.certificate)
        elif self.private_key:
            raise AmxError(
                f"the private key {self.private_key} was given without a certificate; name its "
                "file with --certificate"
            )
        try:
            self._bind()
        except OSError as error:
            raise AmxError(
                f"cannot listen at {self.host}:{self.port}: {error.strerror}; give a free --port "
                "and a --host of this machine"
            ) from None

    def _read_certificate(self, certificate: str) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, self.private_key)
        except OSError as error:  # an SSLError is one
            files = " and ".join(name for name in (certificate, self.private_key) if name)
            raise AmxError(
                f"cannot read a certificate and its private key from {files}: "
                f"{error.strerror or error}; expected PEM files that belong together"
            ) from None

    def _bind(self) -> None:
        """Bind every address of the host, as the server will, and let go of it."""
        found = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(where)
