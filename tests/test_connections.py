"""Connections that ask nothing, or never finish asking, keep nobody else from being answered."""

import contextlib
import socket
import threading
from urllib.parse import urlsplit

import httpx
from fakes import LocalServer, say, settings, wait_until

import persona_memory as pm

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


def test_the_server_wakes_the_thread_that_has_waited_shortest(upstream, data_dir):
    """So that a few threads, not all, keep some RAM of what they did."""
    with LocalServer(settings(data_dir, upstream.url, embedder="/nonexistent"), ready=False) as running:
        assert type(running.server.task_dispatcher.queue_cv) is pm.LastWaiting
        assert len(running.server.task_dispatcher.threads) == pm.SERVER_THREADS
    condition, woken = pm.LastWaiting(), []

    def wait(number: int) -> None:
        """Notes who was woken."""
        with condition:
            condition.wait()
            woken.append(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(4)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda count=number + 1: len(condition._waiters) == count)
    for left in (3, 2):
        with condition:
            condition.notify()
        wait_until(lambda count=4 - left: len(woken) == count)
    with condition:
        condition.notify_all()
    for thread in threads:
        thread.join()
    assert woken[:2] == [3, 2] and sorted(woken) == [0, 1, 2, 3]
