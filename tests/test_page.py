"""The memory page in Chromium: every thing it offers is done as a user does it, and what then shows is looked at."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import DESKTOP, PHONE, close_pages, needs_chromium, open_browser
from chats import open_chat
from fakes import LocalServer, Upstream, branch_texts, figure, free_port, hang_up_later, say, settings, wait_until
from playwright.sync_api import expect
from roleplay import PERSONA, messages, play
from test_looking import PIXEL

import persona_memory as pm

pytestmark = needs_chromium
expect.set_options(timeout=20_000)
SYSTEM = {"role": "system", "content": PERSONA}


@pytest.fixture(scope="module")
def browser():
    """One Chromium for the module."""
    with open_browser() as running:
        yield running


@pytest.fixture
def visit(browser):
    """Opens an address in a fresh profile; whatever the page complains about fails the test."""
    complaints, contexts = [], []

    def open_page(url, viewport=DESKTOP, scheme="light", **more):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.complaints = complaints
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        close_pages(*context.pages)
        context.close()
    # A server may stop before the pages that ask it: what a page says then is no fault of its own.
    gone = ("Failed to load resource", "The server does not answer.")
    assert [c for c in complaints if not c.startswith(gone)] == []


class Told:
    """A server with a chat that has been played: summary, facts, recalled memories, swipes."""

    def __init__(self, upstream, server):
        self.upstream, self.server, self.url = upstream, server, server.url
        self.chat = messages("keep", "Tobin")[:91]
        self.id = play(self.url, upstream, self.chat)
        wait_until(lambda: self.get()["facts"], "the summary to be written")

    def get(self, rest="", **query):
        answer = httpx.get(f"{self.url}{self.path}{rest}", params=query, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def path(self):
        return f"/api/persona_memory/chats/{quote(self.id, safe='')}"

    def link(self, tab=""):
        return f"{self.url}/#/chat/{quote(self.id, safe='')}{tab}"

    def row(self, index):
        return self.get("/messages", offset=index, limit=1)["messages"][0]

    def turn(self, text, reply="Aye."):
        """One more turn of the chat; the last reply of the played one is shown with it."""
        self.upstream.steer(reply=lambda body: reply)
        self.chat.append({"role": "user", "name": "Tobin", "content": text})
        answer = say(self.url, [SYSTEM, *self.chat])
        assert answer.chat_id == self.id
        self.chat.append({"role": "assistant", "name": "Maren", "content": reply})
        return answer


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The played chat, shared by the tests that only look or take back what they change."""
    with Upstream() as upstream:
        data = tmp_path_factory.mktemp("told") / "data"
        with LocalServer(settings(data, upstream.url, context=1500, summary_every=20)) as server:
            yield Told(upstream, server)


@pytest.fixture(scope="module")
def asked(told):
    """The same after a question whose answer has left the prompt."""
    told.turn("Maren, do you remember how I hurt my knee, and which ship my sister took?")
    return told


def number_of_rows(page):
    return page.locator(".message[aria-posinset]").count()


def scrolled(page, index):
    """The row of a message, gone to as a user does."""
    page.get_by_label("Message number").fill(str(index + 1))
    page.get_by_role("button", name="Go", exact=True).click()
    row = page.locator(f".message[aria-posinset='{index + 1}']")
    expect(row).to_be_in_viewport()
    return row


# ---------------------------------------------------------------------------- all chats


def test_a_newcomer_is_led_to_the_first_chat_by_three_steps_that_tick_themselves_off(visit, server, upstream):
    """The model, the address to copy, the chat; all without a reload. A lone prompt is no chat yet, and the page says
    so."""
    upstream.steer(models=[])
    page = visit(server.url, permissions=["clipboard-read", "clipboard-write"])
    steps = page.get_by_role("list").get_by_role("listitem")
    expect(steps).to_have_count(3)
    expect(page.get_by_text("Waiting for the model")).to_be_visible()
    expect(steps.nth(0)).not_to_contain_text("Done")
    upstream.steer(models=None)  # the page looks again by itself
    expect(steps.nth(0)).to_contain_text("Done: A model that answers")
    expect(steps.nth(0)).to_contain_text(upstream.url)
    expect(page.get_by_text("Waiting for the first request")).to_be_visible()
    page.get_by_role("button", name="Copy the base URL").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == f"{server.url}/v1"
    first = {"role": "user", "content": "Is the lamp lit?"}
    reply = {"role": "assistant", "content": say(server.url, [SYSTEM, first]).text}
    expect(steps.nth(1)).to_contain_text("Done: Connect your client")
    expect(page.get_by_text("A message has arrived.")).to_be_visible()
    say(server.url, [SYSTEM, first, reply, {"role": "user", "content": "Good."}])
    expect(page.get_by_role("link", name="Unnamed character")).to_be_visible()
    expect(page.get_by_text("It works: your first chat is here.")).to_be_visible()
    expect(steps).to_have_count(1)


def test_the_first_step_says_why_the_model_does_not_answer(visit, server, upstream):
    """With what to do. A key that the upstream refuses is not one that this page asks for."""
    upstream.steer(status=401, error="Wrong key.")
    say(server.url, [SYSTEM, {"role": "user", "content": "Hello"}])
    page = visit("about:blank")
    refused = {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}
    page.route("**/v1/models", lambda route: route.fulfill(status=401, json=refused))
    page.goto(server.url)
    expect(page.get_by_role("listitem").nth(0)).to_contain_text("Wrong key. The key was refused")
    upstream.steer(status=200)
    say(server.url, [SYSTEM, {"role": "user", "content": "Hello"}])
    expect(page.get_by_role("listitem").nth(0)).to_contain_text("Incorrect API key")
    expect(page.get_by_label("API key")).to_have_count(0)


def test_the_list_says_what_each_chat_is_and_leads_there(visit, told):
    """Character, messages, size on disk, time; the link opens the chat."""
    page = visit(told.url)
    row = page.locator(".chats > li").filter(has_text="Maren")
    expect(row).to_contain_text(f"{told.get()['messages']} messages")
    expect(row).to_contain_text(re.compile(r"\d+ [kM]B"))
    expect(row.locator("time")).to_have_attribute("datetime", re.compile(r"\d{4}-\d\d-\d\dT"))
    row.get_by_role("link", name="Maren").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Maren")


