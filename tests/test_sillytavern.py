"""What a SillyTavern user does, through the proxy: each action's prompt, and what is remembered of it afterwards."""

import itertools
from urllib.parse import quote

import httpx
import pytest
from fakes import API, LocalServer, Upstream, get, say, settings
from sillytavern import Character, Client, memories_in, without_memories

import persona_memory as pm

CONTEXT = 1024  # so small that twelve turns of small talk push what was said before them out of the history
HELENA = Character(
    "Helena",
    "Helena is the keeper of the Thornwick lighthouse, red-haired, always in a blue oilskin coat.",
    '*Helena lifts the lantern.* "You must be Robin. Come in, before the sea takes you."',
    personality="dry-humoured, patient, stubborn",
    examples=(
        ("Is it always this windy?", '"Only on days that end in y," *she says.*'),
        ("What do you keep here?", '"A light. And a cat who thinks he is the light."'),
    ),
)
BORIN = Character(
    "Borin",
    "Borin is a dwarf blacksmith of Emberhold who forges bells.",
    '*Borin sets down his hammer.* "What needs mending, Robin?"',
    personality="gruff, loyal",
    post_history="Stay gruff.",
)

SMALL_TALK = (
    "The rain drums on the roof while we carry one more basket of driftwood up the winding stairs to the stove.",
    "A fishing boat rounds the headland with its brown sails reefed and two gulls quarrelling above the mast.",
    "We play a slow game of cards at the table and nobody keeps count of who is winning or losing any more.",
    "The old clock in the hallway has stopped again, so somebody climbs on a chair and pushes the pendulum.",
    "There is fog over the harbour this morning and the bell buoy sounds closer than it could possibly be.",
    "Supper is barley soup with leeks, a heel of rye bread and the last of the hard cheese from the market.",
    "A letter came for the harbour master, sealed with green wax, and it lies unopened beside the inkwell.",
    "The tide is so low that the children walk out to the wreck and come back with their boots full of sand.",
)


def small_talk(number: int) -> str:
    """A message of about fifty tokens that says nothing worth remembering."""
    first, second = SMALL_TALK[number % len(SMALL_TALK)], SMALL_TALK[(number * 3 + 1) % len(SMALL_TALK)]
    return f"{first} {second} So passes hour {number}."


def chatter(chat: Client, turns: int, start: int = 0):
    """Talk for so many turns."""
    for number in range(start, start + turns):
        assert chat.send(small_talk(number)).status == 200


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program and its upstream."""
    data_dir = tmp_path_factory.mktemp("data")
    with Upstream() as fake, LocalServer(settings(data_dir, fake.url, context=CONTEXT)) as running:
        yield running, fake


@pytest.fixture
def upstream(program):
    """The recording upstream, well-behaved and with nothing recorded yet."""
    _, fake = program
    fake.reset()
    numbers = itertools.count(1)
    fake.steer(reply=lambda body: f"Helena nods and says that line {next(numbers)} is quite enough.")
    return fake


@pytest.fixture
def server(program, upstream):
    """The program without any chats."""
    running, _ = program
    for entry in shelf(running):
        answer = httpx.delete(f"{running.url}/api/persona_memory{chat_path(entry['chat_id'])}")
        assert answer.status_code == 200, answer.text
    return running


@pytest.fixture
def chat(server) -> Client:
    """A chat with Helena."""
    return Client(server.url, HELENA)


def answering(upstream, *texts):
    """Let the upstream's next replies be these, then go on as before."""
    usual = upstream.reply
    following = itertools.chain((lambda body, text=text: text for text in texts), itertools.repeat(usual))
    upstream.steer(reply=lambda body: next(following)(body))


def prompt(upstream) -> list[dict]:
    """The messages of the last prompt that the model got."""
    return upstream.last["body"]["messages"]


def text_of(messages: list[dict]) -> str:
    return "\n".join(message["content"] for message in messages)


def chat_path(chat_id: str) -> str:
    return f"/chats/{quote(chat_id, safe='')}"


def wait_for_vectors(server, chat_id: str):
    """A search waits until all messages are embedded, where a turn goes on without."""
    get(server, f"{API}{chat_path(chat_id)}/search?q=anything&k=1")


