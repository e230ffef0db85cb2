"""Google Gemini as the upstream: how requests are translated, and what comes back through google-generativeai."""

from __future__ import annotations

import base64
import json
import threading

import httpx
import openai
import pytest
from fakes import API, LocalServer, Server, client, get, hang_up_later, say, settings, wait_until
from gemini import Gemini, model_entry, prompt_text
from hypothesis import given
from hypothesis import strategies as st

import persona_memory
from persona_memory import BEGIN_NUDGE, CONTINUE_NUDGE, InvalidRequest

FOREVER = 60
KEY = "the-key-of-this-house"
PIXEL = base64.b64encode(b"\x89PNG one pixel").decode()


# ---------------------------------------------------------------------------- messages


def message(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def contents_of(*messages: dict) -> list[tuple]:
    """What a transcript becomes: role and texts of each content."""
    _, contents = persona_memory.gemini_contents(messages)
    return [(content["role"], *(part.get("text") for part in content["parts"])) for content in contents]


def test_leading_system_messages_become_the_system_instruction():
    """All of them in their order, developer messages too; the contents begin with the chat."""
    messages = [message("system", "You are Mira."), message("developer", "Be brief."), message("user", "Hello")]
    system, contents = persona_memory.gemini_contents(messages)
    assert system == "You are Mira.\n\nBe brief."
    assert contents == [{"role": "user", "parts": [{"text": "Hello"}]}]


def test_the_system_instruction_is_in_the_request():
    """Once, and not at all where there is no system message."""
    body = {"messages": [message("system", "You are Mira."), message("user", "Hello")]}
    request = persona_memory.gemini_request(body, "models/m", [], 100)
    assert request["system_instruction"] == {"parts": [{"text": "You are Mira."}]}
    assert request["model"] == "models/m"
    bare = persona_memory.gemini_request({"messages": body["messages"][1:]}, "models/m", [], 100)
    assert "system_instruction" not in bare


def test_later_system_messages_are_user_text_where_they_stand():
    """Gemini has one system instruction; a note in the middle keeps its place."""
    found = contents_of(
        message("system", "You are Mira."),
        message("user", "Hello"),
        message("assistant", "Welcome."),
        message("system", "It begins to rain."),
        message("user", "Look!"),
    )
    assert found == [("user", "Hello"), ("model", "Welcome."), ("user", "It begins to rain.\n\nLook!")]


def test_equal_roles_become_one_content():
    """Neighbours of one side are merged, with a blank line between them."""
    found = contents_of(
        message("user", "One."), message("user", "Two."), message("assistant", "A."), message("assistant", "B."),
        message("user", "Three."),
    )  # fmt: skip
    assert found == [("user", "One.\n\nTwo."), ("model", "A.\n\nB."), ("user", "Three.")]


def test_the_last_turn_is_the_users():
    """Where the client continues the character's message, a nudge asks for it."""
    found = contents_of(message("user", "Hello"), message("assistant", "And so"))
    assert found == [("user", "Hello"), ("model", "And so"), ("user", CONTINUE_NUDGE)]


@pytest.mark.parametrize("messages", [[message("system", "Be Mira.")], [message("system", "")], [message("user", " ")]])
def test_with_nothing_said_yet_the_model_begins(messages):
    """Only system messages, or empty ones: Gemini needs something from the user."""
    assert contents_of(*messages) == [("user", BEGIN_NUDGE)]


def test_names_stand_before_the_words():
    """A name is said once, also where the client has put it there already."""
    found = contents_of(
        message("user", "Hello", name="Anna"),
        message("assistant", "Mira: Welcome.", name="Mira"),
        message("user", "Miranda: Thanks.", name="Mir"),
    )
    assert found == [("user", "Anna: Hello"), ("model", "Mira: Welcome."), ("user", "Mir: Miranda: Thanks.")]


def test_the_name_of_somebody_who_only_shows_an_image():
    """The name has a part of its own then."""
    picture = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}]
    parts = persona_memory.gemini_parts(message("user", picture, name="Anna"))
    assert parts[0] == {"text": "Anna:"}
    assert parts[1]["inline_data"]["mime_type"] == "image/png"