def test_a_chat_shows_the_picture_that_its_client_gave(visit, server):
    """In the list and above the chat, as an ornament: the name stands beside it."""
    shown = {"messages": [{"role": "user", "content": "Hello"}], "character": "Mira", "picture": PIXEL}
    address = f"{server.url}/api/persona_memory/chats/seen/sync"
    assert httpx.post(address, json=shown, timeout=60).status_code == 200
    page = visit(server.url)
    for _ in range(2):
        expect(page.locator("img.avatar")).to_have_attribute("aria-hidden", "true")
        wait_until(lambda: page.locator("img.avatar").evaluate("image => image.naturalWidth === 1"), "the picture")
        page.goto(f"{server.url}/#/chat/seen")
        expect(page.get_by_role("heading", level=1)).to_have_text("Mira")


def test_a_chat_without_a_character_is_called_what_its_client_calls_it(visit, server):
    """Its id stands below."""
    shown = {"messages": [{"role": "user", "content": "Hello"}], "title": "By the sea"}
    assert httpx.post(f"{server.url}/api/persona_memory/chats/beach/sync", json=shown, timeout=60).status_code == 200
    page = visit(server.url)
    expect(page.locator(".chats > li")).to_contain_text("beach")
    page.get_by_role("link", name="By the sea").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("By the sea")


def test_a_search_finds_words_in_every_chat_and_jumps_there(visit, told):
    """All words must be there, in any order and case; the message is then in view and marked."""
    page = visit(told.url)
    page.get_by_label("Search all chats").fill("heron WANDERING")
    hit = page.locator(".hit").first
    expect(hit.locator("mark").first).to_have_text(re.compile("wandering|heron", re.I))
    hit.click()
    expect(page.locator(".message.found")).to_be_in_viewport()
    expect(page.locator(".message.found")).to_contain_text("Wandering Heron")


def test_deleting_names_what_goes_and_waits_for_a_yes(visit, server):
    """Keep keeps; the second time the chat is gone from the page, the API and the disk."""
    for name in ("first", "second"):
        say(server.url, [SYSTEM, {"role": "user", "content": f"Hello {name}"}], chat_id=name)
    page = visit(server.url)
    row = page.locator(".chats > li").filter(has_text="first")
    row.get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("1 message")
    expect(dialog).to_contain_text("first")
    dialog.get_by_role("button", name="Keep").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    row.get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Delete the chat").click()
    expect(row).to_have_count(0)
    expect(page.locator(".chats > li")).to_have_count(1)
    assert [c["chat_id"] for c in httpx.get(f"{server.url}/api/persona_memory/chats").json()] == ["second"]


def test_a_chat_goes_out_as_a_file_and_comes_in_again(visit, told, server):
    """Both kinds of file, chosen or dropped; the other server then remembers the same branch."""
    page = visit(told.url)
    files = {}
    for button, ending in (("Everything (JSON)", ".json"), ("SillyTavern chat file", ".jsonl")):
        page.locator(".chats > li").filter(has_text="Maren").get_by_role("button", name="Export").click()
        with page.expect_download() as saved:
            page.get_by_role("dialog").get_by_role("button", name=button).click()
        assert saved.value.suggested_filename == f"Maren{ending}"
        files[ending] = Path(saved.value.path()).read_bytes()
    assert len(files[".jsonl"].splitlines()) == len(branch_texts(told.url, told.id)) + 1  # its first line is a header

    other = visit(server.url)
    chosen = {"name": "Maren.json", "mimeType": "application/json", "buffer": files[".json"]}
    other.locator("input[type=file]").set_input_files(chosen)
    expect(other.get_by_role("link", name="Maren")).to_be_visible()
    expect(other.locator(".toast")).to_contain_text("messages imported")
    assert branch_texts(server.url, told.id) == branch_texts(told.url, told.id)
    other.evaluate(
        """text => {
          const files = new DataTransfer();
          files.items.add(new File([text], "Dropped.jsonl"));
          const drop = new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true });
          document.querySelector("main > *").dispatchEvent(drop);
        }""",
        files[".jsonl"].decode(),
    )
    expect(other.locator(".toast").last).to_have_text("Dropped.jsonl: no new messages.")
    expect(other.locator(".chats > li")).to_have_count(1)
    half = {**chosen, "name": "half.jsonl", "buffer": b'{"mes": "Hm.", "is_user": true}\n{"mes": "cut'}
    other.locator("input[type=file]").set_input_files(half)
    expect(other.locator(".toast").last).to_contain_text("half.jsonl, skipped: line 2 is not valid JSON")
    other.locator("input[type=file]").set_input_files({**chosen, "name": "broken.json", "buffer": b"no chat"})
    expect(other.locator(".toast.failed").last).to_contain_text("broken.json")
    expect(other.get_by_role("alert").last).to_contain_text("broken.json")


def test_a_server_that_stops_in_the_middle_of_its_answer_is_named(visit, told):
    """Such an answer's head has come, and its body never does."""
    page = visit(told.url)
    page.locator(".chats > li").get_by_role("button", name="Export").click()
    page.evaluate(
        """() => {
          const pull = (body) => body.error(new TypeError("Failed to fetch"));
          window.fetch = async () => new Response(new ReadableStream({ pull }));
        }"""
    )
    page.get_by_role("dialog").get_by_role("button", name="Everything (JSON)").click()
    expect(page.locator(".toast.failed").last).to_contain_text("The server does not answer.")


def test_a_message_of_another_branch_is_shown_by_itself(visit, server, upstream):
    """The search across chats finds what was said before an edit; the current branch has no place for it."""
    upstream.steer(reply=lambda body: "Aye.")
    reply, last = {"role": "assistant", "content": "Aye."}, {"role": "user", "content": "Then light it."}
    for said in ("Is the copper lamp lit?", "Is the silver lamp lit?"):
        say(server.url, [SYSTEM, {"role": "user", "content": said}, reply, last], chat_id="edited")
    page = visit(server.url)
    page.get_by_label("Search all chats").fill("copper")
    page.locator(".hit").click()
    expect(page.get_by_role("dialog")).to_contain_text("#1, on another branch")
    expect(page.get_by_role("dialog")).to_contain_text("Is the copper lamp lit?")
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    expect(page.locator(".message.found")).to_contain_text("Is the silver lamp lit?")
    page.get_by_role("button", name="Compare 2 versions").first.click()
    expect(page.get_by_role("dialog")).to_contain_text("copper")


# ---------------------------------------------------------------------------- what a chat remembers


