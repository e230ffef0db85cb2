"""Who may call which route, from where, and how much it may send: one table of every route, which /openapi.json tells
too."""

import inspect
import json
import re

import pytest
import schemathesis

import persona_memory as pm

KEY = "a-key-of-the-tests"
ROUTES = {  # "anyone": also without the key; "key": only with it
    "GET /": "anyone",
    "POST /api/classify": "key",
    "GET /api/classify/labels": "key",
    "POST /api/embed": "key",
    "POST /api/embeddings": "key",
    "POST /api/embeddings/compute": "key",
    "POST /api/extra/embeddings": "key",
    "GET /api/modules": "key",
    "GET /api/persona_memory/characters/<chat:character>": "key",
    "PATCH /api/persona_memory/characters/<chat:character>": "key",
    "GET /api/persona_memory/chats": "key",
    "GET /api/persona_memory/chats/<chat:chat>": "key",
    "DELETE /api/persona_memory/chats/<chat:chat>": "key",
    "GET /api/persona_memory/chats/<chat:chat>/emotions": "key",
    "GET /api/persona_memory/chats/<chat:chat>/export": "key",
    "POST /api/persona_memory/chats/<chat:chat>/facts": "key",
    "PATCH /api/persona_memory/chats/<chat:chat>/facts/<fact>": "key",
    "DELETE /api/persona_memory/chats/<chat:chat>/facts/<fact>": "key",
    "POST /api/persona_memory/chats/<chat:chat>/known": "key",
    "GET /api/persona_memory/chats/<chat:chat>/messages": "key",
    "POST /api/persona_memory/chats/<chat:chat>/messages": "key",
    "PATCH /api/persona_memory/chats/<chat:chat>/messages/<message>": "key",
    "DELETE /api/persona_memory/chats/<chat:chat>/messages/<message>": "key",
    "GET /api/persona_memory/chats/<chat:chat>/prompts": "key",
    "GET /api/persona_memory/chats/<chat:chat>/search": "key",
    "PATCH /api/persona_memory/chats/<chat:chat>/story/<summary>": "key",
    "POST /api/persona_memory/chats/<chat:chat>/sync": "key",
    "GET /api/persona_memory/health": "key",
    "POST /api/persona_memory/import": "key",
    "POST /api/persona_memory/inject": "key",
    "POST /api/persona_memory/pause": "key",
    "GET /api/persona_memory/search": "key",
    "GET /api/persona_memory/settings": "key",
    "GET /api/persona_memory/state": "key",
    "POST /api/summarize": "key",
    "POST /chat/completions": "key",
    "POST /completions": "key",
    "POST /embeddings": "key",
    "GET /extension.zip": "key",
    "GET /health": "anyone",
    "GET /metrics": "key",
    "GET /models": "key",
    "GET /models/<path:model>": "key",
    "GET /openapi.json": "key",
    "GET /persona_memory/": "anyone",
    "GET /persona_memory.git/info/refs": "anyone",  # the extension's code, for git, which sends no key
    "POST /persona_memory.git/git-upload-pack": "anyone",
    "POST /responses": "key",
    "POST /v1/chat/completions": "key",
    "POST /v1/completions": "key",
    "POST /v1/embeddings": "key",
    "GET /v1/models": "key",
    "GET /v1/models/<path:model>": "key",
    "POST /v1/responses": "key",
}


@pytest.fixture(scope="module")
def apps(tmp_path_factory):
    """The app with a key, and the one without."""
    data = tmp_path_factory.mktemp("access")
    made = [pm.Settings(proxy=True, data=str(data / k), upstream="http://127.0.0.1:9/v1", api_key=k) for k in (KEY, "")]
    apps = [pm.create_app(settings) for settings in made]
    yield apps
    for app in apps:
        app.extensions["persona_memory"].close()


def refusal(app, route: str, **headers) -> int:
    """The status of a call that does nothing, since its body is too large, with more headers."""
    method, rule = route.split()
    path = re.sub("<[^>]+>", "x", rule)
    body = {"content_length": str(pm.MAX_REQUEST_BYTES + 1)} if method in ("POST", "PATCH") else {}
    return app.test_client().open(path, method=method, headers={"Host": "127.0.0.1:5100"} | headers, **body).status_code


