"""What users make of messages: other words, pins, forgetting, and taking all of that back."""

import httpx
import hypothesis
import hypothesis.strategies as st
import pytest
from chats import open_chat
from fakes import LocalServer, branch_texts, say, settings
from hypothesis import given

import persona_memory as pm

PERSONA = {"role": "system", "content": "You are Mira, keeper of the light."}
TALK = [
    ("user", "My brother Tomas sold the mule in Ostrava."),
    ("assistant", "He always loved a bargain more than an animal."),
    ("user", "The red key opens the crypt below the chapel."),
    ("assistant", "Then keep it away from the abbot."),
]
FILLER = [
    ("assistant" if n % 2 else "user", f"Step {n}: we walk on through the wet grass and count the posts by the ferry.")
    for n in range(40)
]
HISTORY = [{"role": role, "content": content} for role, content in TALK + FILLER]
ASKED = "Who sold the mule in Ostrava?"


@pytest.fixture
def running(upstream, data_dir):
    """A proxy whose context holds the last part of the history."""
    with LocalServer(settings(data_dir, upstream.url, context=1024, no_guidance=True)) as server:
        yield server


def ask(running, upstream, text: str = ASKED, chat_id: str = "tale", shown=HISTORY) -> str:
    """The whole prompt of a turn, as one text."""
    say(running.url, [PERSONA, *shown, {"role": "user", "content": text}], stream=False, chat_id=chat_id)
    return "\n".join(m["content"] for m in upstream.last["body"]["messages"])


def call(running, method: str, path: str, body=None, chat_id: str = "tale") -> httpx.Response:
    """A call of the API on a chat."""
    return httpx.request(method, f"{running.url}/api/persona_memory/chats/{chat_id}/{path}", json=body, timeout=60)


def row_of(running, place: int) -> dict:
    """The message at a place of the current branch, as the API shows it."""
    return call(running, "GET", f"messages?offset={place}&limit=1").json()["messages"][0]


def change(running, place: int, **changes) -> dict:
    """Changes the message at a place; what the API says it is then."""
    answer = call(running, "PATCH", f"messages/{row_of(running, place)['id']}", changes)
    assert answer.status_code == 200, answer.text
    return answer.json()


def search(running, text: str) -> list[str]:
    """What is remembered of a text, best first."""
    return [m["content"] for m in call(running, "GET", f"search?q={text}&k=5").json()["memories"]]


def test_an_edit_changes_what_is_remembered_and_not_where_the_chat_goes_on(running, upstream):
    """The client goes on showing its own words, and is still on the same branch."""
    assert "Tomas sold the mule" in ask(running, upstream)
    row = change(running, 0, content="My cousin Berta sold the mule in Ostrava.")
    assert (row["edited"], row["original"]) == (True, TALK[0][1])
    prompt = ask(running, upstream)
    assert "Berta sold the mule" in prompt and "Tomas" not in prompt
    assert search(running, "mule")[0].startswith("My cousin Berta")
    assert len(branch_texts(running.url, "tale")) == len(HISTORY) + 1
    assert httpx.get(f"{running.url}/api/persona_memory/chats").json()[0]["branches"] == 1


def test_an_edit_can_be_taken_back(running, upstream):
    """Without content the client's words count again; so they do when they are put in their own place."""
    ask(running, upstream)
    change(running, 0, content="Nobody sold anything.")
    row = change(running, 0, content=None)
    assert (row["content"], row["edited"]) == (TALK[0][1], False) and "original" not in row
    assert "Tomas sold the mule" in ask(running, upstream)
    assert change(running, 0, content=TALK[0][1])["edited"] is False


def test_what_is_forgotten_is_neither_found_nor_recalled_until_it_is_remembered_again(running, upstream):
    """Other memories are as they were."""
    ask(running, upstream)
    gone = row_of(running, 0)
    assert call(running, "DELETE", f"messages/{gone['id']}").json()["forgotten"] is True
    assert "sold the mule in Ostrava." not in ask(running, upstream).replace(ASKED, "")
    assert TALK[0][1] not in search(running, "mule")
    assert "red key" in ask(running, upstream, "Which key opens the crypt below the chapel?")
    change(running, 0, forgotten=False)
    assert "Tomas sold the mule" in ask(running, upstream)