@pytest.mark.parametrize("content", ["", " \n", None, [], [{"type": "text", "text": " "}]])
def test_empty_messages_are_dropped(content):
    """Gemini refuses empty texts; a name alone says nothing either."""
    found = contents_of(message("user", "Hello"), message("assistant", content, name="Mira"), message("user", "Hm."))
    assert found == [("user", "Hello\n\nHm.")]


def test_lone_surrogates_are_replaced():
    """Half an emoji, as some clients cut them, becomes the sign for what is unreadable; protocol buffers refuse it."""
    assert contents_of(message("user", "A \ud83d gull")) == [("user", "A \ufffd gull")]
    system, _ = persona_memory.gemini_contents([message("system", "\udc00Mira")])
    assert system == "\ufffdMira"
    assert contents_of(message("user", "Hello", name="An\ud83dna")) == [("user", "An\ufffdna: Hello")]


@pytest.mark.parametrize("header", ["data:image/png;base64,", "data:image/png;charset=utf-8;base64,"])
def test_images_in_data_urls_become_blobs(header):
    """The image's bytes and type, where it stands between the texts."""
    picture = {"type": "image_url", "image_url": {"url": header + PIXEL}}
    parts = persona_memory.gemini_parts(message("user", [{"type": "text", "text": "Look:"}, picture]))
    assert parts == [{"text": "Look:"}, {"inline_data": {"mime_type": "image/png", "data": base64.b64decode(PIXEL)}}]


def test_an_image_may_be_named_by_a_bare_string():
    """Some clients leave out the object around the address."""
    parts = persona_memory.gemini_parts(
        message("user", [{"type": "image_url", "image_url": f"data:image/webp;base64,{PIXEL}"}])
    )
    assert parts[0]["inline_data"]["mime_type"] == "image/webp"


def test_sounds_become_blobs():
    """OpenAI's input_audio names a format and carries base64."""
    part = {"type": "input_audio", "input_audio": {"format": "mp3", "data": PIXEL}}
    assert persona_memory.gemini_parts(message("user", [part]))[0]["inline_data"]["mime_type"] == "audio/mp3"


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/gull.png"}}, "[image]"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "[file]"),
        ({"type": "video_url", "video_url": {"url": "https://example.com/gull.mp4"}}, "[attachment]"),
        ({"type": "image_url"}, "[image]"),
        ({"type": 7}, "[attachment]"),
    ],
)
def test_what_is_elsewhere_becomes_a_placeholder(part, text):
    """Nothing is fetched: the text says what was there."""
    assert contents_of(message("user", [part])) == [("user", text)]


@pytest.mark.parametrize("data", ["no base64!", "abc"])
def test_broken_base64_is_the_clients_mistake(data):
    """Said with the kind of the part, not with its content."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    with pytest.raises(InvalidRequest, match="image/png") as caught:
        persona_memory.gemini_parts(message("user", [part]))
    assert caught.value.param == "messages"


SNIPPETS = ["", " ", "\n", "Anna", "Anna:", " é🐉", "\0", "\ud83d", "\udc09"]  # halves of an emoji among them
TEXT = st.lists(st.sampled_from(SNIPPETS), max_size=3).map("".join) | st.text(max_size=8)
PART = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXT),
    st.just({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}),
    st.just({"type": "image_url", "image_url": {"url": "https://example.com/gull.png"}}),
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "narrator"]),
        "content": st.one_of(st.none(), TEXT, st.lists(PART, max_size=3)),
    },
    optional={"name": st.one_of(st.none(), TEXT)},
)


@given(st.lists(MESSAGE, min_size=1, max_size=12))
def test_any_messages_become_contents_that_gemini_takes(messages):
    """Roles take turns, the last is the user's, no text is empty, and all of it is sound Unicode."""
    system, contents = persona_memory.gemini_contents(messages)
    roles = [content["role"] for content in contents]
    assert roles[-1] == "user"
    assert all(first != second for first, second in zip(roles, roles[1:], strict=False))
    assert set(roles) <= {"user", "model"}
    assert all(content["parts"] for content in contents)
    texts = [part["text"] for content in contents for part in content["parts"] if "text" in part]
    assert all(texts)
    "".join([system, *texts]).encode("utf-8")


