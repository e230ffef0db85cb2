"""The way to an upstream: places, their order, who gives way, and when another try is made."""

import itertools
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
from conftest import REAL_PAUSES
from fakes import LocalServer, branch_texts, figure, hang_up_later, say, settings, wait_until
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

import persona_memory as pm

TIMEOUT = 60


class Crowd:
    """Calls at a gate, each in a thread of its own; `inside` and `entered` say who is at the upstream."""

    def __init__(self, gate: pm.Gate):
        self.gate = gate
        self.entered: list[str] = []
        self.gave_up: list[str] = []
        self.inside: set[str] = set()
        self.most = 0
        self.changed = threading.Condition()
        self.leave: dict[str, threading.Event] = {}
        self.calls: dict[str, pm.Call] = {}

    def send(self, name: str, background: bool = False) -> pm.Call:
        """Sends a call to the gate; it stays at the upstream until `let_go`, or until it is cancelled."""
        call = self.calls[name] = pm.Call(background=background)
        self.leave[name] = threading.Event()
        call.when_cancelled(self.leave[name].set)
        threading.Thread(target=self._pass, args=(name, call), daemon=True).start()
        wait_until(lambda: self.arrived(name, call), f"{name} at the gate", 20)
        return call

    def arrived(self, name: str, call: pm.Call) -> bool:
        """Whether a call waits at the gate, or is already past it."""
        return any(call is ticket[2] for ticket in self.gate._waiting) or name in [*self.entered, *self.gave_up]

    def _pass(self, name: str, call: pm.Call):
        try:
            with self.gate.slot(call):
                with self.changed:
                    self.entered.append(name)
                    self.inside.add(name)
                    self.most = max(self.most, len(self.inside))
                    self.changed.notify_all()
                self.leave[name].wait(TIMEOUT)
                with self.changed:
                    self.inside.discard(name)
        except pm.ClientGone:
            self.gave_up.append(name)
        with self.changed:
            self.changed.notify_all()

    def let_go(self, name: str):
        """Ends a call."""
        self.leave[name].set()

    def wait_for(self, condition):
        """Waits until a condition holds."""
        with self.changed:
            assert self.changed.wait_for(condition, TIMEOUT), (self.entered, self.inside)


def crowd(limit: int, single: bool = False) -> Crowd:
    """A gate with nobody at it yet."""
    return Crowd(pm.Gate(limit, pm.Metrics(), single))


def test_calls_go_in_the_order_in_which_they_came():
    """One place: each goes when the one before it has left."""
    there = crowd(1)
    for name in "abcde":
        there.send(name)
    for name in "abcde":
        there.wait_for(lambda name=name: there.inside == {name})
        there.let_go(name)
    there.wait_for(lambda: not there.inside)
    assert there.entered == list("abcde")


def test_a_turn_goes_before_a_background_call_that_came_earlier():
    """The background waits until nobody else does."""
    there = crowd(1)
    there.send("turn")
    there.send("summary", background=True)
    there.send("later turn")
    there.let_go("turn")
    there.wait_for(lambda: there.inside == {"later turn"})
    there.let_go("later turn")
    there.wait_for(lambda: there.inside == {"summary"})
    there.let_go("summary")


def test_a_background_call_in_the_last_place_gives_way():
    """A turn never waits for it: it is cancelled, and its place is free."""
    there = crowd(2)
    summary = there.send("summary", background=True)
    there.send("turn")
    assert not summary.cancelled
    there.send("second turn")
    there.wait_for(lambda: there.inside == {"turn", "second turn"})
    assert summary.cancelled


def test_a_background_call_has_a_server_on_this_machine_only_while_it_is_idle():
    """Such a server works for one at a time: a turn that comes has it at once."""
    there = crowd(5, single=True)
    summary = there.send("summary", background=True)
    there.wait_for(lambda: there.inside == {"summary"})
    there.send("turn")
    there.wait_for(lambda: there.inside == {"turn"})
    assert summary.cancelled
    there.send("next summary", background=True)
    assert there.inside == {"turn"}
    there.let_go("turn")
    there.wait_for(lambda: there.inside == {"next summary"})