def ask(server, chat: Client, question: str):
    """Send a question when all messages are embedded."""
    wait_for_vectors(server, chat.answer.chat_id)
    answer = chat.send(question)
    assert answer.memory.startswith("recalled="), answer.memory
    return answer


def shelf(server) -> list[dict]:
    """The chats the program knows."""
    return get(server, f"{API}/chats")


def branch_of(server, chat_id: str) -> list[str]:
    """The texts of a chat's current branch."""
    messages = get(server, f"{API}{chat_path(chat_id)}/messages?limit=1000")["messages"]
    return [message["content"] for message in messages]


def remembered(server, chat: Client) -> list[str]:
    """The current branch without the newest reply, which is provisional until the client shows it."""
    texts = branch_of(server, chat.answer.chat_id)
    return texts[:-1] if texts[-1:] == [chat.answer.text] else texts


def shown(chat: Client) -> list[str]:
    """The chat's texts without the newest reply."""
    texts = [message.text for message in chat.chat]
    return texts[:-1] if chat.chat[-1].role == "assistant" else texts


# ---------------------------------------------------------------------------- plain turns


def test_short_chat_reaches_the_model_unchanged(chat, server, upstream):
    """While everything fits, the model gets the client's very messages and sampling settings."""
    for number in range(3):
        answer = chat.send(small_talk(number))
        sent = chat.body(chat.chat[:-1])
        assert answer.text == upstream.last["answer"]
        assert upstream.last["body"] == sent
    assert len(shelf(server)) == 1
    assert remembered(server, chat) == shown(chat)


def test_card_and_example_lines_stay_verbatim(chat, server, upstream):
    """The leading block, named example lines included, never changes, and is never recalled as a memory."""
    chat.send("My cat sleeps under the light.")
    chatter(chat, 12)
    ask(server, chat, "What do you keep here? A light, and a cat?")
    for request in upstream.chats:
        assert request["body"]["messages"][: len(chat.leading())] == chat.leading()
    assert "My cat sleeps" in memories_in(prompt(upstream))
    for question, answer in HELENA.examples:
        assert text_of(prompt(upstream)).count(answer) == 1
        assert question not in memories_in(prompt(upstream))


def test_trimmed_window_recalls_an_early_fact(server, upstream):
    """Message 3 is long gone from the client's window of ten when message 60 asks for it."""
    chat = Client(server.url, HELENA, window=10)
    chat.send("Good evening, Helena.")
    chat.send("My cat is called Miso and she only drinks goat milk.")
    assert chat.chat[3].text.startswith("My cat")
    chatter(chat, 28)
    assert "Miso" not in text_of(chat.body(chat.chat)["messages"])
    ask(server, chat, "Do you still know what my cat is called?")
    assert len(chat.chat) > 60
    assert "Miso" in memories_in(prompt(upstream))
    assert "recalled=" in chat.answer.memory
    assert remembered(server, chat) == shown(chat)
    assert len(shelf(server)) == 1


def test_history_comes_back_from_the_store(server, upstream):
    """Where the client's window is shorter than the history share, older messages fill it, in order."""
    chat = Client(server.url, HELENA, window=4)
    chatter(chat, 5)
    texts = [message["content"] for message in without_memories(prompt(upstream))]
    assert texts == [message["content"] for message in chat.leading()] + shown(chat)


def test_failed_turn_leaves_two_user_messages(chat, server, upstream):
    """An upstream error reaches the client; the user writes on, and both messages stand in the prompt and the store."""
    chatter(chat, 2)
    upstream.steer(status=500, error="the model fell over")
    failed = chat.send("Did you bring the map of the harbour?")
    assert failed.status == 500
    assert "the model fell over" in failed.error
    upstream.steer(status=200, error=None)
    chat.send("Hello? Are you still there?")
    assert [message["content"] for message in prompt(upstream)[-2:]] == [
        "Did you bring the map of the harbour?",
        "Hello? Are you still there?",
    ]
    assert remembered(server, chat) == shown(chat)
    assert len(shelf(server)) == 1