# ---------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 40}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40}),
        ({"temperature": 5, "top_p": 1.5, "top_k": 500}, {"temperature": 2, "top_p": 1, "top_k": 64}),
        ({"temperature": -1, "top_p": -1, "top_k": -1}, {"temperature": 0, "top_p": 0}),
        ({"temperature": 0, "top_k": 0}, {"temperature": 0}),
        ({"temperature": None, "top_p": None, "top_k": None, "stop": None}, {}),
        ({"presence_penalty": 0.5, "frequency_penalty": 0, "n": 2, "seed": 1, "logit_bias": {}, "min_p": 0.1}, {}),
        ({"stop": "\nAnna:"}, {"stop_sequences": ["\nAnna:"]}),
        ({"stop": ["a", "", "b", "a", "c", "d", "e", "f"]}, {"stop_sequences": ["a", "b", "c", "d", "e"]}),
        ({"stop": []}, {}),
        ({"response_format": {"type": "json_object"}}, {"response_mime_type": "application/json"}),
        ({"response_format": {"type": "text"}}, {}),
    ],
)
def test_options_are_what_gemini_takes(given, sent):
    """Numbers are moved into range, five stop sequences kept, and what Gemini refuses is left out."""
    assert persona_memory.gemini_options(given) == sent


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "hot"), ("top_p", True), ("top_k", [1]), ("stop", 7), ("stop", ["a", 7])]
)
def test_options_of_another_type_are_the_clients_mistake(name, value):
    """The error names the option."""
    with pytest.raises(InvalidRequest, match=name) as caught:
        persona_memory.gemini_options({name: value})
    assert caught.value.param == name


def test_without_a_limit_none_is_sent():
    """max_output_tokens is there only where the client limits its reply, under either name."""
    messages = [message("user", "Hello")]
    limits = [{}, {"max_tokens": 0}, {"max_tokens": 50}, {"max_completion_tokens": 50}]
    requests = [persona_memory.gemini_request({"messages": messages, **limit}, "models/m", [], 99) for limit in limits]
    assert [request["generation_config"].get("max_output_tokens") for request in requests] == [None, None, 99, 99]


# ---------------------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def shared_api():
    """One fake Gemini for the whole module."""
    with Gemini(key=KEY) as fake:
        yield fake


@pytest.fixture
def api(shared_api):
    """Gemini, well-behaved and with nothing recorded."""
    shared_api.reset()
    shared_api.steer(key=KEY)
    yield shared_api
    shared_api.reset()


def gemini_settings(data, api, **more) -> persona_memory.Settings:
    return settings(data, "gemini", upstream_key=KEY, gemini_endpoint=api.url, **more)


@pytest.fixture(scope="module")
def server(shared_api, tmp_path_factory):
    """One proxy before it, for the whole module."""
    with LocalServer(gemini_settings(tmp_path_factory.mktemp("gemini") / "data", shared_api)) as running:
        yield running


@pytest.fixture
def chat(request) -> list[dict]:
    """A transcript that no other test sends."""
    return [message("system", "You are Mira."), message("user", f"Good evening from {request.node.name}")]


def ask(url: str, messages: list[dict], headers: dict | None = None, **more) -> httpx.Response:
    """A raw turn; names no model unless told to."""
    address = f"{url}/v1/chat/completions"
    body = {"messages": messages, **more}
    return httpx.post(address, json=body, headers=headers, timeout=FOREVER, verify=False)


def chunks_of(answer: httpx.Response) -> list[dict]:
    """A stream's chunks."""
    texts = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data:")]
    assert texts[-1] == "[DONE]"
    return [json.loads(text) for text in texts[:-1]]


def config(api) -> dict:
    """The generation config that Gemini saw last."""
    return api.last["body"].get("generationConfig") or {}


def path_of(request: dict) -> str:
    return request["path"].partition("?")[0]


# -- the request


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_a_model_goes_to_flash(server, api, chat, stream):
    """The alias that outlives the models behind it; the answer names it."""
    answer = ask(server.url, chat, stream=stream)
    named = chunks_of(answer)[0]["model"] if stream else answer.json()["model"]
    method = "streamGenerateContent" if stream else "generateContent"
    assert path_of(api.last) == f"/v1beta/models/gemini-flash-latest:{method}"
    assert named == "gemini-flash-latest"


