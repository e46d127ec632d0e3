"""No test can reach the network, neither in its own process nor in one that it starts."""

import os
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

ATTEMPT = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"


def test_a_connection_by_address_is_refused():
    with socket.socket() as opened, pytest.raises(RuntimeError, match=r"tried to reach '192\.0\.2\.1'"):
        opened.connect(("192.0.2.1", 80))


def test_a_connection_that_would_return_an_error_code_is_refused():
    with socket.socket() as opened, pytest.raises(RuntimeError, match="must not use the network"):
        opened.connect_ex(("192.0.2.1", 80))


def test_a_datagram_is_refused():
    kind = socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as opened, pytest.raises(RuntimeError, match="must not use"):
        opened.sendto(b"x", ("192.0.2.1", 53))


def test_a_name_is_not_looked_up():
    with pytest.raises(RuntimeError, match=r"tried to reach 'example\.org'"):
        urllib.request.urlopen("http://example.org", timeout=1)


def test_a_subprocess_is_refused_too():
    done = subprocess.run([sys.executable, "-c", ATTEMPT], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "tests must not use the network, and this one tried to reach '192.0.2.1'" in done.stderr


def test_hugging_face_libraries_are_switched_offline():
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = threading.Thread(target=lambda: server.accept()[0].sendall(b"here"))
        answering.start()
        with socket.create_connection(server.getsockname(), timeout=5) as opened:
            assert opened.recv(4) == b"here"
        answering.join(timeout=5)