def test_stopped_reply_stays_as_far_as_it_came(chat, server, upstream):
    """Stop keeps the partial reply in the chat; the rest of what the model wrote is never seen again."""
    chatter(chat, 1)
    answering(upstream, "The key hangs behind the stove, said the ferryman with the walrus moustache.")
    chat.send("Where is the key?", stop_after=6)
    assert chat.chat[-1].text == "The key hangs behind the stove,"
    chatter(chat, 12, start=1)
    ask(server, chat, "Where is the key, behind the stove, said the ferryman?")
    assert "The key hangs behind the stove," in memories_in(prompt(upstream))
    assert all("walrus" not in text_of(request["body"]["messages"]) for request in upstream.chats)
    assert remembered(server, chat) == shown(chat)


# ---------------------------------------------------------------------------- swipes, edits, deletions, branches


def test_swipe_and_regenerate_repeat_the_prompt(chat, server, upstream):
    """A first send, a swipe and a regenerate are the same request: the model gets the same bytes, memories included."""
    chat.send("My cat is called Miso.")
    chatter(chat, 12)
    ask(server, chat, "What is my cat called?")
    chat.swipe()
    chat.swipe()
    chat.regenerate()
    first, *others = [request["raw"] for request in upstream.chats[-4:]]
    assert "Miso" in memories_in(prompt(upstream))
    assert others == [first] * 3


def test_rejected_swipe_never_comes_back(chat, server, upstream):
    """What the user swiped away is in no later prompt, however much the user asks for it."""
    answering(upstream, "The treasure lies under the walrus statue.", "The treasure lies under the copper kettle.")
    chat.send("Where is the treasure?")
    chat.swipe()
    chatter(chat, 12)
    ask(server, chat, "Is the treasure under the walrus statue, or where does it lie?")
    assert all("walrus statue." not in text_of(request["body"]["messages"]) for request in upstream.chats)
    assert "copper kettle" in memories_in(prompt(upstream))
    assert remembered(server, chat) == shown(chat)


def test_restored_swipe_brings_its_memory_back(chat, server, upstream):
    """Going back to an old swipe recalls what it said, and no longer what the swipe beside it said."""
    answering(upstream, "The treasure lies under the walrus statue.", "The treasure lies under the copper kettle.")
    chat.send("Where is the treasure?")
    chat.swipe()
    chatter(chat, 12)
    chat.delete(3)
    chat.swipe_back(0)
    chatter(chat, 12, start=100)
    ask(server, chat, "Where does the treasure lie?")
    assert "walrus statue" in memories_in(prompt(upstream))
    assert "copper kettle" not in text_of(prompt(upstream))
    assert "So passes hour 3." not in text_of(prompt(upstream))
    assert remembered(server, chat) == shown(chat)


def test_edited_message_counts_as_it_is_now(chat, server, upstream):
    """After an edit only the new wording is recalled."""
    chat.send("I live in Larkspur Lane and I am a clockmaker by trade.")
    chatter(chat, 3)
    chat.edit(1, "I live in Heather Row and I am a bookbinder by trade.")
    before = len(upstream.chats)
    chatter(chat, 12, start=3)
    ask(server, chat, "Do you recall my trade and where I live?")
    later = [text_of(request["body"]["messages"]) for request in upstream.chats[before:]]
    assert all("clockmaker" not in text and "Larkspur" not in text for text in later)
    assert "bookbinder" in memories_in(prompt(upstream))
    assert remembered(server, chat) == shown(chat)


def test_edit_at_the_edge_of_a_trimmed_window(server, upstream):
    """An edit of the oldest message that the client still showed holds after that one has left its window, too."""
    chat = Client(server.url, HELENA, window=5)
    chat.send("I live in Larkspur Lane and I am a clockmaker by trade.")
    chatter(chat, 1)
    chat.edit(1, "I live in Heather Row and I am a bookbinder by trade.")
    before = len(upstream.chats)
    chatter(chat, 12, start=1)
    answer = ask(server, chat, "Do you remember what I do for a living in Heather Row?")
    later = [text_of(request["body"]["messages"]) for request in upstream.chats[before:]]
    assert chat.chat[1].text in text_of(chat.sent[2]["messages"])
    assert all("clockmaker" not in text for text in later)
    found = get(server, f"{API}/chats/{answer.chat_id}/search?q=What+is+my+trade%3F&k=3")["memories"]
    assert any("bookbinder" in m["content"] for m in found)
    assert not any("clockmaker" in m["content"] for m in found)
    assert remembered(server, chat) == shown(chat)