def test_a_forgotten_message_keeps_its_place_in_restored_history(running, upstream):
    """The roles go on alternating where the store fills in what the client has dropped."""
    ask(running, upstream)
    change(running, len(HISTORY) - 4, forgotten=True)
    ask(running, upstream, shown=HISTORY[-2:])
    restored = [m for m in upstream.last["body"]["messages"] if m["role"] != "system"]
    assert restored[-5]["content"] == pm.FORGOTTEN and HISTORY[-4]["content"] not in str(restored)
    assert all(a["role"] != b["role"] for a, b in zip(restored, restored[1:], strict=False))


def test_what_the_client_shows_is_never_changed(running, upstream):
    """Edited and forgotten messages stand in the prompt in the client's words while the client shows them."""
    ask(running, upstream)
    newest = len(HISTORY) - 1
    change(running, newest, content="Something else.", forgotten=True)
    assert HISTORY[newest]["content"] in ask(running, upstream)


def test_a_pinned_message_is_told_in_every_prompt_that_does_not_show_it(running, upstream):
    """Once, with the story, whatever is asked."""
    assert "red key" not in ask(running, upstream, "Nice weather.")
    assert change(running, 2, pinned=True)["pinned"] is True
    for text in ("Nice weather.", "Which key opens the crypt below the chapel?"):
        prompt = ask(running, upstream, text)
        assert prompt.count("The red key opens the crypt") == 1
        assert prompt.index("The red key") < prompt.index(pm.ENGLISH.end_of_story)
    told = about(running)
    assert [row["index"] for row in told["pinned"]] == [2] and told["persona"] == PERSONA["content"]
    change(running, 2, pinned=False)
    assert "red key" not in ask(running, upstream, "Nice weather.")


def test_a_pinned_message_that_the_prompt_shows_is_not_told_twice(running, upstream):
    """It comes in when it leaves the history."""
    ask(running, upstream)
    change(running, len(HISTORY) - 1, pinned=True)
    assert ask(running, upstream).count(HISTORY[-1]["content"]) == 1


def test_marks_survive_a_restart_and_the_clients_next_request(upstream, data_dir):
    """And a change of letters that alignment does not see: white space, or the speaker's name."""
    given = settings(data_dir, upstream.url, context=1024, no_guidance=True)
    with LocalServer(given) as server:
        ask(server, upstream)
        change(server, 0, content="My cousin Berta sold the mule.", pinned=True)
    padded = [{**HISTORY[0], "content": HISTORY[0]["content"] + "\n"}, *HISTORY[1:]]
    with LocalServer(given) as server:
        assert "Berta" in ask(server, upstream, shown=padded)
        row = row_of(server, 0)
        assert (row["content"], row["pinned"]) == ("My cousin Berta sold the mule.", True)
        assert row["original"] == padded[0]["content"]


def with_letter_changed(place: int) -> list[dict]:
    """The history with one letter of a message changed."""
    return [{**m, "content": m["content"] + ("!" if n == place else "")} for n, m in enumerate(HISTORY)]


def test_marks_hold_on_a_branch_that_an_edit_above_them_makes(running, upstream):
    """Each later message then hangs under another one; what was said of its words stays."""
    ask(running, upstream)
    change(running, 2, pinned=True)
    change(running, 3, forgotten=True)
    change(running, 4, content="The ferry sank at noon.")
    shown = with_letter_changed(1)
    prompt = ask(running, upstream, "Then keep it away from whom?", shown=shown)
    assert "The red key opens the crypt" in prompt and "away from the abbot" not in prompt
    rows = [row_of(running, place) for place in (2, 3, 4)]
    assert [row["content"] for row in rows] == [TALK[2][1], TALK[3][1], "The ferry sank at noon."]
    assert [(row["pinned"], row["forgotten"], row["edited"]) for row in rows] == [
        (True, False, False), (False, True, False), (False, False, True)]  # fmt: skip
    assert TALK[3][1] not in search(running, "keep away abbot")
    change(running, 3, forgotten=False)
    assert TALK[3][1] in search(running, "keep away abbot")
    assert "away from the abbot" in ask(running, upstream, "Then keep it away from whom?")


def test_words_that_stand_twice_have_one_mark_and_are_told_once(running, upstream):
    """Wherever they stand, also where the client says them again later."""
    again = {"role": "user", "content": TALK[2][1]}
    shown = [*HISTORY[:6], again, *HISTORY[7:]]
    ask(running, upstream, shown=shown)
    change(running, 2, pinned=True)
    assert row_of(running, 6)["pinned"] is True
    prompt = ask(running, upstream, "Which key opens the crypt below the chapel?", shown=shown)
    assert prompt.count("The red key opens the crypt") == 1
    change(running, 6, pinned=False, forgotten=True)
    assert "The red key" not in ask(running, upstream, "Which key opens the crypt?", shown=shown)
    later = [*shown, {"role": "assistant", "content": "Well."}, again, {"role": "assistant", "content": "So it is."}]
    ask(running, upstream, "Which key?", shown=later)
    assert row_of(running, len(later) - 2)["forgotten"] is True