def test_the_table_lists_every_route(apps):
    """A new route needs a line here."""
    rules = apps[0].url_map.iter_rules()
    assert ROUTES.keys() == {f"{m} {rule}" for rule in rules for m in rule.methods - {"HEAD", "OPTIONS"}}


@pytest.mark.parametrize(("route", "who"), ROUTES.items(), ids=list(ROUTES))
def test_who_may_call_a_route_and_from_where(apps, route, who):
    """Without the key, with a wrong one, from a foreign page, under a foreign name, and embedded by another site."""
    locked, free = apps
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY[:-1]}):
        assert (refusal(locked, route, **headers) == 401) == (who == "key")
    foreign = {"Origin": "https://evil.example"}
    assert refusal(locked, route, Authorization=f"Bearer {KEY}", **foreign) == 403
    assert refusal(free, route, **foreign) == 403
    assert refusal(free, route, Host="evil.example") == 403
    assert refusal(free, route, **{"Sec-Fetch-Site": "cross-site"}) == 403


@pytest.mark.parametrize("key", ["gr\u00fcn", "\u043a\u043e\u0442", "a ? b"])
def test_a_key_may_be_of_any_letters(tmp_path, key):
    """A header's bytes reach the program as Latin-1 (PEP 3333); clients send UTF-8, and browsers Latin-1 where that has
    the letters. Letters that it has not are no question marks."""
    app = pm.create_app(pm.Settings(proxy=True, data=str(tmp_path), upstream="http://127.0.0.1:9/v1", api_key=key))
    sent = [key.encode().decode("latin-1"), *([key] if max(key) < "\u0100" else [])]
    for given in sent:
        assert refusal(app, "POST /v1/chat/completions", Authorization=f"Bearer {given}") == 413
    for given in ("???", "gr?n", key.encode().decode("latin-1") + "x", "a"):
        assert refusal(app, "POST /v1/chat/completions", Authorization=f"Bearer {given}") == 401
    app.extensions["persona_memory"].close()


@pytest.mark.parametrize("more", [{}, {"X-Persona-Memory": "off"}])
def test_an_upstreams_key_that_cannot_be_sent_is_refused_in_words(apps, more):
    """As of a key that was pasted with an ellipsis."""
    headers = {"Host": "127.0.0.1", "Authorization": "Bearer sk-\u00e2\u0080\u00a6", **more}
    asked = {"model": "m", "messages": [{"role": "user", "content": "Hello."}]}
    answer = apps[1].test_client().post("/v1/chat/completions", json=asked, headers=headers)
    assert answer.status_code == 400 and "API key" in answer.get_json()["error"]["message"]


@pytest.mark.parametrize("route", [r for r in ROUTES if r.split()[0] in ("POST", "PATCH")])
def test_a_body_that_is_too_large_is_refused_unread(apps, route):
    """Everywhere; what this program does not offer is not read at all."""
    offered = not route.endswith(("/responses", "POST /completions", "v1/completions"))
    assert refusal(apps[1], route) == (413 if offered else 404)


@pytest.fixture(scope="module")
def documents(apps):
    """What each app says of its routes."""
    headers = {"Host": "127.0.0.1", "Authorization": f"Bearer {KEY}"}
    return [app.test_client().get("/openapi.json", headers=headers).get_json() for app in apps]