def test_who_leaves_the_queue_frees_the_place():
    """Neither the one behind nor the figures wait for one that has gone."""
    there = crowd(1)
    for name in ("first", "leaver", "last"):
        there.send(name)
    there.calls["leaver"].cancel()
    there.wait_for(lambda: there.gave_up == ["leaver"])
    assert b"persona_memory_upstream_queued 1.0" in there.gate.metrics.text()
    there.let_go("first")
    there.wait_for(lambda: there.inside == {"last"})
    assert there.entered == ["first", "last"]


@effort(max_examples=25)  # each starts threads
@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_never_more_than_the_limit_and_everybody_ends(limit, arrivals):
    """Whoever comes and leaves in whatever order: the limit holds, each call gets its place or gives up."""
    there = crowd(limit)
    for number, (background, leaves) in enumerate(arrivals):
        call = there.send(str(number), background)
        if leaves:
            call.cancel()
    for name in there.calls:
        there.let_go(name)
    there.wait_for(lambda: len(there.entered) + len(there.gave_up) >= len(arrivals) and not there.inside)
    assert there.most <= limit
    wait_until(lambda: b"upstream_in_flight 0.0" in there.gate.metrics.text(), "an empty gate", 20)


# ---------------------------------------------------------------------------- through the program


@pytest.mark.parametrize("stream", [False, True])
def test_thirty_requests_against_a_limit_of_five(upstream, data_dir, stream):
    """Never more than five at the upstream, all answered, each with its own answer."""
    seen, lock, changed = [], threading.Lock(), threading.Condition()
    inside = set()

    def reply(body):
        text = body["messages"][-1]["content"]
        with changed:
            inside.add(text)
            changed.notify_all()
            changed.wait_for(lambda: len(inside) == 5 or len(seen) >= 25, TIMEOUT)  # a full house, while there are many
        with lock:
            seen.append(len(inside))
        with changed:
            inside.discard(text)
            changed.notify_all()
        return f"answer to {text}"

    upstream.steer(reply=reply)
    with LocalServer(settings(data_dir, upstream.url)) as running, ThreadPoolExecutor(30) as pool:
        texts = [f"chat {n} says hello" for n in range(30)]
        ask = lambda text: say(running.url, [{"role": "user", "content": text}], stream)  # noqa: E731
        replies = list(pool.map(ask, texts))
        figures = httpx.get(f"{running.url}/metrics", timeout=TIMEOUT).text
    assert [r.text for r in replies] == [f"answer to {text}" for text in texts]
    assert max(seen) == 5
    assert "persona_memory_upstream_in_flight 0.0" in figures
    assert 'persona_memory_requests_total{outcome="ok"} 30.0' in figures


def test_a_chats_own_requests_keep_their_order(upstream, data_dir):
    """Three requests of one chat wait behind a slow one, and reach the upstream in the order in which they came."""
    hold = threading.Event()
    upstream.steer(hold=hold)
    with LocalServer(settings(data_dir, upstream.url, upstream_limit=1)) as running, ThreadPoolExecutor(4) as pool:
        pool.submit(say, running.url, [{"role": "user", "content": "slow"}])
        upstream.wait_for_chats(1)
        for number in range(3):
            message = {"role": "user", "content": f"message {number}"}
            pool.submit(say, running.url, [message], chat_id="one")
            wait_until(lambda n=number: figure(running, "upstream_queued") == n + 1, f"message {number} in the queue")
        hold.set()
        chats = upstream.wait_for_chats(4)
    assert [c["body"]["messages"][-1]["content"] for c in chats] == ["slow", "message 0", "message 1", "message 2"]