def test_deleted_messages_are_forgotten(chat, server, upstream):
    """What the user deleted is in no later prompt."""
    chatter(chat, 3)
    chat.send("My sister Philippa drowned in the millpond.")
    chat.delete(len(chat.chat) - 2)
    before = len(upstream.chats)
    chatter(chat, 12, start=3)
    ask(server, chat, "Did I tell you about my sister Philippa and the millpond? No?")
    later = [text_of(without_newest(request)) for request in upstream.chats[before:]]
    assert all("Philippa" not in text for text in later)
    assert remembered(server, chat) == shown(chat)
    assert len(shelf(server)) == 1


def without_newest(request: dict) -> list[dict]:
    """A prompt without its newest user message's own last line."""
    messages = request["body"]["messages"]
    newest = max(number for number, message in enumerate(messages) if message["role"] == "user")
    above = memories_in(messages[newest : newest + 1])
    return [*messages[:newest], {"role": "user", "content": above}, *messages[newest + 1 :]]


def test_checkpoint_and_back(chat, server, upstream):
    """A checkpoint knows what came before it and not what the main chat said since, and the other way round."""
    chat.send("We hid the map inside the grandfather clock.")
    main, side = chat, chat.branch(2)
    main.send("I will marry the harbour master Osgood in spring.")
    side.send("I will marry the smuggler Zenobia in spring.")
    for number in range(12):
        main.send(small_talk(number))
        side.send(small_talk(number))
    for player, own, other in ((main, "Osgood", "Zenobia"), (side, "Zenobia", "Osgood"), (main, "Osgood", "Zenobia")):
        ask(server, player, "Whom will I marry in spring?")
        assert_recalls(upstream, own, without=other)
        ask(server, player, "Where did we hide the map?")
        assert_recalls(upstream, "grandfather clock", without=other)
    assert remembered(server, main) == shown(main)


def assert_recalls(upstream, *texts: str, without: str):
    for text in texts:
        assert text in memories_in(prompt(upstream)), text_of(prompt(upstream))
    assert without not in text_of(prompt(upstream))


# ---------------------------------------------------------------------------- continue, impersonate, quiet and raw


def test_continue_by_system_message(chat, server, upstream):
    """The nudge stays last; afterwards old and new text are one message, and the old wording none of its own."""
    answering(upstream, "Once there was a lamp", "that burned with a green flame.")
    chat.send("Tell me the tale.")
    chat.continue_()
    assert prompt(upstream)[-1]["content"].startswith("[Continue the following message.")
    assert prompt(upstream)[-2] == {"role": "assistant", "content": "Once there was a lamp"}
    chatter(chat, 1)
    assert chat.chat[2].text == "Once there was a lamp that burned with a green flame."
    assert remembered(server, chat) == shown(chat)
    assert text_of(prompt(upstream)).count("Once there was a lamp") == 1
    assert len(shelf(server)) == 1


def test_continue_by_trailing_assistant(chat, server, upstream):
    """A history that ends with the character's message reaches the model that way, untouched and last."""
    chat.send("My cat is called Miso.")
    chatter(chat, 12)
    answering(upstream, "Miso, if I am", "not mistaken.")
    ask(server, chat, "What is my cat called?")
    chat.continue_(nudge=False)
    assert prompt(upstream)[-1] == {"role": "assistant", "content": "Miso, if I am"}
    assert prompt(upstream)[-2]["content"].endswith("What is my cat called?")
    assert "Miso" in memories_in(prompt(upstream))
    chatter(chat, 1, start=14)
    assert remembered(server, chat) == shown(chat)


def test_impersonation_is_no_memory(chat, server, upstream):
    """The instruction stays last; the answer went to the input box and is remembered only if the user sends it."""
    chat.send("My cat is called Miso.")
    answering(upstream, "I confess that I broke the walrus vase.")
    assert chat.impersonate().text == "I confess that I broke the walrus vase."
    assert prompt(upstream)[-1]["content"].startswith("[Write your next reply from the point of view of Robin")
    chatter(chat, 12)
    ask(server, chat, "Who broke the vase?")
    assert all("walrus" not in text_of(request["body"]["messages"]) for request in upstream.chats)
    assert remembered(server, chat) == shown(chat)


