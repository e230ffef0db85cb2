"""What is no chat and what is no speech: small bodies in the shapes that real clients send, taken apart and sent."""

import itertools

import pytest
from fakes import API, LocalServer, branch_texts, get, say, settings
from hypothesis import given
from hypothesis import strategies as st

import persona_memory as pm

ONE_SERVER = True
TIMEOUT = 60
WORDS = st.lists(st.sampled_from(["the", "old", "mill", "hides", "a", "brass", "key", "under", "water"]), min_size=3)
SENTENCES = WORDS.map(lambda words: " ".join(words).capitalize() + ".")
NOTE = "[Write the next reply in present tense, about 200 words.]"
HISTORY = "<chat_history>\nUSER: My sister hid the brass key.\nASSISTANT: Did she?\n</chat_history>"
HEAD = "Write Helena's next reply in a fictional chat between Helena and Robin.\n\nHelena keeps the lighthouse."


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


CARD = system("You are Helena, keeper of the Thornwick lighthouse, and dry-humoured.")


def taken_apart(*messages: dict, **body) -> pm.ChatRequest:
    return pm.parse_request({"messages": list(messages), **body})


def spoken(request: pm.ChatRequest) -> list[str]:
    return [turn.content for turn in request.turns]


# ---------------------------------------------------------------------------- what is no chat

TASKS = {
    "title": [user(f"### Task:\nGenerate a concise title summarizing the chat history.\n{HISTORY}")],
    "tags": [user(f"### Task:\nGenerate 1-3 broad tags.\n### Output:\nJSON\n{HISTORY}")],
    "follow-ups": [user(f"### Task:\nPredict 3-5 useful messages this user might send next.\n{HISTORY}")],
    "title in five words": [user("Provide a concise, 5-word-or-less title for the conversation. Only return the title "
                                 "itself.\n\nConversation:\nUser: hi\nAI: hello")],
    "title in the user's language": [user("Write an extremely concise title for this conversation. Title in 5 Words or "
                                          "Less. No Punctuation.\n\n||>User:\n\"Hi\"\n||>Response:\n\"Hello\"")],
    "expression": [system("Ignore previous instructions. Classify the emotion of the last message. Output just one "
                          "word, e.g. \"joy\"."), user("I am so terribly happy today!")],
    "title of a query": [user("Create a concise, 3-5 word phrase as a header for the following query, avoiding the use "
                              "of the word 'title': My sister is Vera.")],
    "summary": [CARD, user("Hello."), assistant("Hm."), user("[Pause your roleplay. Summarize the story so far.]")],
}  # fmt: skip
NO_TASKS = {
    "a poem": [user("Write a title for my poem about the sea.")],
    "an article": [user("Summarize this article: the sea is deep.")],
    "talk of a title": [CARD, user("Only the duke has a title here."), assistant("Hm."), user("Create no stir.")],
}


@pytest.mark.parametrize("messages", TASKS.values(), ids=TASKS)
def test_a_front_ends_task_is_told_from_a_chat(messages):
    assert taken_apart(*messages).aside


@pytest.mark.parametrize("messages", NO_TASKS.values(), ids=NO_TASKS)
def test_a_users_own_wish_is_no_task(messages):
    assert not taken_apart(*messages).aside


@pytest.fixture(scope="module")
def running(shared_upstream, tmp_path_factory):
    """A proxy of a small context that tells the model how the user feels."""
    with LocalServer(settings(tmp_path_factory.mktemp("speech"), shared_upstream.url, context=2048)) as server:
        yield server


def listed(running) -> set[str]:
    return {chat["chat_id"] for chat in get(running, f"{API}/chats")}


def test_tasks_reach_the_model_untouched_and_leave_nothing(running, upstream):
    """Also under the id of a chat: its branch stays as it is."""
    say(running.url, [CARD, user("My sister hid the brass key.")], stream=False, chat_id="with-tasks")
    before = listed(running)
    for name, messages in TASKS.items():
        answer = say(running.url, messages, stream=False, chat_id="with-tasks")
        assert upstream.last["body"]["messages"] == messages, name
        assert answer.memory.startswith("untouched; reason=a task about a chat"), name
    assert listed(running) == before
    assert branch_texts(running.url, "with-tasks") == ["My sister hid the brass key."]
    assert get(running, f"{API}/search?q=concise title")["found"] == []