def test_the_persona_the_summary_and_the_facts_are_there_and_can_be_changed(visit, told):
    """An edited summary is the user's from then on; a fact is edited, pinned, forgotten after a question."""
    page = visit(told.link())
    expect(page.get_by_text("keeper of the lighthouse on the Teeth")).to_be_visible()
    story = page.locator(".card").filter(has=page.get_by_role("heading", name="Summary so far"))
    first = story.locator("li").first
    expect(first).to_contain_text("#1 to #20")
    first.get_by_role("button", name="Edit").click()
    page.get_by_label("Summary").fill("Tobin came in from the storm.")
    page.get_by_label("Summary").press("Control+Enter")
    expect(first).to_contain_text("Tobin came in from the storm.")
    expect(first).to_contain_text("in your words")
    assert told.get()["story"][0]["source"] == "user"

    facts = page.locator(".card").filter(has=page.get_by_role("heading", name="Facts"))
    fact, known = facts.locator("li").first, told.get()["facts"]
    fact.get_by_role("button", name="Edit").click()
    page.get_by_label("Fact").fill("The lamp needs oil.")
    page.get_by_role("button", name="Save").click()
    expect(facts).to_contain_text("The lamp needs oil.")
    fact = facts.locator("li").filter(has_text="The lamp needs oil.")
    fact.get_by_role("button", name="Pin").click()
    expect(fact.get_by_role("button", name="Unpin")).to_be_visible()
    assert next(f for f in told.get()["facts"] if f["text"] == "The lamp needs oil.")["pinned"]
    fact.get_by_role("button", name="Forget").click()
    expect(page.get_by_role("dialog")).to_contain_text("The lamp needs oil.")
    page.get_by_role("dialog").get_by_role("button", name="Forget it").click()
    expect(fact).to_have_count(0)
    assert len(told.get()["facts"]) == len(known) - 1


def test_a_message_is_edited_pinned_and_forgotten_and_all_of_it_taken_back(visit, told):
    """What the API then says is what the page said."""
    page = visit(told.link("/messages"))
    row = scrolled(page, 6)
    before = told.row(6)["content"]
    row.get_by_role("button", name="Edit").click()
    page.get_by_label("Message 7").fill("I am Maren, and the lamp is mine.")
    page.get_by_role("button", name="Save").click()
    expect(row).to_contain_text("I am Maren, and the lamp is mine.")
    assert (told.row(6)["content"], told.row(6)["original"]) == ("I am Maren, and the lamp is mine.", before)
    row.get_by_role("button", name="Restore the original").click()
    expect(row).to_contain_text(before)
    assert not told.row(6)["edited"]

    row.get_by_role("button", name="Pin").click()
    expect(row.get_by_text("Pinned")).to_be_visible()
    page.get_by_role("link", name="Memory", exact=True).click()
    pinned = page.locator(".card").filter(has=page.get_by_role("heading", name="Pinned messages"))
    expect(pinned).to_contain_text(before)
    pinned.get_by_role("button", name="Unpin").click()
    expect(pinned).not_to_contain_text(before)
    assert not told.row(6)["pinned"]

    page.get_by_role("link", name="Messages", exact=True).click()
    row = scrolled(page, 6)
    row.get_by_role("button", name="Forget").click()
    expect(row.get_by_text("Forgotten", exact=True)).to_be_visible()
    assert told.row(6)["forgotten"]
    page.get_by_role("button", name="Undo").click()
    expect(row.get_by_text("Forgotten", exact=True)).to_be_hidden()
    assert not told.row(6)["forgotten"]


def test_a_forgotten_message_is_erased_after_a_question(visit, server):
    """Nothing is left to take back; the row keeps its place and says so."""
    for said in ("The spare key is under the third step.", "Good to know."):
        say(server.url, [SYSTEM, {"role": "user", "content": said}], chat_id="erased")
    path = f"{server.url}/api/persona_memory/chats/erased"
    row = httpx.get(f"{path}/messages").json()["messages"][0]
    httpx.delete(f"{path}/messages/{row['id']}")
    page = visit(f"{server.url}/#/chat/erased")
    forgotten = page.locator(".card").filter(has=page.get_by_role("heading", name="Forgotten messages"))
    expect(forgotten).to_contain_text("third step")
    forgotten.get_by_role("button", name="Erase").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep").click()
    expect(forgotten.get_by_role("button", name="Remember again")).to_be_visible()
    forgotten.get_by_role("button", name="Erase").click()
    page.get_by_role("dialog").get_by_role("button", name="Erase it").click()
    expect(forgotten).to_contain_text("erased from the disk")
    expect(forgotten.get_by_role("button")).to_have_count(0)
    assert "third step" not in httpx.get(f"{path}/messages").text
    page.goto(f"{server.url}/#/chat/erased/messages")
    erased = page.locator(".message[aria-posinset='1']")
    expect(erased.get_by_text("Erased", exact=True)).to_be_visible()
    expect(erased.get_by_role("button")).to_have_count(0)


def test_a_summary_of_the_users_whose_messages_have_changed_is_shown_as_such(visit, told):
    """Its words are not lost; they only do not count."""
    own = told.get()["story"][0] | {"id": "own", "text": "My own words for the storm.", "start": 0, "end": 4}
    page = visit("about:blank")
    spoil(page, "/chats/[^/]+\\?", lambda chat: chat | {"replaced": [own]})
    page.goto(told.link())
    card = page.locator(".card").filter(has=page.get_by_role("heading", name="Your summaries of changed messages"))
    expect(card).to_contain_text("#1 to #5")
    expect(card).to_contain_text("My own words for the storm.")
    clean = visit(told.link())
    expect(clean.get_by_role("heading", name="Facts")).to_be_visible()
    expect(clean.get_by_role("heading", name="Your summaries of changed messages")).to_be_hidden()


def test_a_damaged_chat_says_so_in_the_list(visit, upstream, data_dir):
    """In words, beside the chats that are well."""
    given = settings(data_dir, upstream.url)
    with LocalServer(given) as server:
        for name in ("sound", "broken"):
            say(server.url, [SYSTEM, {"role": "user", "content": "Hello"}], chat_id=name)
    pm.database_of(data_dir / "chats" / pm.chat_folder("broken")).write_bytes(b"no database" * 1000)
    with LocalServer(given) as server:
        httpx.get(f"{server.url}/api/persona_memory/chats/broken")
        page = visit(server.url)
        row = page.locator(".chats > li").filter(has_text="broken")
        state = next(c for c in httpx.get(f"{server.url}/api/persona_memory/chats").json() if c["chat_id"] == "broken")
        expect(row.locator(".chip")).to_have_text("Damaged" if state["state"] == "chat_damaged" else "Repaired")
        expect(row).to_contain_text(state["words"])
        expect(page.locator(".chats > li").filter(has_text="sound").locator(".chip")).to_have_count(0)