def test_the_model_setting_goes_before_the_request(api, chat, data_dir):
    """--model decides, whatever the client names."""
    with LocalServer(gemini_settings(data_dir, api, model="gemini-pro-latest"), ready=False) as running:
        assert ask(running.url, chat, model="gpt-4o").status_code == 200
        assert "/gemini-pro-latest:" in api.last["path"]
        assert ask(running.url, chat).status_code == 200
        assert "/gemini-pro-latest:" in api.last["path"]


@pytest.mark.parametrize("name", ["gemini-pro-latest", "models/gemini-pro-latest"])
def test_the_model_of_the_request(server, api, chat, name):
    """With or without Google's folder before it."""
    assert ask(server.url, chat, model=name).status_code == 200
    assert path_of(api.last) == "/v1beta/models/gemini-pro-latest:generateContent"


def test_a_whole_chat_arrives_as_gemini_wants_it(server, api, chat):
    """Names, notes and options as google-generativeai sends them; the fake refuses what Gemini refuses."""
    note = message("system", "It begins to rain.")
    transcript = [*chat, message("assistant", "Welcome.", name="Mira"), note, message("user", "Look!", name="Anna")]
    answer = ask(
        server.url, transcript, temperature=9, top_k=900, stop=list("abcdefg"), presence_penalty=1, frequency_penalty=1
    )
    assert answer.status_code == 200, answer.text
    body = api.last["body"]
    texts = [[part["text"] for part in content["parts"]] for content in body["contents"]]
    assert texts == [[chat[1]["content"]], ["Mira: Welcome."], ["It begins to rain.\n\nAnna: Look!"]]
    assert body["systemInstruction"]["parts"] == [{"text": "You are Mira."}]
    assert config(api) == {"temperature": 2, "topK": 64, "stopSequences": list("abcde")}


def test_an_image_travels_as_a_blob(server, api, chat):
    """Its bytes reach Gemini."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    assert ask(server.url, [*chat, message("user", [picture])]).status_code == 200
    blob = api.last["body"]["contents"][-1]["parts"][-1]["inlineData"]
    assert (blob["mimeType"], base64.b64decode(blob["data"])) == ("image/png", base64.b64decode(PIXEL))


def test_a_broken_image_is_a_400(server, api, chat):
    """A readable error, before Gemini is asked."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}
    answer = ask(server.url, [*chat, message("user", [picture])], stream=True)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "base64" in answer.json()["error"]["message"]
    assert api.chats == []


def test_half_an_emoji_is_no_failure(server, api, chat):
    """Lone surrogates in a request come to Gemini as the sign for what is unreadable."""
    raw = json.dumps({"messages": [*chat, message("user", "A gull \ud83d", name="An\udc09na")]})
    address = f"{server.url}/v1/chat/completions"
    answer = httpx.post(address, content=raw, headers={"Content-Type": "application/json"}, timeout=FOREVER)
    assert answer.status_code == 200, answer.text
    assert prompt_text(api.last["body"]).endswith("An\ufffdna: A gull \ufffd")


def test_a_missing_ca_bundle_is_named(tmp_path, monkeypatch):
    """The environment may name one for other programs."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/missing/ca.pem")
    given = settings(tmp_path, "gemini", upstream_key=KEY, gemini_endpoint="https://gemini.example")
    remote = persona_memory.make_upstream(given, persona_memory.Metrics())
    with pytest.raises(persona_memory.UpstreamUnavailable, match="/missing/ca.pem"):
        remote.models(persona_memory.Call())


def test_the_key_travels_in_its_header_only(server, api, chat):
    """Not in the address, not in the body, not in another header; the client's own key stays here."""
    assert ask(server.url, chat, headers={"Authorization": "Bearer sk-of-the-client"}, stream=True).status_code == 200
    get(server.url, "/v1/models")
    assert len(api.requests) > 1
    for request in api.requests:
        headers = {name.lower(): value for name, value in request["headers"].items()}
        assert headers.pop("x-goog-api-key") == KEY
        seen = request["path"] + json.dumps(headers) + request["raw"].decode()
        assert KEY not in seen
        assert "sk-of-the-client" not in seen


CATEGORIES = {"HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT"}


def safety(api) -> dict:
    """The safety settings that Gemini saw last: category -> threshold, both as Google numbers them."""
    return {entry["category"]: entry["threshold"] for entry in api.last["body"].get("safetySettings") or []}