def test_an_account_is_no_chat_unless_it_says_so(running, upstream):
    """What `user` names has many chats; "chat_123" is one."""
    secret = user("My sister's name is Vera, tell nobody.")
    first = say(running.url, [CARD, secret], stream=False, user="652ac880")
    second = say(running.url, [CARD, user("Tell me a joke.")], stream=False, user="652ac880")
    assert "Vera" not in str(upstream.last["body"]) and first.chat_id != second.chat_id
    third = say(running.url, [CARD, secret, assistant(first.text), user("Well?")], stream=False, user="652ac880")
    assert third.chat_id == first.chat_id
    other = say(running.url, [CARD, secret, assistant(first.text), user("Well?")], stream=False, user="another")
    assert other.chat_id != first.chat_id
    assert say(running.url, [CARD, secret], stream=False, user="chat_123").chat_id == "chat_123"


def test_open_webui_names_its_chat_in_a_header(running):
    answer = say(running.url, [CARD, user("Hello.")], stream=False, headers={"X-OpenWebUI-Chat-Id": "web-ui-chat"})
    assert answer.chat_id == "web-ui-chat"


def test_a_lone_prompt_is_a_chat_only_when_it_goes_on(running, upstream):
    """Till then it may be a program's call, which needs no line on anybody's mood either."""
    sad = user("I am so sad and lonely, my dog died this morning and I cannot stop crying.")
    first = say(running.url, [CARD, sad], stream=False)
    assert upstream.last["body"]["messages"] == [CARD, sad]
    assert first.chat_id and first.chat_id not in listed(running)
    assert get(running, f"{API}/search?q=stop crying")["found"] == []
    again = say(running.url, [CARD, sad, assistant(first.text), user("It hurts.")], stream=False)
    assert again.chat_id == first.chat_id and first.chat_id in listed(running)
    assert get(running, f"{API}/search?q=stop crying")["found"]
    say(running.url, [CARD, sad], stream=False, chat_id="json", response_format={"type": "json_object"})
    assert upstream.last["body"]["messages"] == [CARD, sad]


def test_two_characters_whose_chats_begin_alike_stay_two(running):
    borin = system("You are Borin, a gruff smith who mends ploughs in the hills.")
    first = say(running.url, [CARD, user("Hi")], stream=False)
    second = say(running.url, [borin, user("Hi")], stream=False)
    assert second.chat_id != first.chat_id
    entry = system(CARD["content"] + "\nThe gulls nest in April.")
    assert say(running.url, [entry, user("Hi")], stream=False).chat_id == first.chat_id


@pytest.mark.parametrize(("one", "other", "same"), [
    ("You are Mira, a warm innkeeper.", "You are Borin, a gruff smith.", False),
    (HEAD, HEAD.replace("Helena", "Borin"), False),
    (HEAD, HEAD + " The gulls nest in April. World info: the moon festival lasts three days.", True),
    ("", "You are Borin.", True),
])  # fmt: skip
def test_personas_that_may_be_one(one, other, same):
    assert pm.same_persona(one, other) is same and pm.same_persona(other, one) is same


# ---------------------------------------------------------------------------- what is no speech

THOUGHTS = {
    "<think>She lies.</think>I do not know.": "I do not know.",
    "<thinking>\nShe lies.\n</thinking>\n\nI do not know.": "I do not know.",
    "<reasoning>She lies.</reasoning>I do not know.": "I do not know.",
    '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> She lies.\n</details>\nNo.': "No.",
    "She lies.</think>I do not know.": "I do not know.",
    "<think>a<think>b</think>c</think>I do not know.": "I do not know.",
    "<think>She lies about": "",
    "[THINK]She lies.[/THINK]I do not know.": "I do not know.",
    "\u25c1think\u25b7She lies.\u25c1/think\u25b7 I do not know.": "I do not know.",
    "<seed:think>She lies.</seed:think>I do not know.": "I do not know.",
    "Write `<think>` to think.": "Write `<think>` to think.",
    "1 < 2": "1 < 2",
}