def test_a_message_shows_who_spoke_what_it_feels_and_how_much_it_matters(visit, told):
    """The feeling stands there as a word, never as a colour alone; importance as a picture with words."""
    page = visit(told.link("/messages"))
    row = scrolled(page, 10)
    expect(row.locator(".who")).to_have_text(told.row(10)["name"])
    expect(row.locator(".chip").first).to_have_text(re.compile(rf"({'|'.join(pm.EMOTIONS)})\d+ %"))
    expect(row.get_by_role("img", name=re.compile(r"Importance \d+ %"))).to_be_visible()


def test_escape_takes_an_edit_back_and_the_focus_stays_where_it_was(visit, told):
    """By keyboard alone."""
    page = visit(told.link("/messages"))
    button = scrolled(page, 8).get_by_role("button", name="Edit")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message 9")).to_be_focused()
    page.keyboard.type("never saved ")
    page.keyboard.press("Escape")
    expect(button).to_be_focused()
    assert "never saved" not in told.row(8)["content"]


def test_swipes_are_marked_and_stand_side_by_side(visit, server, upstream):
    """The reply that the chat went on with, and the one that was swiped away, each with what came after it."""
    first = {"role": "user", "content": "Who goes there?"}
    upstream.steer(reply=lambda body: "A ghost with wet boots.")
    chat = say(server.url, [SYSTEM, first]).chat_id
    upstream.steer(reply=lambda body: "A traveller from Harrowmere.")
    say(server.url, [SYSTEM, first])
    chosen = {"role": "assistant", "content": "A traveller from Harrowmere."}
    say(server.url, [SYSTEM, first, chosen, {"role": "user", "content": "Come in, then."}])
    page = visit(server.url)
    page.goto(f"{server.url}/#/chat/{chat}/messages")
    page.get_by_role("button", name="Compare 2 versions").click()
    versions = page.get_by_role("dialog").locator("section")
    expect(versions).to_have_count(2)
    expect(versions.nth(0)).to_contain_text("A traveller from Harrowmere.")
    expect(versions.nth(0)).to_contain_text("Come in, then.")
    expect(versions.nth(1)).to_contain_text("A ghost with wet boots.")
    expect(versions.nth(1)).to_contain_text("The chat went no further here")
    page.go_back()  # a dialog belongs to its view
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_chats_with_a_character_may_know_of_each_other(visit, told):
    """The box is what the API says."""
    page = visit(told.link())
    box = page.get_by_label("Recall from other chats with Maren too")
    expect(box).not_to_be_checked()
    for wanted in (True, False):
        box.set_checked(wanted)
        address = f"{told.url}/api/persona_memory/characters/Maren"
        wait_until(lambda w=wanted, a=address: httpx.get(a).json()["carry_over"] is w, "the box to be heard")


# ---------------------------------------------------------------------------- why


def test_what_comes_to_mind_is_shown_with_its_reasons(visit, told):
    """As one types; each memory with a score, bars by reason, and the way to its place."""
    page = visit(told.link("/recall"))
    expect(page.get_by_label("What does it remember?")).to_be_focused()
    page.keyboard.type("Which ship did my sister take?")
    best = page.locator("main .list > li").first
    expect(best).to_contain_text("Wandering Heron")
    expect(best.locator(".bars")).to_contain_text("Meaning")
    expect(best.locator(".score")).to_have_text(re.compile(r"\d\.\d\d"))
    expect(best).not_to_contain_text("Would not be recalled")
    widths = best.locator(".track i").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert max(widths) == pytest.approx(64, abs=1) and min(widths) < 64
    best.get_by_role("link", name="#").click()
    expect(page.locator(".message.found")).to_contain_text("Wandering Heron")


def test_small_talk_would_bring_nothing_back(visit, told):
    """The nearest messages are shown, as such; those that the last prompt held are marked."""
    page = visit(told.link("/recall"))
    page.get_by_label("What does it remember?").fill("Okay.")
    expect(page.get_by_role("status").filter(has_text="Nothing would be recalled")).to_be_visible()
    rows = page.locator("main .list > li")
    assert 0 < rows.count() < 12
    expect(rows.filter(has_text=re.compile("Would not be recalled|In the prompt"))).to_have_count(rows.count())
    newest = told.get("/messages")["messages"][-1]["content"]
    page.get_by_label("What does it remember?").fill(newest[:400])
    expect(rows.filter(has_text=newest[:60]).first).to_contain_text("In the prompt")


def test_the_timeline_has_the_seven_feelings_and_leads_to_its_moments(visit, told):
    """By click, by keyboard, and by a click on a place of the chart."""
    page = visit(told.link("/mood"))
    chart = page.locator(".timeline")
    expect(chart.locator("g text")).to_have_text(list(pm.EMOTIONS))
    assert all(len(d) > 100 for d in chart.locator("path").evaluate_all("all => all.map(p => p.getAttribute('d'))"))
    moment = chart.locator("a").first
    name = moment.get_attribute("aria-label")
    index = int(re.match(r"Message (\d+): (\w+)", name)[1]) - 1
    rows = told.get("/emotions")["messages"]
    assert rows[index]["label"] == re.match(r"Message (\d+): (\w+)", name)[2]
    moment.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".message.found")).to_have_attribute("aria-posinset", str(index + 1))
    page.go_back()
    chart.click(position={"x": 400, "y": 20})
    expect(page.locator(".message.found")).to_be_in_viewport()
    page.go_back()
    page.get_by_role("button", name="You").click()
    expect(page.get_by_role("button", name="You")).to_have_attribute("aria-pressed", "true")
    places = page.locator("ol.list a").all_inner_texts()
    assert places and all(rows[int(p.split("#")[1]) - 1]["role"] == "user" for p in places)


def test_a_prompt_says_what_went_in_and_what_it_cost(visit, asked):
    """The bar's parts are the report's tokens and fill the context; the memories can be read."""
    report = asked.get("/prompts")["prompts"][0]
    page = visit(asked.link("/prompts"))
    card = page.locator(".prompt").first
    expect(card).to_be_visible()
    parts = card.locator(".share i").evaluate_all("all => all.map(i => Number(i.style.getPropertyValue('--share')))")
    assert sum(parts) == report["context"]
    shown = {"persona": "Persona", "story": "Summary and facts", "memories": "Memories and mood", "history": "History"}
    for share, word in shown.items():
        expect(card.locator(".legend")).to_contain_text(f"{word}{report['tokens'][share]:,}")
    expect(card).to_contain_text(f"{int(100 * report['reused'] + 0.5)} % reused from the previous prompt")
    expect(card).to_contain_text("ms added")
    card.locator("summary").first.click()
    expect(card.locator("details li").first.locator(".text")).to_have_text(
        asked.get("/messages", tip=report["recalled"][0]["id"], offset=report["recalled"][0]["index"], limit=1)[
            "messages"
        ][0]["content"]
    )
    expect(card.locator("details .bars").first).to_be_visible()