def test_the_document_has_every_route_and_who_may_call_it(documents):
    """The key's app asks for the key where the table says so; the other one for none. No route answers undeclared."""
    told = {re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", route): who for route, who in ROUTES.items()}
    for document, locked in zip(documents, (True, False), strict=True):
        operations = {f"{m.upper()} {path}": o for path, some in document["paths"].items() for m, o in some.items()}
        assert operations.keys() == told.keys()
        assert len({o["operationId"] for o in operations.values()}) == len(operations)
        for route, operation in operations.items():
            assert (operation["security"] != []) == (locked and told[route] == "key")
            assert ("401" in operation["responses"]) == (told[route] == "key") and "403" in operation["responses"]
            assert ("413" in operation["responses"]) == route.startswith(("POST", "PATCH"))
            assert operation["summary"].endswith(".")


def test_the_document_tells_what_each_route_reads(documents, apps):
    """A body for whatever takes one; and every query parameter and header that a view asks for by its name."""
    for path, some in documents[0]["paths"].items():
        for method, operation in some.items():
            refused = "200" not in operation["responses"]  # what is not offered reads nothing
            assert ("requestBody" in operation) == (method in ("post", "patch") and not refused), path
    read = {}
    for rule in apps[0].url_map.iter_rules():
        code = inspect.unwrap(apps[0].view_functions[rule.endpoint]).__code__
        asked = {*code.co_names, *code.co_consts}
        assert not {"args", "form", "values", "cookies", "files"} & asked, rule
        read[re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)] = {c for c in asked if str(c).startswith("X-")}
    for path, names in read.items():
        for operation in documents[0]["paths"][path].values():
            assert names <= {told["name"] for told in operation["parameters"] if told["in"] == "header"}, path


def test_the_document_is_openapi(documents):
    """As the specification's own schema has it, which the fuzz test's library carries."""
    schemathesis.openapi.from_dict(documents[0]).validate()


@pytest.mark.parametrize(
    ("path", "query"),
    [("/chats/x/messages", "limit=-1"), ("/chats/x/messages", "offset=9999999999"), ("/chats/x/search", "q=%20"),
     ("/chats/x/search", "q=a&wait=never"), ("/chats/x/emotions", "until=soon"), ("/chats/x/export", "format=pdf"),
     ("/search", "")],
)  # fmt: skip
def test_a_query_that_the_document_excludes_is_refused_by_name(apps, path, query):
    """With the parameter that is wrong."""
    answer = apps[1].test_client().get(f"/api/persona_memory{path}?{query}", headers={"Host": "127.0.0.1"})
    error = answer.get_json()["error"]
    assert answer.status_code == 400 and error["param"] in (query.rpartition("&")[2].partition("=")[0] or "q")


LONG = "x" * (pm.LONGEST_ID + 1)


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [("POST", f"chats/{LONG}/messages", {"messages": [{"role": "user", "content": "Hi."}]}, "chat_id"),
     ("POST", "chats/x/messages", {"messages": [{"role": "user", "content": "Hi.", "name": LONG}]}, "messages[0].name"),
     ("POST", "inject", {"chat_id": LONG, "messages": [{"role": "user", "content": "Hi."}]}, "chat_id"),
     ("POST", "inject", {"chat_id": "x", "character": LONG, "messages": [{"role": "user"}]}, "character"),
     ("PATCH", f"characters/{LONG}", {"carry_over": True}, "character"),
     ("POST", f"import?chat_id={LONG}", {"user_name": "A"}, "chat_id")],
)  # fmt: skip
def test_ids_and_names_have_a_limit(apps, method, path, body, param):
    """The stated one, everywhere, and just that: one character less is taken."""
    client, headers = apps[1].test_client(), {"Host": "127.0.0.1"}

    def answer(cut: int):
        rows = [{"user_name": "A", "character_name": "B"}, {"name": "A", "is_user": True, "mes": "Hi."}]
        given = "\n".join(map(json.dumps, rows)) if path.startswith("import") else json.dumps(body)
        given, place = (text.replace(LONG, LONG[cut:]) for text in (given, path))
        return client.open(f"/api/persona_memory/{place}", method=method, data=given, headers=headers)

    refused = answer(0)
    assert refused.status_code == 400 and refused.get_json()["error"]["param"] == param
    assert answer(1).status_code == 200


def test_a_turn_in_a_chat_with_a_long_id_is_refused(apps):
    """Before the upstream is asked: its answer would be nobody's."""
    body = {"messages": [{"role": "user", "content": "Hi."}], "chat_id": LONG}
    answer = apps[1].test_client().post("/v1/chat/completions", json=body, headers={"Host": "127.0.0.1"})
    assert answer.status_code == 400 and answer.get_json()["error"]["param"] == "chat_id"