@pytest.mark.parametrize(("text", "words"), THOUGHTS.items())
def test_thoughts_are_no_words(text, words):
    assert pm.without_thoughts(text) == words


@given(SENTENCES, SENTENCES, st.sampled_from(["think", "thinking", "reasoning"]))
def test_words_survive_any_dress(words, thought, tag):
    """However a client shows a reply: thoughts before it, a status behind it, the name in front."""
    plain = pm.make_turn(assistant(words))
    for dressed in (f"<{tag}>{thought}</{tag}>{words}", f"{words}\n<status>\n{thought}\n</status>", f"Mira: {words}",
                    f"Mira: Robin: {words}",
                    f"<{tag}>{thought}</{tag}>\n\nMira: {words}\n\n<status>{thought}</status>"):  # fmt: skip
        turn = pm.make_turn(assistant(dressed))
        assert turn.digest == plain.digest and f"<{tag}>" not in turn.content and turn.raw["content"] == dressed


@given(st.text(max_size=200))
def test_taking_apart_never_adds_and_never_empties_a_users_words(text):
    words = pm.without_instructions(text)
    assert set(words) <= set(text) | {"\n"}
    assert bool(words.strip()) == bool(text.strip())
    assert pm.bare_words(text).strip() or not text.strip()


@given(SENTENCES, st.sampled_from([NOTE, "(OOC: stay in character.)", "[Author's note: gloomy, slow.]"]))
def test_a_closing_instruction_is_not_what_the_user_says(words, note):
    for messages in ([user(words), user(note)], [user(f"{words}\n\n{note}")]):
        request = taken_apart(CARD, user("Hello."), assistant("Hm."), *messages)
        assert spoken(request) == ["Hello.", "Hm.", words]
        sent = [turn.raw for turn in request.turns] + list(request.tail)
        assert sent[2:] == messages


@pytest.mark.parametrize(
    "text", ["Don't you dare go there.", "[The door is locked.]", "Answer me!\n\nWrite to me soon."]
)
def test_what_a_user_says_stays_whole(text):
    assert spoken(taken_apart(CARD, user("Hello."), assistant("Hm."), user(text)))[-1] == text


@pytest.mark.parametrize("words", ["[Start a new chat]", "[Start a new Chat]", "Let's get started.",
                                   "[Start a new group chat. Group members: Helena, Borin]"])  # fmt: skip
def test_placeholders_are_no_messages(words):
    request = taken_apart(CARD, user(words), assistant("Come in."), user("Hello."))
    assert spoken(request) == ["Come in.", "Hello."] and request.opening == (user(words),)


def test_a_cue_is_nobodys_words():
    """As Agnai ends its prompts."""
    request = taken_apart(
        system("A dialogue between Mira and Jon."), assistant("Mira: Come in."), user("Jon: Hello."), assistant("Mira:")
    )
    assert spoken(request) == ["Mira: Come in.", "Jon: Hello."] and request.tail == (assistant("Mira:"),)
    assert [turn.voice for turn in request.turns] == ["Mira", "Jon"]
    assert spoken(taken_apart(CARD, user("Hello.\nMira:"))) == ["Hello."]


def joined(*said: str, marker: str = "[Start a new Chat]") -> dict:
    return user("\n\n".join([HEAD, marker, *said]))


def test_a_prompt_in_one_message_is_taken_apart():
    said = ["Helena: Come in.\n\nSit down.", "Robin: Hello.", "Helena: Tea?", "Robin: Yes: two cups."]
    request = taken_apart(joined(*said))
    assert spoken(request) == said and [t.role for t in request.turns] == ["assistant", "user"] * 2
    assert "".join(m["content"] for m in request.persona).endswith("[Start a new Chat]")
    assert taken_apart(joined(*said, "Helena:")).tail == (user("Helena:"),)
    assert taken_apart(joined("Nobody knows who says this.")).aside