def test_a_mark_is_one_speakers(data_dir):
    """Two may say the same; a client that gives no names means either."""
    store = pm.ChatStore(data_dir / "chat")
    mira, tom, nobody = (pm.replace(pm.new_message(pm.ROOT, "assistant", "Yes.", n)) for n in ("Mira", "Tom", None))
    below = [pm.new_message(mira.id, m.role, f"Yes.{' ' * n}", m.name) for n, m in enumerate((tom,))]
    store.commit([mira, *below], {"chat_id": "x"})
    store.commit(marked=[pm.with_mark(mira, pm.Mark(forgotten=True))])
    assert [m.forgotten for m in store.read([mira.id, below[0].id])] == [True, False]
    marks = store.marks[mira.digest]
    assert pm.mark_for(marks, nobody) == pm.Mark(forgotten=True) and pm.mark_for(marks, tom) is None
    store.commit(marked=[pm.with_mark(nobody, pm.Mark())])
    assert not store.read([mira.id])[0].forgotten
    store.close()


TEXTS, NAMES = ("ok", "The mule is sold.", "The red key."), (None, "Mira", "Tom")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(0, 9), st.sampled_from(TEXTS), st.sampled_from(NAMES)),
        st.tuples(st.just("mark"), st.integers(0, 9), st.sampled_from([pm.Mark(), pm.Mark(True), pm.Mark(False, True),
                                                                       pm.Mark(content="Other words.")])),
        st.tuples(st.just("reopen")),
    ),
    max_size=30,
)  # fmt: skip


@hypothesis.settings(max_examples=60)
@given(steps=STEPS)
def test_words_have_one_mark_on_all_branches_and_in_all_processes(tmp_path_factory, steps):
    """Whatever is said and marked in whatever order, by two processes in turn: the newest mark of a speaker's words
    holds for each message of these words, in RAM and on disk."""
    folder = tmp_path_factory.mktemp("store") / "chat"
    stores, said, newest = [pm.ChatStore(folder) for _ in range(2)], [pm.ROOT], {}
    stores[0].commit(info={"chat_id": "tale"})
    for number, (step, *what) in enumerate(steps):
        store = stores[number % 2]
        store.catch_up()
        if step == "say":
            place, text, name = what
            message = pm.new_message(said[place % len(said)], "user", text, name)
            if message.id not in store.tree.nodes:
                store.commit([message])
                said.append(message.id)
        elif step == "mark" and len(said) > 1:
            place, mark = what
            (message,) = store.read([said[1:][place % (len(said) - 1)]])
            store.commit(marked=[pm.with_mark(message, mark)])
            others = [key for key in newest if key[0] == message.digest]
            for _, name in others if not message.named else [k for k in others if k[1] in ("", message.named)]:
                del newest[message.digest, name]
            newest[message.digest, message.named] = mark
        elif step == "reopen":
            store.close()
            stores[number % 2] = pm.ChatStore(folder)
    for store in stores:
        store.catch_up()
        for message in store.read(said[1:]):
            exact = newest.get((message.digest, message.named))
            near = [
                m for (digest, name), m in newest.items() if digest == message.digest and not (name and message.named)
            ]
            assert message.mark == exact if exact else message.mark in (near or [pm.Mark()])
            node = store.tree.nodes[message.id]
            assert (node.pinned, node.forgotten) == (message.pinned, message.forgotten)
            assert (message.id in store.tree.marked) == (message.mark != pm.Mark())
        store.close()


def test_a_branch_a_copy_and_an_import_take_marks_along(running, upstream):
    """And what the chat says of the words already stays."""
    ask(running, upstream)
    change(running, 0, forgotten=True)
    copy = {"role": "system", "content": PERSONA["content"]}
    body = {"chat_id": "branch", "persona_memory": {"parent_chat_id": "tale"}}
    say(running.url, [copy, *HISTORY[:-2], {"role": "user", "content": ASKED}], stream=False, **body)
    kept = call(running, "GET", "messages?limit=1", chat_id="branch").json()["messages"][0]
    assert kept["forgotten"] is True
    whole = call(running, "GET", "export").json()
    assert httpx.request("DELETE", f"{running.url}/api/persona_memory/chats/tale", timeout=60).status_code == 200
    ask(running, upstream)
    change(running, 2, forgotten=True)
    change(running, 2, forgotten=False, pinned=True)
    whole["messages"][2]["forgotten"] = True
    answer = httpx.post(f"{running.url}/api/persona_memory/import", json=whole, timeout=60)
    assert answer.status_code == 200, answer.text
    assert row_of(running, 0)["forgotten"] is True
    assert (row_of(running, 2)["forgotten"], row_of(running, 2)["pinned"]) == (False, True)