def test_a_prompt_says_how_it_ended_where_no_reply_came(visit, server, upstream):
    """One whose client hung up, one that failed, and one that was answered: for the same message."""
    turn = [SYSTEM, {"role": "user", "content": "Who lit the lamp?"}, {"role": "assistant", "content": "I did."}]
    turn.append({"role": "user", "content": "And who put it out?"})
    held = threading.Event()
    upstream.steer(hold=held)
    gone = hang_up_later(server, {"model": "fake-model", "stream": True, "messages": turn})
    wait_until(lambda: any("completions" in r["path"] for r in upstream.requests), "the request to be passed on")
    gone.close()
    wait_until(lambda: figure(server, 'requests_total{outcome="client_gone"}') == 1, "the hang-up to be noticed")
    held.set()
    upstream.steer(hold=None, status=400, error="Bad request.")
    say(server.url, turn)
    upstream.steer(status=200)
    chat = say(server.url, turn).chat_id
    page = visit(f"{server.url}/#/chat/{quote(chat, safe='')}/prompts")
    cards = page.locator(".prompt")
    expect(cards).to_have_count(3)
    expect(cards.nth(0).locator(".row .chip")).to_have_count(0)
    expect(cards.nth(1).locator(".row .chip")).to_have_text("Failed")
    expect(cards.nth(2).locator(".row .chip")).to_have_text("Stopped by the client")


def test_what_was_left_out_of_a_prompt_is_shown_with_its_reason(visit, told):
    """Where the report says so; and what the model has told that makes prompts shorter."""
    store = open_chat(told.server, told.id).store
    row = told.row(3)
    left = {"id": row["id"], "index": 3, "role": row["role"], "name": row["name"], "score": 1.5, "reason": "no room"}
    learned = {"ratio": 1.25, "limit": 4096}
    page = visit("about:blank")
    page.route(
        "**/prompts?*",
        lambda route: route.fulfill(json={"prompts": [store.reports(1)[0] | learned | {"left_out": [left]}]}),
    )
    page.goto(told.link("/prompts"))
    expect(page.locator(".prompt")).to_contain_text("Your model counts 25 % more tokens")
    expect(page.locator(".prompt")).to_contain_text("its context is 4,096 tokens")
    page.get_by_text("1 left out").click()
    expect(page.locator("details li")).to_contain_text(row["content"])
    expect(page.locator("details li")).to_contain_text("No room")


# ---------------------------------------------------------------------------- values that nobody expects

ODD = [None, True, -1, 1e300, "soon", "2024-W05-1", [], [None], {"onclick": "window.hacked = 1"}]


def odd_rows(row, *kept):
    """That row once for each odd value, which then is what all its fields hold but those kept and its id."""
    ids = {"id", "chat_id", "at"} - {*kept}
    return [
        {key: f"odd{i}" if key in ids else row[key] if key in kept else value for key in row}
        for i, value in enumerate(ODD)
    ]


def spoil(page, address, change):
    """Has the server's answers of that address changed on their way to the page."""

    def pass_on(route):
        answer = route.fetch()
        route.fulfill(response=answer, json=change(answer.json()))

    page.route(re.compile(address), pass_on)


def test_a_date_that_no_browser_can_read_is_shown_as_it_is(visit, told):
    """Python reads more of ISO 8601 than JavaScript; neither such a date nor any other value breaks the messages."""
    dates = ["2024-W05-1", "20240101T101010", "", "soon", *ODD]

    def date_oddly(answer):
        pairs = zip(answer["messages"], dates, strict=False)
        return answer | {"messages": [row | {"timestamp": date, "at": date} for row, date in pairs]}

    page = visit("about:blank")
    spoil(page, "/messages", date_oddly)
    page.goto(told.link("/messages"))
    for index in range(len(dates)):
        expect(scrolled(page, index).locator(".text").first).to_contain_text(told.row(index)["content"][:30])
    expect(scrolled(page, 0)).to_contain_text("2024-W05-1")
    expect(page.locator(".toast")).to_have_count(0)


def test_a_date_ahead_is_not_just_now(visit, told):
    """A clock that is wrong, or a story of the future."""
    page = visit("about:blank")
    spoil(page, "/messages", lambda answer: {**answer, "messages": [
        row | {"timestamp": "2999-01-01T00:00:00Z"} for row in answer["messages"]
    ]})  # fmt: skip
    page.goto(told.link("/messages"))
    expect(scrolled(page, 0).locator("time")).to_have_text(re.compile("2999|2998"))


@pytest.mark.parametrize(
    ("view", "address", "lists", "kept"),
    [
        ("/#/", "/chats$", None, ()),
        ("/#/", "/search", "found", ("chat_id",)),
        ("", "/chats/[^/]+\\?", "story facts pinned forgotten", ()),
        ("/messages", "/messages", "messages", ("id", "index")),
        ("/recall", "/search", "memories", ()),
        ("/prompts", "/prompts", "prompts", ()),
    ],
)
def test_an_odd_value_costs_its_own_row_and_no_view(visit, asked, view, address, lists, kept):
    """Whatever the fields of some rows hold, the rows beside them are shown, and nothing is run."""

    def spoiled(answer):
        rows = answer if lists is None else next(filter(None, map(answer.get, lists.split())), [])
        if view == "/messages":
            pairs = zip(rows, ODD, strict=False)
            odd = [{k: row[k] if k in kept else value for k in row} for row, value in pairs]
            return answer | {lists: [*odd, *rows[len(odd) :]]}
        odd = odd_rows(rows[0], *kept) if rows else []
        return [*odd, *answer] if lists is None else answer | {name: [*odd, *answer[name]] for name in lists.split()}

    page = visit("about:blank")
    spoil(page, address, spoiled)
    page.goto(address_of(asked, view))
    if address == "/search":
        page.get_by_role("searchbox").fill("Wandering Heron")
    sane = {
        "/#/": page.get_by_role("link", name=re.compile("^Maren|Wandering Heron")),
        "": page.locator("main li").filter(has_text="#21 to #40"),
        "/messages": page.locator(".message").filter(has_text=asked.row(20)["content"][:30]),
        "/recall": page.locator("main li").filter(has_text="Wandering Heron"),
        "/prompts": page.locator(".prompt").filter(has_text="of history"),
    }[view]
    if view == "/messages":
        expect(scrolled(page, 0)).to_contain_text("This cannot be shown")
        scrolled(page, 20)
    expect(sane.first).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert page.evaluate("window.hacked") is None


