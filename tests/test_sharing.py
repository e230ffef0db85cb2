"""Two programs on one data folder: what both write in turn is one chat, on one branch."""

import threading

import pytest
from fakes import settings

import persona_memory as pm

WRITERS, EACH = 4, 12


@pytest.fixture
def pair(data_dir, monkeypatch):
    """Two programs on one folder, each with its own connections and its own RAM."""
    monkeypatch.setattr(pm, "LOCK_SECONDS", 60.0)  # SQLite lets in whom it likes
    memories = [pm.PersonaMemory(settings(data_dir, "http://127.0.0.1:9/v1")) for _ in range(2)]
    yield memories
    for memory in memories:
        memory.close()


def at_once(*jobs):
    """Runs jobs in threads of their own; raises what the first of them raises."""
    failures = []

    def run(job):
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_appended_messages_of_two_programs_make_one_branch(pair):
    """Each message goes behind the newest, whoever wrote that."""
    pair[0].archive.append("tale", [{"role": "user", "content": "It begins."}])

    def writer(number: int):
        for n in range(EACH):
            message = {"role": "assistant", "content": f"Writer {number} says line {n}."}
            pair[number % 2].archive.append("tale", [message])

    at_once(*(lambda n=n: writer(n) for n in range(WRITERS)))
    for memory in pair:
        described = memory.describe("tale", mood=False)
        assert described["stored"] == described["branch_length"] == 1 + WRITERS * EACH


def test_turns_of_clients_that_keep_no_history_make_one_branch(pair):
    """The newest message alone, under an explicit id: it goes on where the chat stands."""

    def writer(number: int):
        memory = pair[number % 2]
        for n in range(EACH):
            body = {"messages": [{"role": "user", "content": f"Writer {number} asks line {n}."}]}
            request = pm.parse_request(body)
            with memory.archive.enter(request, "tale", pm.Deadline.after(60)):
                pass

    at_once(*(lambda n=n: writer(n) for n in range(WRITERS)))
    described = pair[0].describe("tale", mood=False)
    assert described["stored"] == described["branch_length"] == WRITERS * EACH


def test_what_was_not_written_is_not_remembered_either(pair):
    """A step that fails at its end leaves the chat as it stands on disk."""
    pair[0].archive.append("tale", [{"role": "user", "content": "It begins."}])
    with pair[0].registry.borrow("tale") as chat:
        with pytest.raises(pm.InvalidRequest), chat.lock, chat.store.transaction():
            chat.store.commit([pm.new_message(chat.store.head, "assistant", "Never said.")])
            raise pm.InvalidRequest("no")
        chat.store.catch_up()
        assert len(chat.tree.nodes) == 1
    pair[1].archive.append("tale", [{"role": "assistant", "content": "It goes on."}])
    assert pair[0].describe("tale", mood=False)["stored"] == 2