def test_a_client_that_leaves_the_queue_is_never_asked_for(upstream, data_dir):
    """Its request does not reach the upstream; the one behind it does; its message is kept once."""
    hold = threading.Event()
    upstream.steer(hold=hold)
    with LocalServer(settings(data_dir, upstream.url, upstream_limit=1)) as running, ThreadPoolExecutor(4) as pool:
        pool.submit(say, running.url, [{"role": "user", "content": "slow"}])
        upstream.wait_for_chats(1)
        leaver = hang_up_later(running, {"messages": [{"role": "user", "content": "leaver"}], "chat_id": "gone"})
        wait_until(lambda: figure(running, "upstream_queued") == 1, "the leaver waiting")
        leaver.close()
        wait_until(lambda: figure(running, 'requests_total{outcome="client_gone"}') == 1, "the leaver's leave noticed")
        assert figure(running, "upstream_queued") == 0
        last = pool.submit(say, running.url, [{"role": "user", "content": "last"}])
        wait_until(lambda: figure(running, "upstream_queued") == 1, "the last one waiting")
        hold.set()
        assert last.result().status == 200
        assert branch_texts(running.url, "gone") == ["leaver"]
    assert [c["body"]["messages"][-1]["content"] for c in upstream.chats] == ["slow", "last"]


