"""Connections that ask nothing, or never finish asking, keep nobody else from being answered."""

import contextlib
import socket
from urllib.parse import urlsplit

import httpx
from fakes import LocalServer, say, settings

IDLE, HALF = 300, 100


def test_idle_connections_and_half_requests_leave_the_server_alive(upstream, data_dir):
    """Health, the page and a turn, each on a new connection."""
    with LocalServer(settings(data_dir, upstream.url)) as running, contextlib.ExitStack() as open_sockets:
        address = urlsplit(running.url)
        for number in range(IDLE + HALF):
            sock = open_sockets.enter_context(socket.create_connection((address.hostname, address.port), 60))
            if number >= IDLE:
                sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        assert httpx.get(f"{running.url}/health", timeout=60).status_code == 200
        assert httpx.get(f"{running.url}/", timeout=60).status_code == 200
        reply = say(running.url, [{"role": "user", "content": "Hello."}], chat_id="tale")
        assert (reply.status, reply.text) == (200, upstream.last["answer"])
