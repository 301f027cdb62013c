"""Addresses and certificates that a server cannot have are refused before a model is loaded."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from amx_tvm.errors import AmxError
from amx_tvm.server.address import Address


@pytest.fixture
def taken():
    """A port at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_free_port_stays_free(taken):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    Address(port=port).check()
    socket.create_server(("127.0.0.1", port)).close()
    with pytest.raises(AmxError, match=f"127.0.0.1:{taken}.*--port"):
        Address(port=taken).check()


def test_an_address_of_another_machine():
    with pytest.raises(AmxError, match="192.0.2.1.*--host"):  # of documentation, RFC 5737
        Address(host="192.0.2.1").check()


def test_files_that_are_no_certificate(tmp_path):
    with pytest.raises(AmxError, match="nothing.pem"):
        Address(certificate=str(tmp_path / "nothing.pem")).check()
    (tmp_path / "text.pem").write_text("text")
    with pytest.raises(AmxError, match="text.pem.*PEM"):
        Address(certificate=str(tmp_path / "text.pem")).check()
    with pytest.raises(AmxError, match="--certificate"):
        Address(private_key=str(tmp_path / "text.pem")).check()


def test_the_command_says_it_in_one_line(artifact, taken):
    command = [sys.executable, "-m", "amx_tvm", "serve", str(artifact), "--port", str(taken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot listen")