def test_a_waiting_stream_is_kept_alive(upstream, data_dir, monkeypatch):
    """Comments come while the request waits for its place, and then the answer."""
    monkeypatch.setattr(pm, "HEADER_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(pm, "KEEPALIVE_SECONDS", 0.05)
    hold = threading.Event()
    upstream.steer(hold=hold)
    with LocalServer(settings(data_dir, upstream.url, upstream_limit=1)) as running, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(say, running.url, [{"role": "user", "content": "slow"}])
        upstream.wait_for_chats(1)
        body = {"messages": [{"role": "user", "content": "waits"}], "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=TIMEOUT) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line) == ": keep-alive"
            assert len(upstream.chats) == 1
            hold.set()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert slow.result().status == 200
    assert upstream.last["answer"] in "".join(
        c["delta"].get("content", "") for line in rest[:-1] for c in json.loads(line[6:])["choices"]
    )


# ---------------------------------------------------------------------------- when to try again


def refusal(status=429, retry_after=None, **error) -> pm.UpstreamError:
    """An upstream's error."""
    return pm.UpstreamError(status, {"message": "no", **error}, retry_after)


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7.5s"}


@pytest.mark.parametrize(
    "error, passes",
    [
        (refusal(), True),
        (refusal(500), True),
        (refusal(502), True),
        (refusal(503), True),
        (refusal(504), True),
        (refusal(400), False),
        (refusal(401), False),
        (refusal(403), False),
        (refusal(404), False),
        (refusal(retry_after="3"), True),
        (refusal(retry_after="31"), False),
        (refusal(503, retry_after="31"), False),
        (refusal(details=[RETRY_INFO]), True),
        (refusal(details=[RETRY_INFO | {"retryDelay": "44s"}]), False),
        (refusal(details=[{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}, RETRY_INFO]), False),
        (refusal(message="Quota exceeded for metric x, limit: 0, model: y"), False),
        (refusal(message="Quota exceeded for metric x, limit: 20, model: y"), True),
        (refusal(message="Rate limit exceeded: free-models-per-day"), False),
        (refusal(code="insufficient_quota"), False),
        (pm.UpstreamUnavailable("refused"), True),
        (pm.UpstreamTimeout("silent"), False),
        (pm.NoReply("empty"), False),
        (pm.UnreadableAnswer("html"), False),
        (pm.ClientGone("gone"), False),
        (pm.InvalidRequest("odd"), False),
        (ValueError("a bug"), False),
    ],
    ids=repr,
)
def test_what_is_worth_another_try(error, passes):
    """Errors that pass by themselves, unless the upstream asks for more patience than a turn has."""
    assert pm.is_transient(error) is passes


@pytest.mark.parametrize(
    "error, seconds",
    [
        (refusal(), None),
        (refusal(retry_after="3"), 3),
        (refusal(retry_after="0.5"), 0.5),
        (refusal(retry_after="-1"), 0),
        (refusal(retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), 0),
        (refusal(retry_after="soon"), None),
        (refusal(details=[RETRY_INFO]), 7.5),
        (refusal(retry_after="2", details=[RETRY_INFO]), 2),
    ],
)
def test_the_delay_that_an_upstream_asks_for(error, seconds):
    """Seconds or a date in `Retry-After`, seconds in Google's RetryInfo."""
    assert pm.requested_delay(error) == seconds


class FakeClock(pm.Call):
    """A call whose pauses are noted instead of waited for."""

    def __init__(self):
        super().__init__()
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


def failing(errors):
    """Work that raises each of the errors once and then succeeds."""
    left = iter(errors)

    def work():
        for error in left:
            raise error
        return "done"

    return work


def test_pauses_grow_and_stay_within_the_time_in_which_a_stream_has_no_status_yet(monkeypatch):
    """Exponential with jitter, and in all shorter than the status of a stream waits."""
    for name, seconds in REAL_PAUSES.items():
        monkeypatch.setattr(pm, name, seconds)
    call, gate = FakeClock(), pm.Gate(1, pm.Metrics())
    with pytest.raises(pm.UpstreamError):
        gate.retry(call, failing([refusal(503)] * 9))
    assert len(call.pauses) == pm.ATTEMPTS - 1
    for number, pause in enumerate(call.pauses):
        base = pm.FIRST_PAUSE_SECONDS * 2**number
        assert base <= pause <= base + pm.PAUSE_JITTER_SECONDS
    assert sum(call.pauses) < pm.HEADER_GRACE_SECONDS


def test_the_asked_delay_is_waited():
    """No sooner than the upstream said."""
    call = FakeClock()
    assert pm.Gate(1, pm.Metrics()).retry(call, failing([refusal(retry_after="9")])) == "done"
    assert call.pauses == [9]


def test_a_client_that_leaves_during_a_pause_ends_the_tries(upstream, data_dir):
    """Nothing is asked for somebody who has gone."""
    upstream.steer(status=503, headers={"Retry-After": "25"})
    with LocalServer(settings(data_dir, upstream.url)) as running:
        leaver = hang_up_later(running, {"messages": [{"role": "user", "content": "x"}]})
        upstream.wait_for_chats(1)
        leaver.close()
        wait_until(lambda: figure(running, 'requests_total{outcome="client_gone"}') == 1, "the client's leave noticed")
        assert figure(running, "upstream_in_flight") == 0
    assert len(upstream.chats) == 1


def test_who_hangs_up_while_the_model_loads_is_not_kept_waiting():
    """A call that waits for a future ends as soon as it is cancelled; the future goes on."""
    call, loading = pm.Call(), Future()
    waiting = ThreadPoolExecutor(1).submit(call.result, loading)
    call.cancel()
    with pytest.raises(pm.ClientGone):
        waiting.result(TIMEOUT)
    loading.set_result("model")
    assert pm.Call().result(loading) == "model"


def test_an_answer_that_nobody_reads_waits_for_its_reader():
    """So many pieces and no more are held for a client that reads slowly; one that leaves ends it."""
    taken, call = itertools.count(), pm.Call()
    relay = pm.Relay((next(taken) for _ in range(10**6)), call, lambda: False)
    wait_until(lambda: relay._queue.full())
    assert [relay.next(TIMEOUT) for _ in range(3)] == [0, 1, 2]
    relay.close()
    assert next(taken) <= pm.MOST_RELAYED + 8


def test_errors_say_whether_there_is_a_use_in_trying_again(monkeypatch):
    """What was tried as often as it may be is no matter of another try; what was not, is the client's to decide."""
    monkeypatch.setattr(pm.Call, "sleep", lambda call, seconds: None)
    for error, retried in ((refusal(503), True), (refusal(400), False), (refusal(429, retry_after="90"), False)):
        with pytest.raises(pm.UpstreamError) as failure:
            pm.Gate(1, pm.Metrics()).retry(pm.Call(), failing([error] * 9))
        assert failure.value.retried is retried