def test_an_odd_chat_still_has_its_heading_and_its_views(visit, told):
    """Its own fields, one odd value after the other."""
    fields = ("character", "size", "updated", "branches", "last_prompt", "persona")
    for value in ODD:
        page = visit("about:blank")
        spoil(page, "/chats/[^/]+\\?", lambda chat, v=value: chat | dict.fromkeys(fields, v))
        page.goto(told.link())
        expect(page.get_by_role("heading", name="Facts")).to_be_visible()
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        close_pages(page)


# ---------------------------------------------------------------------------- how things stand


def test_the_light_says_in_words_what_is_wrong_and_what_to_do(visit, server, upstream):
    """An upstream that fails shows within seconds, on every page, and goes when it works again."""
    page = visit(f"{server.url}/#/health")
    expect(page.locator(".light")).to_have_text("OK")
    upstream.steer(status=401, error="Wrong key.")
    turn = [SYSTEM, {"role": "user", "content": "Hello"}]
    say(server.url, turn)
    expect(page.locator(".light")).to_contain_text("Wrong key.")
    expect(page.get_by_role("heading", level=1)).to_contain_text("The last turn failed: Wrong key.")
    expect(page.locator("main")).to_contain_text("--upstream-key")
    expect(page.locator("main")).to_contain_text("Failed at the upstream")
    upstream.steer(status=200)
    say(server.url, turn)
    expect(page.locator(".light")).to_have_text("OK")


def test_the_connection_to_the_model_can_be_checked(visit, server, upstream):
    """The model's server is really asked."""
    page = visit(f"{server.url}/#/health")
    page.get_by_role("button", name="Check the upstream").click()
    expect(page.get_by_text("It answers, with 1 model.")).to_be_visible()
    expect(page.locator("main")).to_contain_text(upstream.url)
    expect(page.locator("main")).to_contain_text(pm.__version__)
    expect(page.locator(".light")).to_have_text("OK")


def test_a_model_that_is_not_running_is_no_ok(visit, tmp_path):
    """The light says so as soon as anybody asks for the models, and recovers with the next answer."""
    port = free_port()
    with LocalServer(settings(tmp_path / "data", f"http://127.0.0.1:{port}/v1")) as server:
        page = visit(server.url)
        expect(page.locator(".light")).to_have_text("Your model's server does not answer.")
        first = page.get_by_role("listitem").nth(0)
        expect(first).to_contain_text(f"at http://127.0.0.1:{port}/v1")
        with Upstream(port):
            expect(first).to_contain_text("answers, with 1 model")
            expect(page.locator(".light")).to_have_text("OK")


def test_settings_are_shown_with_where_they_come_from_and_without_secrets(visit, upstream, tmp_path):
    """Flag, variable, .env file, default."""
    file = tmp_path / ".env"
    file.write_text("PERSONA_MEMORY_SUMMARY_CALLS=7\nPERSONA_MEMORY_UPSTREAM_KEY=sk-very-secret\n")
    argv = ["--proxy", "--port", "0", "--data", str(tmp_path / "data"), "--upstream", upstream.url]
    given = pm.load_settings(argv, {"PERSONA_MEMORY_CONTEXT": "4096"}, file)
    with LocalServer(given) as server:
        page = visit(f"{server.url}/#/settings")
        expect(page.locator("tr", has_text="--summary-calls")).to_contain_text("7.env PERSONA_MEMORY_SUMMARY_CALLS")
        expect(page.locator("tr", has_text="--context")).to_contain_text("4096variable PERSONA_MEMORY_CONTEXT")
        expect(page.locator("tr", has_text="--upstream-key")).to_contain_text("(hidden)")
        expect(page.locator("tr", has_text="--data")).to_contain_text("flag --data")
        expect(page.locator("tr", has_text="--budget")).to_contain_text("20/25/35/20default")
        assert "sk-very-secret" not in page.content()


def test_work_in_the_background_shows_how_far_it_is_and_can_be_paused(visit, told):
    """On every page, in the server's words, with the rate; the button says what it will do."""
    progress = {"paused": False, "work": [{
        "kind": "vectors", "waiting": 300, "done": 100, "rate": 81.5, "seconds": 4, "words": "300 messages to go."
    }]}  # fmt: skip
    asked = []

    def pause(route):
        asked.append(route.request.post_data_json)
        progress["paused"] = asked[-1]["paused"]
        route.fulfill(json={"progress": progress})

    def state(route):
        headers = {name: value for name, value in route.request.headers.items() if name != "if-none-match"}
        answer = route.fetch(headers=headers)
        route.fulfill(response=answer, json=answer.json() | {"progress": progress})

    page = visit("about:blank")
    page.route("**/api/persona_memory/state*", state)
    page.route("**/api/persona_memory/pause", pause)
    page.goto(told.url)
    bar = page.get_by_role("region", name="Work in the background")
    expect(bar).to_contain_text("300 messages to go.")
    expect(bar).to_contain_text("81.5 a second")
    assert bar.get_by_role("progressbar", name="Vectors").evaluate("bar => bar.value / bar.max") == 0.25
    bar.get_by_role("button", name="Pause").click()
    expect(bar.get_by_role("button", name="Resume")).to_be_visible()
    bar.get_by_role("button", name="Resume").click()
    expect(bar.get_by_role("button", name="Pause")).to_be_visible()
    assert asked == [{"paused": True}, {"paused": False}]


def test_a_pause_is_the_servers_own_until_it_is_ended(visit, told):
    """Who comes later sees it, too; where nothing is to be done there is no bar."""
    page = visit(told.url)
    bar = page.get_by_role("region", name="Work in the background")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(bar).to_be_hidden()
    assert httpx.post(f"{told.url}/api/persona_memory/pause", json={"paused": True}).status_code == 200
    expect(bar).to_contain_text("paused")
    bar.get_by_role("button", name="Resume").click()
    expect(bar).to_be_hidden()
    assert not told.server.server.memory.pause(False)["paused"]


# ---------------------------------------------------------------------------- while a chat goes on