def test_quiet_prompt_is_no_memory(chat, server, upstream):
    """A summary asked for behind the scenes gets the chat, its instruction last; its answer is never remembered."""
    chat.send("My cat is called Miso.")
    chatter(chat, 2)
    answering(upstream, "In short: a walrus stole the cat.")
    assert chat.quiet("Summarise the story so far in one sentence.").text == "In short: a walrus stole the cat."
    assert prompt(upstream)[-1] == {"role": "system", "content": "Summarise the story so far in one sentence."}
    assert upstream.last["body"]["stream"] is False
    chatter(chat, 12, start=2)
    ask(server, chat, "Who stole the cat? Summarise the story so far.")
    assert all("walrus" not in text_of(request["body"]["messages"]) for request in upstream.chats)
    assert all("in one sentence" not in text for text in branch_of(server, chat.answer.chat_id))
    assert remembered(server, chat) == shown(chat)
    assert len(shelf(server)) == 1


def test_raw_prompt_has_nothing_of_the_chat(chat, server, upstream):
    """A raw prompt reaches the model verbatim, and the chat goes on as if it had not been."""
    chat.send("My cat is called Miso.")
    chatter(chat, 12)
    chat.raw("Name a colour that goes well with walrus grey.", system="Answer with one word.")
    assert prompt(upstream) == [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": "Name a colour that goes well with walrus grey."},
    ]
    chat.raw("What is my cat called?")
    assert prompt(upstream) == [{"role": "user", "content": "What is my cat called?"}]
    ask(server, chat, "What is my cat called, and what colour goes with walrus?")
    assert "Miso" in memories_in(prompt(upstream))
    assert text_of(prompt(upstream)).count("walrus") == 1
    assert remembered(server, chat) == shown(chat)


# ---------------------------------------------------------------------------- the client's own system messages


def test_author_note_keeps_its_depth(server, upstream):
    """The note stands exactly once, with the same number of messages after it, also when history is cut or refilled."""
    for window in (None, 8):
        chat = Client(server.url, HELENA, note="[Author's note: it is always raining.]", note_depth=4, window=window)
        for number in range(20):
            chat.send(small_talk(number + 50 * bool(window)))
            messages = without_memories(prompt(upstream))
            notes = [index for index, message in enumerate(messages) if message["content"] == chat.note]
            assert len(notes) == 1
            if number > 2:
                assert len(messages) - 1 - notes[0] == 4
        assert len(remembered(server, chat)) == len(shown(chat)) == 40


def test_post_history_instruction_stays_last(server, upstream):
    """It follows the newest user message; the memories stand in a system message of their own before that message."""
    chat = Client(server.url, BORIN)
    chat.send("My bell is cracked and it is called Old Tom.")
    chatter(chat, 12)
    ask(server, chat, "What is my bell called?")
    memories, newest, last = prompt(upstream)[-3:]
    assert last == {"role": "system", "content": "Stay gruff."}
    assert newest == {"role": "user", "content": "What is my bell called?"}
    assert memories["role"] == "system"
    assert "Old Tom" in memories_in([memories])
    assert memories["content"].startswith("[Earlier in this chat")
    assert "Stay gruff." not in branch_of(server, chat.answer.chat_id)


def test_narrator_line_stays_where_it_is(chat, server, upstream):
    """A `/sys` line is a system message between the chat's messages: it keeps its place while its neighbours show."""
    chatter(chat, 1)
    chat.chat[-1].role, narrated = "system", "The forge door bursts open."
    chat.chat[-1].text = narrated
    for number in range(1, 4):
        chat.send(small_talk(number))
        texts = [message["content"] for message in without_memories(prompt(upstream))]
        assert texts == [message["content"] for message in chat.leading()] + shown(chat)
    assert len(shelf(server)) == 1


# ---------------------------------------------------------------------------- groups, strict mode, several characters


def test_group_is_one_chat(server, upstream):
    """Members answer in turn with cards of their own; it stays one chat, whose memories all members share."""
    chat = Client(server.url, HELENA, group=("Helena", "Borin"))
    chat.send("Hello both of you. The password is marmalade.")
    for number in range(12):
        chat.reply(BORIN)
        assert prompt(upstream)[: len(chat.leading())] == chat.leading()
        chat.character = HELENA
        chat.send(small_talk(number))
        assert prompt(upstream)[: len(chat.leading())] == chat.leading()
    chat.character = BORIN
    ask(server, chat, "Borin, what was the password?")
    assert "marmalade" in memories_in(prompt(upstream))
    assert "Borin is a dwarf" in text_of(prompt(upstream))
    assert "Thornwick" not in text_of(prompt(upstream))
    assert len(shelf(server)) == 1
    assert len(remembered(server, chat)) == len(shown(chat))