def test_a_branch_that_changes_a_message_takes_the_marks_below_it_along(running, upstream):
    """The words below the change come from the client, the marks from the chat that it was branched off."""
    ask(running, upstream)
    change(running, 3, forgotten=True)
    change(running, 2, pinned=True)
    body = {"chat_id": "other", "persona_memory": {"parent_chat_id": "tale"}}
    messages = [PERSONA, *with_letter_changed(1), {"role": "user", "content": "Keep what away from whom?"}]
    say(running.url, messages, stream=False, **body)
    rows = call(running, "GET", "messages?limit=4", chat_id="other").json()["messages"]
    assert [(row["pinned"], row["forgotten"]) for row in rows] == [(False, False)] * 2 + [(True, False), (False, True)]
    prompt = "\n".join(m["content"] for m in upstream.last["body"]["messages"])
    assert "The red key opens the crypt" in prompt and "away from the abbot" not in prompt


def test_another_process_on_the_same_folder_sees_the_change(upstream, data_dir):
    """The generation counter tells it to catch up."""
    given = settings(data_dir, upstream.url, context=1024, no_guidance=True)
    with LocalServer(given) as one, LocalServer(given) as other:
        ask(one, upstream)
        assert "Tomas" in ask(other, upstream)
        change(one, 0, content="My cousin Berta sold the mule in Ostrava.")
        assert "Berta" in ask(other, upstream)


def test_summaries_of_what_has_changed_are_told_anew(upstream, data_dir):
    """Without the forgotten words; a user's own words stay."""
    more = {"context": 2048, "budget": "10/50/20/20", "summary_every": 4}  # room for a story of many summaries
    given = settings(data_dir, upstream.url, no_guidance=True, **more)
    with LocalServer(given) as server:
        ask(server, upstream)
        settle(server)
        story = about(server)["story"]
        assert story[0]["start"] == 0
        own = call(server, "PATCH", f"story/{story[1]['id']}", {"text": "A user's own words."}).json()
        for place in range(4, 8):
            change(server, place, forgotten=True)
        change(server, 0, forgotten=True)
        assert story[0]["id"] not in [s["id"] for s in about(server)["story"]]
        ask(server, upstream, "And now?")
        settle(server)
        told = about(server)["story"]
        assert told[0]["start"] == 0 and "mule" not in told[0]["text"]
        assert own["text"] in [s["text"] for s in told]


def test_a_fact_follows_its_message():
    """It holds as long as its message is remembered in the words that it quotes."""
    fact = pm.Fact("f", "mule", "The mule is sold.", "sold the mule", "m", 0, 3)
    message = pm.Message("m", pm.ROOT, "user", "Tomas sold the mule.")
    assert pm.still_quotes(fact, message)
    assert not pm.still_quotes(fact, pm.with_mark(message, pm.Mark(content="Tomas kept the mule.")))
    assert not pm.still_quotes(fact, pm.replace(message, forgotten=True))


@pytest.mark.parametrize(
    "body",
    [{}, [], {"content": ""}, {"content": 7}, {"pinned": "yes"}, {"forgotten": None}, {"content": "x", "pinned": 1}],
    ids=str,
)
def test_nonsense_changes_nothing(running, upstream, body):
    """It is refused with a reason."""
    ask(running, upstream)
    row = row_of(running, 0)
    answer = call(running, "PATCH", f"messages/{row['id']}", body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert row_of(running, 0) == row


def test_only_what_counts_as_memory_can_be_changed(running, upstream):
    """No unknown message, and no reply that the client has not shown again."""
    ask(running, upstream)
    tree = open_chat(running, "tale").tree
    (unseen,) = tree.replies[next(i for i, n in tree.nodes.items() if n.depth == len(HISTORY))]
    for message in ("0" * 32, unseen):
        assert call(running, "PATCH", f"messages/{message}", {"pinned": True}).status_code == 404


def about(running) -> dict:
    """The chat as the API shows it."""
    return httpx.get(f"{running.url}/api/persona_memory/chats/tale", timeout=60).json()


def settle(running) -> None:
    """Wait until the summarizer has done all that is due."""
    running.server.memory.summarizer._thread.submit(int).result(60)