def test_one_message_or_many_are_one_chat(running, upstream):
    """The upstream gets the form that the client uses; memory is the same."""
    first = say(running.url, [joined("Helena: Come in.", "Robin: We sail on Friday.")], stream=False)
    (sent,) = upstream.last["body"]["messages"]
    assert sent == joined("Helena: Come in.", "Robin: We sail on Friday.")
    said = [assistant("Come in."), user("We sail on Friday."), assistant(first.text), user("She is grey.")]
    second = say(running.url, [system(f"{HEAD}\n\n[Start a new Chat]"), *said], stream=False)
    strict = [system(f"{HEAD}\n\n[Start a new Chat]"), user("[Start a new chat]"), *said]
    third = say(running.url, [*strict, assistant(second.text), user("And fat.")], stream=False)
    assert first.chat_id == second.chat_id == third.chat_id
    assert len(branch_texts(running.url, first.chat_id)) == 6
    assert upstream.last["body"]["messages"][1] == user("[Start a new chat]")


def test_a_prompt_begins_with_the_user_where_the_client_sees_to_that(running, upstream):
    """Also when the history is cut, or filled up from memory."""
    said = [assistant("Come in, Robin. The lamp is lit and the kettle is on, so sit down by the stove.")]
    for n in range(40):
        said.append(user(f"Message {n}: we walk along the cliff and the evening is long and windy, and nobody comes."))
        shown = said if n % 2 else said[-9:]
        opening = [user("[Start a new chat]")] if shown[0]["role"] == "assistant" else []
        answer = say(running.url, [CARD, *opening, *shown], stream=False, chat_id="strict")
        roles = [m["role"] for m in upstream.last["body"]["messages"]]
        assert roles[1:] == [pm.CHAT_ROLES[i % 2] for i in range(len(roles) - 1)]
        said.append(assistant(answer.text))


def test_thoughts_are_neither_kept_nor_told_and_pass_as_they_are(running, upstream):
    upstream.steer(reply=lambda body: "<think>She lies about the crypt.</think>I do not know.")
    say(running.url, [CARD, user("Who took the key?")], stream=False, chat_id="thoughts")
    upstream.reset()
    shown = assistant("<think>She lies about the crypt.</think>I do not know.")
    say(running.url, [CARD, user("Who took the key?"), shown, user("Who?")], stream=False, chat_id="thoughts")
    assert shown in upstream.last["body"]["messages"]
    assert branch_texts(running.url, "thoughts") == ["Who took the key?", "I do not know.", "Who?"]
    assert get(running, f"{API}/search?q=crypt")["found"] == []


# ---------------------------------------------------------------------------- clients that show it otherwise each turn

LONG_NOTE = "Keep it gloomy and slow, with rain on every roof."


def newest_changed(said: list[dict], change) -> list[dict]:
    """The two newest replies as a client's rule for its display shows them."""
    newest = [m for m in said if m["role"] == "assistant"][-2:]
    return [{**m, "content": change(m["content"])} if m in newest else m for m in said]


def at_depth(said: list[dict], message: dict, depth: int = 4) -> list[dict]:
    place = max(0, len(said) - depth)
    return [*said[:place], message, *said[place:]]