@pytest.mark.parametrize("window", [None, 8, 9])
def test_strict_roles_stay_strict(server, upstream, window):
    """Without any system message: the card verbatim, roles alternating, no message introduced.

    With an even window a reply follows the card's message; with an odd one the oldest user message shown is merged
    into it, and told apart from it here, so that the beginning does not change at every turn.
    """
    chat = Client(server.url, HELENA, strict=True, window=window)
    chat.send("My cat is called Miso.")
    chatter(chat, 12)
    ask(server, chat, "What is my cat called?")
    for sent, request in zip(chat.sent, upstream.chats, strict=True):
        messages = request["body"]["messages"]
        card, marker, _ = sent["messages"][0]["content"].partition("[Start a new Chat]")
        assert messages[0]["role"] == "user" and messages[0]["content"].startswith(card + marker)
        assert [message["role"] for message in messages] == (["user", "assistant"] * len(messages))[: len(messages)]
        assert "Thornwick" not in text_of(messages[1:])
    assert "Miso" in memories_in(prompt(upstream)[-1:])
    assert prompt(upstream)[-1]["content"].endswith("What is my cat called?")
    assert len(shelf(server)) == 1


def test_strict_mode_merges_two_user_messages(server, upstream):
    """After a failed turn the two user messages arrive as one; it is still the same chat."""
    chat = Client(server.url, HELENA, strict=True)
    chatter(chat, 3)
    upstream.steer(status=503)
    chat.send("Did you hear that?")
    upstream.steer(status=200)
    chat.send("Hello?")
    assert prompt(upstream)[-1] == {"role": "user", "content": "Did you hear that?\n\nHello?"}
    chatter(chat, 2, start=3)
    assert text_of(prompt(upstream)).count("Did you hear that?") == 1
    assert len(shelf(server)) == 1


def test_two_characters_do_not_mix(server, upstream):
    """The same user lines said to two characters in turn: each recalls only what it was told and said itself."""
    secrets = ("the walrus statue", "the copper kettle")
    chats = [Client(server.url, card, window=window) for card, window in ((HELENA, 8), (BORIN, 8))]
    for chat, secret in zip(chats, secrets, strict=True):
        answering(upstream, f"Then let us meet at {secret}.")
        chat.send("Where shall we meet?")
    for number in range(12):
        for chat in chats:
            chat.send(small_talk(number))
    for chat, own, other in zip(chats, secrets, reversed(secrets), strict=True):
        ask(server, chat, "Where did we want to meet?")
        assert_recalls(upstream, own, without=other)
        assert remembered(server, chat) == shown(chat)


def test_greeting_alone_starts_a_new_chat(server):
    """A second chat with the same character is a chat of its own, though it opens with the same greeting."""
    one, two = Client(server.url, HELENA), Client(server.url, HELENA)
    one.send("I am Robin and I mend clocks.")
    two.send("I am Wilma and I breed geese.")
    one.send("How late is it?")
    assert one.answer.chat_id != two.answer.chat_id
    assert len(shelf(server)) == 2


# ---------------------------------------------------------------------------- explicit chat ids

ID_PLACES = {
    "header": lambda chat_id: {"headers": {"X-Chat-Id": chat_id}},
    "chat_id": lambda chat_id: {"body": {"chat_id": chat_id}},
    "metadata": lambda chat_id: {"body": {"metadata": {"chat_id": chat_id}}},
    "user": lambda chat_id: {"body": {"user": chat_id}},
}


@pytest.mark.parametrize("place", ID_PLACES)
def test_explicit_id_keeps_chats_apart(server, upstream, place):
    """Two ids with the same opening are two chats; our own field is not sent on to the model."""
    one, two = (
        Client(server.url, HELENA, window=8, **ID_PLACES[place](chat_id)) for chat_id in ("chat alpha/1", "chat beta 2")
    )
    chatter(one, 1)
    one.send("My cat is called Miso.")
    chatter(two, 1)
    two.send("My dog is called Bruno.")
    for number in range(1, 13):
        one.send(small_talk(number))
        two.send(small_talk(number))
    question = "What is my cat or dog called?"
    ask(server, one, question)
    assert one.answer.chat_id == "chat alpha/1"
    assert_recalls(upstream, "Miso", without="Bruno")
    ask(server, two, question)
    assert two.answer.chat_id == "chat beta 2"
    assert_recalls(upstream, "Bruno", without="Miso")
    assert {entry["chat_id"] for entry in shelf(server)} == {"chat alpha/1", "chat beta 2"}
    assert "chat_id" not in upstream.last["body"]


