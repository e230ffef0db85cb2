"""What is no chat and what is no speech: small bodies in the shapes that real clients send, taken apart and sent."""

import httpx
import pytest
from fakes import LocalServer, branch_texts, say, settings
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


def get(running, path: str):
    return httpx.get(f"{running.url}/api/persona_memory{path}", timeout=TIMEOUT).json()


def listed(running) -> set[str]:
    return {chat["chat_id"] for chat in get(running, "/chats")}


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
    assert get(running, "/search?q=concise title")["found"] == []


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
    assert get(running, "/search?q=stop crying")["found"] == []
    again = say(running.url, [CARD, sad, assistant(first.text), user("It hurts.")], stream=False)
    assert again.chat_id == first.chat_id and first.chat_id in listed(running)
    assert get(running, "/search?q=stop crying")["found"]
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
    assert get(running, "/search?q=crypt")["found"] == []


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
    spare = get(running, f"/chats/{chat_id}")["stored"] - len(texts)
    assert spare <= (30 if shape in ("note", "hidden") else 12)
    assert not any(LONG_NOTE in text for text in texts[-6:])


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
    say(
        running.url,
        [CARD, *said, question],
        stream=False,
        chat_id="tools",
        model="with-tools",
        max_tokens=100,
        tools=tools(12),
    )
    report = get(running, "/chats/tools/prompts?limit=1")["prompts"][0]
    few = pm.tool_tokens({"tools": tools(12)})
    assert report["tokens"]["tools"] == few and report["context"] == 2048
    assert "The brass key lies under the mill." in str(upstream.last["body"]["messages"])
    most = max(n for n in range(40) if 2048 - pm.tool_tokens({"tools": tools(n)}) >= 2 * pm.MIN_RESPONSE)
    answer = say(
        running.url,
        [CARD, *said, question],
        stream=False,
        chat_id="tools",
        model="with-tools",
        max_tokens=100,
        tools=tools(most),
    )
    assert "leave little room for memories" in answer.memory
    refused = say(running.url, [CARD, user("Hello.")], stream=False, chat_id="tools", tools=tools(40))
    assert refused.status == 400 and "tools" in refused.error