def test_safety_filters_are_off(server, api, chat):
    """All four categories that one may adjust."""
    assert ask(server.url, chat).status_code == 200
    assert safety_names(api) == dict.fromkeys(CATEGORIES, "OFF")


@pytest.mark.parametrize(
    ("level", "threshold"),
    [("none", "BLOCK_NONE"), ("medium", "BLOCK_MEDIUM_AND_ABOVE"), ("low", "BLOCK_LOW_AND_ABOVE")],
)
def test_safety_filters_as_they_are_set(api, chat, data_dir, level, threshold):
    """--gemini-safety names the threshold for all of them."""
    with LocalServer(gemini_settings(data_dir, api, gemini_safety=level), ready=False) as running:
        assert ask(running.url, chat).status_code == 200
    assert safety_names(api) == dict.fromkeys(CATEGORIES, threshold)


def test_googles_own_safety_filters(api, chat, data_dir):
    """`default` sends none."""
    with LocalServer(gemini_settings(data_dir, api, gemini_safety="default"), ready=False) as running:
        assert ask(running.url, chat).status_code == 200
    assert safety(api) == {}


def safety_names(api) -> dict:
    """The safety settings by name."""
    from google.ai.generativelanguage import HarmCategory, SafetySetting

    thresholds = SafetySetting.HarmBlockThreshold
    named = ((HarmCategory(number).name, thresholds(value).name) for number, value in safety(api).items())
    return {category.removeprefix("HARM_CATEGORY_"): threshold for category, threshold in named}


# -- models and context


def test_models_lists_those_that_chat(server, api):
    """Their names as clients use them, their context lengths, and no model for embeddings."""
    listed = get(server.url, "/v1/models")
    names = ["gemini-flash-latest", "gemini-pro-latest", "gemini-flash-lite-latest"]
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == names
    assert {entry["context_length"] for entry in listed["data"]} == {1048576}


def test_a_list_of_more_than_one_page(server, api):
    """All of them."""
    api.models = [f"gemini-{number}" for number in range(1200)]
    assert len(get(server.url, "/v1/models")["data"]) == 1200