def test_new_messages_appear_and_disturb_nobody(visit, told):
    """Who reads the end sees them; who reads elsewhere keeps the place; who writes keeps words and focus."""
    end, middle, editor = (visit(told.link("/messages")) for _ in range(3))
    expect(end.locator(".message.provisional")).to_be_in_viewport()
    scrolled(middle, 20)
    place = middle.evaluate("scrollY")
    scrolled(editor, 22).get_by_role("button", name="Edit").click()
    editor.keyboard.type("half a sentence ")
    told.turn("Is the kettle on?", "It is always on.")
    for page in (end, middle, editor):
        wait_until(lambda p=page: p.get_by_text("It is always on.").count() or p.wait_for_timeout(50), "the reply")
    expect(end.get_by_text("It is always on.")).to_be_in_viewport()
    assert middle.evaluate("scrollY") == place
    expect(editor.get_by_label("Message 23")).to_be_focused()
    assert "half a sentence" in editor.get_by_label("Message 23").input_value()


def test_a_reply_that_the_client_has_not_sent_back_is_marked_as_pending(visit, server, upstream):
    """It becomes a message like others when the client sends it back."""
    upstream.steer(reply=lambda body: "The lamp is lit.")
    first = {"role": "user", "content": "Is the lamp lit?"}
    chat = say(server.url, [SYSTEM, first]).chat_id
    page = visit(f"{server.url}/#/chat/{chat}/messages")
    expect(page.locator(".message.provisional")).to_contain_text("Not memory yet")
    reply = {"role": "assistant", "content": "The lamp is lit."}
    upstream.steer(reply=lambda body: "Good.")
    say(server.url, [SYSTEM, first, reply, {"role": "user", "content": "Good night."}])
    expect(page.locator(".message[aria-posinset]")).to_have_count(3)
    expect(page.locator(".message.provisional")).to_contain_text("Good.")


def test_an_unchanged_state_costs_a_304(told):
    """The poll of an idle chat."""
    address = f"{told.url}/api/persona_memory/state"
    first = httpx.get(address, params={"chat": told.id})
    again = httpx.get(address, params={"chat": told.id}, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    told.turn("And now?", "Now it is late.")
    newer = httpx.get(address, params={"chat": told.id}, headers={"If-None-Match": first.headers["ETag"]})
    assert newer.status_code == 200 and newer.json()["chat"] > first.json()["chat"]


# ---------------------------------------------------------------------------- hostile text, hostile pages

MARKUP = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><svg onload='window.hacked = 1'>"
    "<a href='javascript:window.hacked = 1'>click</a><style>body { display: none }</style>${window.hacked = 1}"
)


def test_a_message_of_script_and_markup_does_nothing_but_show(visit, server, upstream):
    """In every view that shows text: as a message, a name, an id, a persona, a search result, a memory, a reply."""
    long = MARKUP + "x" * 100_000
    upstream.steer(reply=lambda body: MARKUP)
    turns = [{"role": "user", "name": "U", "content": long}, {"role": "assistant", "name": MARKUP, "content": MARKUP}]
    last = {"role": "user", "content": "What did I hack?"}
    chat = say(server.url, [{"role": "system", "content": MARKUP}, *turns, last], user=MARKUP).chat_id
    link = f"{server.url}/#/chat/{quote(chat, safe='')}"
    page = visit(f"{server.url}/")
    expect(page.get_by_text("<script>").first).to_be_visible()
    page.get_by_label("Search all chats").fill("hacked")
    expect(page.locator(".hit").first).to_contain_text("window.hacked")
    for tab in ("", "/messages", "/recall", "/mood", "/prompts"):
        page.goto(link + tab)
        expect(page.get_by_role("heading", level=1)).to_have_text(MARKUP)
        if tab == "/recall":
            page.get_by_label("What does it remember?").fill("hacked")
            expect(page.locator("main .list")).to_contain_text("window.hacked")
    page.goto(f"{link}/messages")
    row = page.locator(".message[aria-posinset='1']")
    row.get_by_role("button", name="Show all").click()
    expect(row.locator(".text")).to_have_text(long)
    assert page.evaluate("window.hacked") is None
    foreign = page.evaluate(
        "document.querySelectorAll('main :is(script, img, iframe, style, [onerror], [onload])').length"
    )
    assert foreign == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_policy_lets_nothing_in_that_is_not_the_pages_own(visit, told):
    """Neither an inline handler, nor markup from strings, nor another server can be used, whatever a bug would try."""
    headers = httpx.get(told.url).headers
    policy = headers["Content-Security-Policy"]
    for rule in ("default-src 'none'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"):
        assert rule in policy
    assert "unsafe" not in policy and "connect-src 'self'" in policy
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    page = visit(told.url)
    refused = page.evaluate(
        """async () => {
          const seen = [];
          document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
          try { document.body.innerHTML += "<b>x</b>"; } catch { seen.push("innerHTML"); }
          const script = document.createElement("script");
          try { script.textContent = "window.hacked = 1"; document.body.append(script); } catch { seen.push("script"); }
          try { await fetch("http://127.0.0.1:9/"); } catch { seen.push("fetch"); }
          await new Promise((resolve) => setTimeout(resolve, 200));
          return [seen, window.hacked ?? null];
        }"""
    )
    assert {"innerHTML", "fetch", "connect-src"} <= set(refused[0]) and refused[1] is None
    page.complaints.clear()  # they were asked for


class OtherSite:
    """Another web site on this machine, which answers everything with one page."""

    def __init__(self, html: str):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(html.encode())

            def log_message(self, *_):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://other.localhost:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()


def test_pages_of_other_sites_can_change_nothing(visit, told):
    """A form of text/plain, which browsers send without asking first, and a fetch without CORS are refused."""
    before = branch_texts(told.url, told.id)
    body = json.dumps({"messages": [{"role": "user", "content": "planted"}]}).replace('"', "&quot;")
    form = (
        f"<form method=post enctype=text/plain action='{told.url}{told.path}/messages'>"
        f"<input name='{body[:-1]},&quot;x&quot;:&quot;' value='&quot;}}'><button>Win</button></form>"
    )
    with OtherSite(form) as site:
        page = visit(site.url)
        with page.expect_response(lambda answer: answer.request.method == "POST") as posted:
            page.get_by_role("button").click()
        assert posted.value.status == 403
        page.goto(site.url)
        page.evaluate(
            "address => fetch(address, {method: 'POST', mode: 'no-cors', body: '{}'}).catch(() => 0)",
            f"{told.url}{told.path}/messages",
        )
    assert branch_texts(told.url, told.id) == before
    page.complaints.clear()  # the browser says that it was refused