SHAPES = {
    "plain": lambda said: said,
    "thoughts": lambda said: newest_changed(said, lambda text: f"<think>A plan.</think>{text}"),
    "status": lambda said: newest_changed(said, lambda text: f"{text}\n<status>\nmood: calm\n</status>"),
    "regex": lambda said: newest_changed(said, lambda text: text.replace("and", "AND THEN")),
    "suffix": lambda said: [*said[:-1], user(said[-1]["content"] + "\n\nReply in English.\n")],
    "cue": lambda said: [*said, assistant("Helena:")],
    "note": lambda said: at_depth(said, user(LONG_NOTE)),
    "merged note": lambda said: [
        user(f"{m['content']}\n\n{LONG_NOTE}") if i == len(said) - 3 and m["role"] == "user" else m
        for i, m in enumerate(said)
    ],
    "hidden": lambda said: said if len(said) < 9 else [*said[:1], *said[3:]],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_chat_lived_is_one_chat_stored(running, upstream, shape):
    """Without an id: one chat, of the right length, and few messages stored beside those shown."""
    turns, chats = 14, set()
    said = [assistant(f"*The door of the {shape} lighthouse opens.* Come in out of the rain, dear guest.")]
    for n in range(turns):
        said.append(user(f"On day {n} of the {shape} we walk to cliff {n * 7 % 11} and count {n + 2} gulls there."))
        reply = f"So cliff {n * 7 % 11} it was, she says, and lights lamp {n} and smiles at the {shape}."
        upstream.steer(reply=lambda body, text=reply: text)
        chats.add(say(running.url, [CARD, *SHAPES[shape](said)], stream=False).chat_id)
        said.append(assistant(reply))
    (chat_id,) = chats
    texts = branch_texts(running.url, chat_id)
    hidden = {"hidden": 2}.get(shape, 0)
    assert len(said) - 1 - hidden <= len(texts) <= len(said) + (shape == "note")
    spare = get(running, f"{API}/chats/{chat_id}")["stored"] - len(texts)
    assert spare <= (30 if shape in ("note", "hidden") else 12)
    assert not any(LONG_NOTE in text for text in texts[-6:])


def named(said: list[dict]) -> list[dict]:
    """With its speaker's name in front of each text."""
    names = {"user": "Robin", "assistant": "Helena"}
    return [{**m, "content": f"{names[m['role']]}: {m['content']}"} for m in said]


def squashed(said: list[dict]) -> list[dict]:
    """With neighbours of one role as one message."""
    return [
        {"role": role, "content": "\n\n".join(m["content"] for m in run)}
        for role, run in itertools.groupby(said, key=lambda m: m["role"])
    ]


START = "[Start a new Chat]"
PROMPTS = {  # what SillyTavern makes of a chat that begins with the greeting, by its post-processing
    "none": lambda said: [CARD, system(START), *said],
    "merge": lambda said: squashed([CARD, system(START), *said]),
    "strict": lambda said: squashed(
        [CARD, system(START), *([user(START)] if said[0]["role"] != "user" else []), *said]
    ),
    "folded": lambda said: squashed([user(f"{CARD['content']}\n\n{START}"), *said]),
    "single": lambda said: [user("\n\n".join([HEAD, START, *(m["content"] for m in named(said))]))],
}


@pytest.fixture
def archive(tmp_path):
    """The program's archive, without models: it is all that a chat's identity takes."""
    memory = pm.PersonaMemory(settings(tmp_path, "http://127.0.0.1:9/v1"))
    yield memory.archive
    memory.close()


def enter(archive, messages: list[dict], chat_id: str = "") -> str:
    """Has the archive place a request, which the extension names where there is an id; returns its chat's id."""
    said = {"chat_id": chat_id, "kind": "normal"} if chat_id else {}
    request = pm.parse_request({"messages": messages, "persona_memory": said})
    with archive.enter(request, chat_id, pm.Deadline.after(60)) as (chat, *_):
        return chat.id


def lived(archive) -> list[list[str]]:
    """The texts of each listed chat's branch, without the names in front."""
    chats = [archive.export(line["chat_id"]) for line in archive._registry.catalogue.chats()]
    found = []
    for chat in chats:
        by_id, at, texts = {m["id"]: m for m in chat["messages"]}, chat["chat"]["head"], []
        while at:
            texts.append(by_id[at]["content"].removeprefix("Helena: ").removeprefix("Robin: "))
            at = by_id[at]["parent"]
        found.append(texts[::-1])
    return found


@pytest.mark.parametrize("window", [None, 9])
def test_a_chat_stays_one_whatever_the_client_makes_of_it_from_turn_to_turn(archive, window):
    """Post-processing and names in front change; turns that failed leave neighbours, which some of it joins."""
    said, ways = [assistant("*Helena lifts the lantern.* Come in.")], list(PROMPTS)
    for turn in range(25):
        for failed in (True, False) if turn % 3 == 0 else (False,):
            said.append(user(f"Line {turn}{' again' * failed}: we walk to the cliff and count {turn} gulls."))
            shown = said[-window:] if window else said
            way = ways[turn * 3 % 5]
            enter(archive, PROMPTS[way](named(shown) if turn % 2 and way != "single" else shown))
        said.append(assistant(f"Reply {turn}: so it was, she says, and lights lamp {turn}."))
    enter(archive, PROMPTS["none"]([*said, user("The end.")]))
    assert lived(archive) == [[m["content"] for m in said] + ["The end."]]


def test_a_prompt_in_the_users_role_is_no_message():
    """A line such as "[Start a new Chat]" ends it; what the user says behind that is the chat's first message."""
    request = taken_apart(user(f"{HEAD}\n\n{START}\n\nGood evening."), assistant("Hm."), user("Well?"))
    assert spoken(request) == ["Good evening.", "Hm.", "Well?"] and not request.persona_in_first_turn
    assert pm.text_of(request.persona[0]["content"]).endswith(START) and request.strict


def test_what_stands_between_joined_messages_reaches_the_model(archive):
    """A note in the middle of joined messages is neither said nor lost."""
    enter(archive, [CARD, assistant("Come in."), user("I hid the key.")])
    note = "[Author's note: it is raining.]"
    whole = f"I hid the key.\n\n{note}\n\nAre you there?"
    request = taken_apart(CARD, assistant("Come in."), user(whole))
    with archive.enter(request, "", pm.Deadline.after(60)) as (_, path, seen):
        assert spoken(seen) == ["Come in.", "I hid the key.", "Are you there?"] and len(path) == 3
        shown = pm.merged([turn.raw for turn in seen.turns])
    assert [m["content"] for m in shown] == ["Come in.", whole]


def test_what_is_hidden_keeps_its_place_where_the_extension_tells_of_it(archive):
    """In a chat that goes through the proxy; other clients' requests and what is shown again are taken as they are."""
    said = [assistant("Come in."), *(user(f"Line {n}.") if n % 2 else assistant(f"Reply {n}.") for n in range(1, 12))]
    rows = [{**m, "hidden": 2 < n < 7} for n, m in enumerate(said)]
    request, _ = pm.parse_injection({"chat_id": "st-1", "complete": True, "messages": rows})
    with archive.enter(request, "st-1", pm.Deadline.after(60)) as (chat, path, _):
        assert len(path) == len(said)
    left = [m for m, row in zip(said, rows, strict=True) if not row["hidden"]]
    told = {"chat_id": "st-1", "kind": "normal"}
    request = pm.parse_request({"messages": [CARD, *left, user("And then?")], "persona_memory": told})
    with archive.enter(request, "st-1", pm.Deadline.after(60)) as (chat, path, seen):
        assert [t.hidden for t in seen.turns] == [row["hidden"] for row in rows] + [False]
        assert [m.content for m in chat.store.read(path)] == [m["content"] for m in said] + ["And then?"]
    enter(archive, [CARD, *said, user("Shown again?")], "st-1")
    assert lived(archive) == [[m["content"] for m in said] + ["Shown again?"]]
    enter(archive, [CARD, *left, user("Without it?")])
    assert lived(archive) == [[m["content"] for m in left] + ["Without it?"]]


def test_a_chat_lived_without_the_extension_becomes_its_chat_and_goes_on_without_it(archive):
    """Listed once all the time, with its marks, and with what was edited before."""
    said = [assistant("Come in."), *(user(f"Line {n}.") if n % 2 else assistant(f"Reply {n}.") for n in range(1, 8))]
    old = enter(archive, [CARD, *said])
    said[1] = user("Line 1, edited.")
    enter(archive, [CARD, *said])
    archive.change_message(old, archive.export(old)["messages"][2]["id"], {"forgotten": True})
    said += [assistant("Reply 8."), user("Line 9.")]
    assert enter(archive, [CARD, *said], "st-1") == "st-1"
    assert [m["forgotten"] for m in archive.export("st-1")["messages"]].count(True) == 2, "on both branches"
    said += [assistant("Reply 10."), user("Line 11.")]
    assert enter(archive, [CARD, *said[-5:]]) == "st-1"
    assert lived(archive) == [[m["content"] for m in said]]
    assert enter(archive, [CARD, *said], "st-2") == "st-2", "the extension says that it is another one"


RULES = {
    "capitals": lambda text, turn: text.replace("and", "AND THEN"),
    "a footer": lambda text, turn: f"{text}\n\n---\nDay {turn} | inn | calm",
    "a status": lambda text, turn: f"{text}\n<status>\nday {turn}\n</status>",
}


@pytest.mark.parametrize("rule", RULES)
def test_a_window_whose_newest_replies_are_reworded_stores_each_message_about_once(archive, rule):
    """From the first turn on; the client shows twenty messages, and its rule changes the two newest replies."""
    said = [assistant("*Helena lifts the lantern and the latch.* Come in and sit, dear guest.")]
    for turn in range(60):
        said.append(user(f"On day {turn} we walk to cliff {turn * 7 % 11} and count {turn + 2} gulls there."))
        enter(archive, [CARD, *newest_changed(said[-20:], lambda text, now=turn: RULES[rule](text, now))])
        said.append(assistant(f"So cliff {turn * 7 % 11} it was, she says, and lights lamp {turn} and smiles at you."))
    (chat,) = archive._registry.catalogue.chats()
    assert chat["messages"] == len(said) - 1
    assert len(archive.export(chat["chat_id"])["messages"]) <= 1.1 * len(said)


def test_a_few_lines_in_common_make_no_chat_of_two(archive):
    """Two long chats in which the same was said once."""
    common = [user("I hid the ring."), assistant("Where?"), user("Under the stair."), assistant("I will not tell.")]
    for place, way in ((8, "left"), (2, "right")):
        said = [assistant(f"You go {way}.")]
        said += [user(f"{way} {n}.") if n % 2 else assistant(f"To the {way} {n}.") for n in range(1, 21)]
        enter(archive, [CARD, *said[: 2 * place - 1], *common, *said[2 * place - 1 :], user("And then?")])
    assert sorted(map(len, lived(archive))) == [26, 26]


def test_a_regenerate_without_history_replaces_the_reply(running, upstream):
    """The same words again, soon after the reply, ask for another one."""
    for reply in ("A troll stands there.", "A garden lies there.", "You walk in."):
        upstream.steer(reply=lambda body, text=reply: text)
        text = "Go in." if reply == "You walk in." else "Open the door."
        say(running.url, [user(text)], stream=False, chat_id="lone lines")
    assert branch_texts(running.url, "lone lines") == ["Open the door.", "A garden lies there.", "Go in."]
    assert "troll" not in str(upstream.last["body"])


def test_hiding_or_deleting_at_the_front_keeps_the_chat(running, upstream):
    said = [assistant("The kettle sings on the iron stove. Come in.")]
    for n in range(8):
        said += [
            user(f"Message {n}: the kettle is hot and the sister left on day {n}."),
            assistant(f"Hm, day {n} it is."),
        ]
    first = say(running.url, [CARD, *said, user("Are you there?")], stream=False)
    for shown in (said[:1] + said[3:], said[:7] + said[9:], said[:5] + said[6:], said[4:], said[1:]):
        assert say(running.url, [CARD, *shown, user("Still there?")], stream=False).chat_id == first.chat_id


# ---------------------------------------------------------------------------- tools


def tools(count: int) -> list[dict]:
    words = "what this tool does and when it is called, in many words " * 6
    return [{"type": "function", "function": {"name": f"tool_{n}", "description": words}} for n in range(count)]


def test_tools_take_a_share_of_their_own(running, upstream):
    """The chat divides what they leave; where that is too little for any chat, the refusal names them."""
    said = [user("The brass key lies under the mill."), assistant("Safe there.")]
    for n in range(60):
        said += [user(f"Day {n}: rain on the roof and gulls on the wall."), assistant(f"Day {n} was wet, she says.")]
    question = user("Where does the brass key lie?")
    sent = {"chat_id": "tools", "model": "with-tools", "max_tokens": 100, "stream": False}
    say(running.url, [CARD, *said, question], tools=tools(12), **sent)
    report = get(running, f"{API}/chats/tools/prompts?limit=1")["prompts"][0]
    few = pm.tool_tokens({"tools": tools(12)})
    assert report["tokens"]["tools"] == few and report["context"] == 2048
    assert "The brass key lies under the mill." in str(upstream.last["body"]["messages"])
    most = max(n for n in range(40) if 2048 - pm.tool_tokens({"tools": tools(n)}) >= 2 * pm.MIN_RESPONSE)
    answer = say(running.url, [CARD, *said, question], tools=tools(most), **sent)
    assert "leave little room for memories" in answer.memory
    refused = say(running.url, [CARD, user("Hello.")], stream=False, chat_id="tools", tools=tools(40))
    assert refused.status == 400 and "tools" in refused.error