def test_a_refused_model_list_is_a_readable_error(server, api):
    """With Google's status and without the key."""
    api.key = "another"
    answer = httpx.get(f"{server.url}/v1/models", timeout=FOREVER)
    assert answer.status_code == 400
    assert "API key not valid" in answer.json()["error"]["message"]
    assert KEY not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_retired_model_is_answered_with_those_that_exist(server, api, chat, stream):
    """NOT_FOUND alone helps nobody."""
    answer = ask(server.url, chat, model="gemini-1.0-pro", stream=stream)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "gemini-1.0-pro is not found" in error["message"]
    assert "gemini-flash-latest, gemini-pro-latest, gemini-flash-lite-latest" in error["message"]
    assert "embedding" not in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_a_models_name_is_not_found(server, api, chat, stream):
    """A name such as OpenRouter's or a path is no part of an address."""
    answer = ask(server.url, chat, model="google/../gemini", stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert api.chats == []


def context_of(running, chat: list[dict], **more) -> int:
    """The context length that a turn's prompt was made for."""
    answer = ask(running.url, chat, **more)
    assert answer.status_code == 200, answer.text
    return get(running.url, f"{API}/chats/{answer.headers['X-Chat-Id']}")["last_prompt"]["context"]


@pytest.mark.parametrize(("limit", "context"), [(1048576, 32768), (20000, 20000), (32768, 32768)])
def test_the_context_is_the_models_own_up_to_a_bound(server, api, chat, limit, context):
    """A million tokens would cost a fortune at every turn."""
    name = f"gemini-of-{limit}"
    api.models = [model_entry(name, inputTokenLimit=limit)]
    assert context_of(server, chat, model=name) == context


@pytest.mark.parametrize(("wanted", "context"), [(4096, 4096), (100000, 100000), (2000000, 1048576)])
def test_the_context_setting_stays_below_the_models_limit(api, chat, data_dir, wanted, context):
    """--context may be more than the usual bound, but never more than the model takes."""
    with LocalServer(gemini_settings(data_dir, api, context=wanted), ready=False) as running:
        assert context_of(running, chat) == context


def test_without_a_limit_the_context_is_8192(api, chat, data_dir):
    """The limit cannot be had: the turn goes on all the same."""
    api.models = [model_entry("gemini-flash-latest", inputTokenLimit=0)]
    with LocalServer(gemini_settings(data_dir, api), ready=False) as running:
        assert context_of(running, chat) == persona_memory.DEFAULT_CONTEXT


# -- the reply


LONG_REPLY = "The lamp turns and the fog comes in from the sea, and nobody sails tonight."


def reply_of(answer: httpx.Response, stream: bool) -> tuple[str, str, dict]:
    """Text, finish reason and usage of an answer."""
    assert answer.status_code == 200, answer.text
    parts = chunks_of(answer) if stream else [answer.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    text = "".join((choice.get("delta") or choice.get("message") or {}).get("content") or "" for choice in choices)
    finish = next(choice["finish_reason"] for choice in choices if choice["finish_reason"])
    return text, finish, next(part["usage"] for part in parts if part.get("usage"))


def ask_reply(server, chat, stream: bool, **more) -> tuple[str, str, dict]:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return reply_of(ask(server.url, chat, stream=stream, **options, **more), stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_thoughts_have_room_and_the_reply_its_limit(server, api, chat, stream, name):
    """Gemini may spend more than the client allows its reply; what the client sees ends where it said."""
    api.reply = lambda _: LONG_REPLY
    text, finish, usage = ask_reply(server, chat, stream, **{name: 6})
    assert config(api)["maxOutputTokens"] >= 6 + persona_memory.THOUGHT_TOKENS
    assert text
    assert LONG_REPLY.startswith(text)
    assert (persona_memory.count_tokens(text), finish, usage["completion_tokens"]) == (6, "length", 6)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_within_its_limit_is_whole(server, api, chat, stream):
    """It stops where it wants to."""
    api.reply = lambda _: LONG_REPLY
    text, finish, _ = ask_reply(server, chat, stream, max_tokens=100)
    assert (text, finish) == (LONG_REPLY, "stop")


def test_the_cut_reply_is_what_memory_holds(server, api, chat):
    """What the client never saw was never said."""
    api.reply = lambda _: LONG_REPLY
    text, _, _ = ask_reply(server, chat, True, max_tokens=6)
    answer = ask(server.url, [*chat, message("assistant", text), message("user", "Go on.")])
    held = get(server.url, f"{API}/chats/{answer.headers['X-Chat-Id']}/messages")["messages"]
    assert [entry["content"] for entry in held] == [chat[1]["content"], text, "Go on."]


def test_room_for_thoughts_ends_at_the_models_limit(server, api, chat):
    """More than its output_token_limit a model would refuse."""
    api.models = [model_entry("gemini-small", outputTokenLimit=2000)]
    assert ask(server.url, chat, model="gemini-small", max_tokens=100).status_code == 200
    assert config(api)["maxOutputTokens"] == 2000


def test_thoughts_that_took_all_room_get_more(server, api, chat):
    """The second try has more room, and its reply the same limit."""
    api.thoughts_only = 20_000
    assert ask(server.url, chat, max_tokens=50).status_code == 200
    rooms = [request["body"]["generationConfig"]["maxOutputTokens"] for request in api.chats]
    assert rooms == [50 + persona_memory.THOUGHT_TOKENS, 50 + persona_memory.MORE_THOUGHT_TOKENS]


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("STOP", "stop"), ("MAX_TOKENS", "length"), ("SAFETY", "content_filter"), ("RECITATION", "content_filter"),
     ("PROHIBITED_CONTENT", "content_filter"), ("OTHER", "stop"), (99, "stop")],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_finish_reasons_are_openais(server, api, chat, stream, reason, finish):
    """Each of Gemini's has one that clients know."""
    api.finish = reason
    text, found, _ = ask_reply(server, chat, stream)
    assert (text, found) == (api.last["answer"], finish)


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_thoughts_and_the_cache(server, api, chat, stream):
    """As Gemini counts; thoughts are part of the completion, as OpenAI's reasoning is."""
    api.steer(thoughts=70, cached=12, reply=lambda _: "Four words come back.")
    _, _, usage = ask_reply(server, chat, stream)
    assert usage["completion_tokens"] == 4 + 70
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 70
    assert usage["prompt_tokens_details"]["cached_tokens"] == 12
    assert usage["prompt_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_tokens_are_passed_on_one_by_one(server, api, chat):
    """While Gemini holds after three elements the client has seen three."""
    go_on = threading.Event()
    api.hold_after = (3, go_on)
    text = ""
    with client(server.url) as openai_client:
        stream = openai_client.chat.completions.create(model="gemini-flash-latest", messages=chat, stream=True)
        for number, part in enumerate(stream, 1):
            text += part.choices[0].delta.content or ""
            if number == 3:
                assert text
                go_on.set()
    assert text == api.last["answer"]


def test_the_openai_client_reads_all_of_it(server, api, chat):
    """Plain and streamed, its own types take the answers."""
    for stream in (False, True):
        reply = say(server.url, chat, stream=stream, model="gemini-flash-latest")
        assert (reply.status, reply.error, reply.text) == (200, None, api.last["answer"])
        assert "recalled=0" in reply.memory
    with client(server.url) as openai_client, pytest.raises(openai.NotFoundError, match="gemini-pro-latest"):
        openai_client.chat.completions.create(model="gemini-0", messages=chat)


# -- off, hanging up, the log


@pytest.mark.parametrize("stream", [False, True])
def test_off_answers_and_remembers_nothing(server, api, chat, stream):
    """The reply comes translated all the same; no chat is made of it."""
    before = chats_of(server)
    answer = ask(server.url, chat, headers={"X-Persona-Memory": "off"}, stream=stream)
    text = reply_of(answer, stream)[0]
    assert text == api.last["answer"]
    assert answer.headers["X-Persona-Memory"] == "off"
    assert "X-Chat-Id" not in answer.headers
    assert prompt_text(api.last["body"]) == "\n".join(entry["content"] for entry in chat)
    assert chats_of(server) == before


def chats_of(server) -> list[dict]:
    """The chats as they are listed, without their size: vectors of earlier turns may still be on their way to disk."""
    return [{k: v for k, v in chat.items() if k != "size"} for chat in get(server.url, f"{API}/chats")]


@pytest.mark.parametrize("stream", [False, True])
def test_off_fails_as_readably(server, api, chat, stream):
    """Errors keep their status and OpenAI's shape, and come to an end."""
    answer = ask(server.url, chat, headers={"X-Persona-Memory": "off"}, stream=stream, model="gemini-0")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_before_the_first_byte_ends_the_request(server, api, chat, stream):
    """Gemini need not think on for nobody."""
    api.hold = threading.Event()
    sock = hang_up_later(server, {"messages": chat, "stream": stream})
    api.wait_for_chats(1)
    sock.close()
    assert api.hangups.acquire(timeout=FOREVER)
    assert len(api.chats) == 1


@pytest.mark.parametrize("header", [b"", b"X-Persona-Memory: off\r\n"], ids=["on", "off"])
def test_hanging_up_in_the_middle_ends_the_request(server, api, chat, header):
    """The connection to Gemini is closed, and the next turn of the chat works."""
    api.hold_after = (3, threading.Event())
    sock = hang_up_later(server, {"messages": chat, "stream": True}, header)
    received = b""
    while received.count(b"data:") < 3:
        packet = sock.recv(65536)
        assert packet, received
        received += packet
    sock.close()
    assert api.hangups.acquire(timeout=FOREVER)
    api.hold_after = None
    assert ask(server.url, chat).status_code == 200


def test_the_process_says_nothing_about_googles_library(api, chat, data_dir):
    """As a user starts it: key and address from the environment, an answer, and a log without warnings or the key."""
    environment = {"GEMINI_API_KEY": KEY, "GOOGLE_GEMINI_BASE_URL": api.url}
    with Server(data_dir, "gemini", env=environment, embedder=False) as running:
        for stream in (False, True):
            assert say(running.url, chat, stream=stream, model="gemini-flash-latest").text == api.last["answer"]
        wait_until(lambda: "ok" in running.log(), "the turns in the log")
        log = running.log()
    assert api.last["headers"]["x-goog-api-key"] == KEY
    for words in ("Warning", "deprecated", "google.generativeai", "google-generativeai", KEY, "Traceback"):
        assert words not in log