def test_first_named_id_counts(server):
    """The header goes before `chat_id`, that before `metadata.chat_id`, that before a `user` that names a chat."""
    body = {"chat_id": "second", "metadata": {"chat_id": "third"}, "user": "chat-fourth"}
    assert Client(server.url, HELENA, headers={"X-Chat-Id": "first"}, body=body).send("Hello.").chat_id == "first"
    for expected in ("second", "third", "chat-fourth"):
        assert Client(server.url, HELENA, body=body).send("Hello.").chat_id == expected
        del body[next(iter(body))]


@pytest.mark.parametrize("value", ["{{chatId}}", "undefined", ""])
def test_unfilled_macro_is_no_id(server, upstream, value):
    """SillyTavern sends macros of its "include body" setting literally: such chats are told apart by their text."""
    one, two = (Client(server.url, HELENA, body={"chat_id": value}) for _ in range(2))
    one.send("I am Robin and I mend clocks.")
    two.send("I am Wilma and I breed geese.")
    assert one.answer.chat_id not in (value, "", None)
    two.send("Do I mend clocks or breed geese?")
    assert without_memories(prompt(upstream)) == prompt(upstream)
    assert [message["content"] for message in prompt(upstream)] == [
        message["content"] for message in two.leading()
    ] + shown(two)
    assert remembered(server, two) == shown(two)


def test_explicit_id_adopts_the_chat(server, upstream):
    """Turning ids on in the middle of a trimmed chat loses nothing: the id's chat begins with what was known."""
    chat = Client(server.url, HELENA, window=8)
    chat.send("My cat is called Miso.")
    chatter(chat, 12)
    chat.headers = {"X-Chat-Id": "Helena - 2026"}
    ask(server, chat, "What is my cat called?")
    assert chat.answer.chat_id == "Helena - 2026"
    assert "Miso" in memories_in(prompt(upstream))
    assert remembered(server, chat) == shown(chat)


def test_client_that_sends_only_its_newest_message(server, upstream):
    """With an id and no history each request appends; the chat's history and memories come from the store."""
    card = {"role": "system", "content": HELENA.description}

    def tell(text):
        return say(server.url, [card, {"role": "user", "content": text}], user="chat_123")

    first = tell("My cat is called Miso.")
    tell("Good night.")
    assert [message["content"] for message in prompt(upstream)] == [
        card["content"],
        "My cat is called Miso.",
        first.text,
        "Good night.",
    ]
    for number in range(12):
        assert tell(small_talk(number)).chat_id == "chat_123"
    wait_for_vectors(server, "chat_123")
    last = tell("What is my cat called?")
    assert "Miso" in memories_in(prompt(upstream))
    assert prompt(upstream)[0] == card
    assert text_of(prompt(upstream)).count("What is my cat called?") == 1
    texts = branch_of(server, "chat_123")
    assert texts[:4] == ["My cat is called Miso.", first.text, "Good night.", texts[3]]
    assert len([text for text in texts if text != last.text]) == 2 * 15 - 1


def test_a_group_members_memory_names_its_speaker_once():
    """Its text begins with the name; the middle of a long one does not, and a user's words pass for nobody else's."""
    said = pm.Message("m", pm.ROOT, "assistant", "Borin: The axe is lost.", voice="Borin")
    assert pm.memory_line(pm.Memory(said, 3, 1.0, {})) == "#4 Borin: The axe is lost."
    assert pm.memory_line(pm.Memory(said, 3, 1.0, {}, excerpt="[...] is lost.")) == "#4 Borin: [...] is lost."
    users = pm.Message("m", pm.ROOT, "user", "Borin: The axe is lost.")
    assert pm.memory_line(pm.Memory(users, 3, 1.0, {})) == "#4 User: Borin: The axe is lost."