def test_the_pages_own_calls_work_whatever_other_origins_are_named(visit, upstream, data_dir):
    """--allow-origin names others; the page is at home."""
    with LocalServer(settings(data_dir, upstream.url, allow_origin="http://tavern.example")) as server:
        say(server.url, [SYSTEM, {"role": "user", "content": "Hello"}], chat_id="own")
        page = visit(server.url)
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete the chat").click()
        expect(page.get_by_role("heading", name="Three steps to your first chat")).to_be_visible()


def test_a_server_with_a_key_lets_nobody_see_anything_without_it(visit, upstream, data_dir):
    """The page is a shell that asks for the key; a wrong one is refused; this tab then keeps the right one."""
    with LocalServer(settings(data_dir, upstream.url, api_key="open sesame")) as server:
        say(
            server.url,
            [SYSTEM, {"role": "user", "content": "Hello"}],
            chat_id="x",
            headers={"Authorization": "Bearer open sesame"},
        )
        assert httpx.get(server.url).status_code == 200
        for route in ("chats", "state", "health", "settings", "search?q=hello"):
            assert httpx.get(f"{server.url}/api/persona_memory/{route}").status_code == 401
        page = visit(server.url)
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_label("API key")).to_be_focused()  # the dialog comes back, and clears what it said

        def refused() -> bool:
            """Whether a wrong key is refused; one typed while the dialog came back may have been lost."""
            page.get_by_label("API key").fill("wrong")
            page.get_by_role("button", name="Open").click()
            with contextlib.suppress(AssertionError):
                expect(page.get_by_text("This is not the key.")).to_be_visible(timeout=10_000)
                return True
            return False

        assert any(refused() for _ in range(3))
        page.get_by_label("API key").fill("open sesame")
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name="Unnamed character")).to_be_visible()
        page.reload()
        expect(page.get_by_role("link", name="Unnamed character")).to_be_visible()


# ---------------------------------------------------------------------------- for everyone

VIEWS = ("/#/", "/#/health", "/#/settings", "", "/messages", "/recall", "/mood", "/prompts")


def address_of(told, view):
    return told.url + view if view.startswith("/#/") else told.link(view)


@pytest.mark.parametrize("view", VIEWS)
def test_no_view_has_a_barrier(visit, asked, view):
    """axe-core finds nothing serious or critical, nor in the colours of the dark; on a phone nothing stands out to the
    side of 390 pixels."""
    page = visit(address_of(asked, view))
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    if view == "/recall":
        page.get_by_label("What does it remember?").fill("the storm")
        expect(page.locator("main .list > li").first).to_be_visible()
    if view == "/messages":
        expect(page.locator(".message .chip").first).to_be_visible()
    if view == "/mood":
        expect(page.locator(".timeline a").first).to_be_visible()
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert barriers(page) == []
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")  # no colour is halfway
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != light
    assert barriers(page, runOnly={"type": "rule", "values": ["color-contrast", "link-in-text-block"]}) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_every_view_says_in_one_sentence_what_it_is(visit, asked):
    """Help at hand; short, and different everywhere."""
    help_texts = set()
    page = visit("about:blank")
    for view in VIEWS:
        page.goto("about:blank")  # else the view before is still there for a moment
        page.goto(address_of(asked, view))
        line = page.locator("main p.muted:not(.figures, .id)").filter(visible=True)
        expect(line.first).to_be_visible()
        help_texts.add(line.first.inner_text())
    assert len(help_texts) == len(VIEWS) and max(map(len, help_texts)) < 130


def barriers(page, **options) -> list:
    """What axe-core finds serious or critical."""
    found = Axe().run(page, options=options).response["violations"]
    return [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]


def test_the_theme_follows_the_system_until_the_user_chooses(visit, told):
    """And the choice stays."""
    page = visit(told.url, scheme="dark")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Theme: auto").click()
    expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
    assert page.evaluate(background) != dark
    page.reload()
    expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(background) == dark


def test_a_view_is_reached_and_read_by_keyboard(visit, told):
    """Focus goes to the new view, whose title says what it is; back leads back."""
    page = visit(told.url)
    link = page.get_by_role("link", name="Maren")
    link.focus()
    page.keyboard.press("Enter")
    expect(page).to_have_title("Maren · persona_memory")
    expect(page.locator("main")).to_be_focused()
    page.go_back()
    expect(page).to_have_title("Chats · persona_memory")


def test_an_address_of_no_chat_says_so_until_there_is_one(visit, server):
    """With the way out; the extension leads to a chat that may not have said anything yet."""
    page = visit(f"{server.url}/#/chat/nobody/messages")
    expect(page.get_by_role("heading", level=1)).to_have_text("Not found")
    say(server.url, [SYSTEM, {"role": "user", "content": "Here I am."}], chat_id="nobody")
    expect(page.locator(".message[aria-posinset='1']")).to_contain_text("Here I am.")
    page.goto(f"{server.url}/#/chat/%E0%A4%A/prompts")
    expect(page.get_by_role("heading", level=1)).to_have_text("Not found")
    page.get_by_role("link", name="All chats").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Chats")


def test_a_long_chat_keeps_few_rows_and_shows_any_of_them(visit, server):
    """Of thousands of messages only those near the window exist, and every one can be reached."""
    address = f"{server.url}/api/persona_memory/chats/long/messages"
    rows = [
        {"role": ("user", "assistant")[i % 2], "content": f"line {i}" + " and more" * (i % 40)} for i in range(3000)
    ]
    assert httpx.post(address, json={"messages": rows}, timeout=120).status_code == 200
    page = visit(f"{server.url}/#/chat/long/messages")
    expect(page.locator(".message[aria-posinset='3000']")).to_be_in_viewport()
    for index in (0, 1777, 2999):
        expect(scrolled(page, index)).to_contain_text(f"line {index}")
    page.get_by_role("button", name="Oldest").click()
    expect(page.locator(".message[aria-posinset='1']")).to_be_in_viewport()
    page.mouse.wheel(0, 20_000)
    wait_until(lambda: page.evaluate("scrollY") > 15_000 or page.wait_for_timeout(20), "the wheel")
    expect(page.locator(".message.pending")).to_have_count(0)
    assert number_of_rows(page) < 60
    places = page.locator(".message[aria-posinset]").evaluate_all("all => all.map(row => Number(row.ariaPosInSet))")
    assert places == list(range(places[0], places[0] + len(places)))
