"""Aligning transcripts with a tree: pure functions against plain lists, with random edits."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import persona_memory as pm

# Short texts over a small alphabet, so that the same line stands in many places.
text = st.sampled_from(["ok", "yes", "go on", "a", "b", "c", "d", "e"])
unique = st.integers(0, 10**6).map(lambda n: f"line {n}")
lines = st.lists(unique, min_size=6, max_size=30, unique=True)


def role(place: int) -> str:
    """A greeting, then user and assistant by turns."""
    return "user" if place % 2 else "assistant"


def digests(texts, first=0):
    """What alignment sees of a transcript whose first message has the given place in its chat."""
    return [pm.message_digest(role(first + i), t) for i, t in enumerate(texts)]


def grow(tree: pm.Tree, texts, base=pm.ROOT, first=0, confirmed=True) -> str:
    """Hangs messages under `base`; returns the last one's id."""
    for i, content in enumerate(texts):
        key = pm.message_id(base, pm.message_digest(role(first + i), content))
        if key not in tree.nodes:
            tree.put(pm.Message(key, base, role(first + i), content, confirmed=confirmed), len(tree.nodes))
        base = key
    return base


def show(tree: pm.Tree, texts, head: str, first=0) -> str:
    """What a request with this transcript does to the tree; returns the branch's last message."""
    found = pm.align(tree, digests(texts, first), head)
    return grow(tree, texts[len(found.kept) :], found.tip, first + len(found.kept))


def told(tree: pm.Tree, tip: str, names: dict) -> list[str]:
    """The texts of a branch."""
    return [names[tree.nodes[i].digest] for i in tree.path(tip)]


def names_of(*chats) -> dict:
    """Digest -> text, for both roles."""
    return {pm.message_digest(r, t): t for chat in chats for t in chat for r in ("user", "assistant")}


@given(st.lists(st.lists(text, min_size=1, max_size=8), min_size=1, max_size=8))
def test_a_client_that_shows_its_whole_chat_is_believed(chats):
    """Whatever was shown before: a transcript that begins at a stored beginning becomes exactly its own branch."""
    tree, head = pm.Tree(), pm.ROOT
    for chat in chats:
        whole = ["greeting", *chat]
        head = show(tree, whole, head)
        assert told(tree, head, names_of(whole)) == whole


@given(lines, st.data())
def test_a_trimmed_window_continues_the_branch_above_it(chat, data):
    """Any window of at least two messages finds its place; what stands above it stays on the branch."""
    tree = pm.Tree()
    head = grow(tree, chat)
    cut = data.draw(st.integers(0, len(chat) - 2))
    tip = show(tree, [*chat[cut:], "new"], head, cut)
    assert told(tree, tip, names_of(chat, ["new"])) == [*chat, "new"]


@given(lines, st.data())
def test_an_edit_anywhere_in_the_window_leaves_the_old_text_behind(chat, data):
    """The edited message and all after it are a new branch; nothing of the old text is on it."""
    tree = pm.Tree()
    head = grow(tree, chat)
    cut = data.draw(st.integers(0, len(chat) - 5))
    edited = data.draw(st.integers(cut, len(chat) - 1))
    window = [*chat[cut:edited], "edited", *chat[edited + 1 :], "new"]
    tip = show(tree, window, head, cut)
    assert told(tree, tip, names_of(chat, ["edited", "new"])) == [*chat[:cut], *window]


@given(lines, st.data())
def test_a_deletion_inside_the_window_leaves_the_deleted_behind(chat, data):
    """Two messages are deleted somewhere behind the window's first; they are not on the branch any more."""
    tree = pm.Tree()
    head = grow(tree, chat)
    cut = data.draw(st.integers(0, len(chat) - 5))
    gone = data.draw(st.integers(cut + 1, len(chat) - 2))
    window = [*chat[cut:gone], *chat[gone + 2 :], "new"]
    tip = show(tree, window, head, cut)
    assert told(tree, tip, names_of(chat, ["new"])) == [*chat[:cut], *window]


@given(lines, st.data())
def test_an_insertion_inside_the_window_loses_nothing_above_it(chat, data):
    """Two messages come between others, somewhere behind the window's first."""
    tree = pm.Tree()
    head = grow(tree, chat)
    cut = data.draw(st.integers(0, len(chat) - 4))
    place = data.draw(st.integers(cut + 1, len(chat) - 1))
    window = [*chat[cut:place], "between", "and more", *chat[place:], "new"]
    tip = show(tree, window, head, cut)
    assert told(tree, tip, names_of(chat, window)) == [*chat[:cut], *window]


@given(st.integers(4, 7), st.integers(2, 6))
def test_a_chat_whose_few_words_come_again_and_again_grows(window, period):
    """A window then shows nothing that an earlier one did not, but the reply that was given to the last message."""
    tree, chat = pm.Tree(), ["greeting", "ok"]
    head = grow(tree, chat)
    for turn in range(3 * window):
        reply, more = f"She nods {turn % period}.", f"ok {turn % period}"
        grow(tree, [reply], head, len(chat), confirmed=False)
        chat += [reply, more]
        head = show(tree, chat[-window:], head, max(0, len(chat) - window))
        assert told(tree, head, names_of(chat)) == chat
    cut = max(1, len(chat) - window)
    assert show(tree, chat[cut:], head, cut) == head, "a smaller window alone is nothing new"


@given(lines, st.data())
def test_going_back_to_an_old_branch_brings_it_back_whole(chat, data):
    """A swipe or a checkpoint, then the old continuation again: the branch is what it was."""
    tree = pm.Tree()
    old = grow(tree, chat)
    fork = data.draw(st.integers(2, len(chat) - 2))
    new = show(tree, [*chat[:fork], "other", "more"], old)
    assert show(tree, chat, new) == old
    assert tree.branches == 2


def test_the_head_decides_between_equal_places():
    """A window that stands the same on two branches is on the one that the chat was last on."""
    tree = pm.Tree()
    first = grow(tree, ["greeting", "old", "x1", "x2", "x3"])
    second = grow(tree, ["greeting", "new", "x1", "x2", "x3"])
    for head, word in ((first, "old"), (second, "new")):
        told_on = f"and on from {word}"
        tip = show(tree, ["x1", "x2", "x3", told_on], head, 2)
        assert word in told(tree, tip, names_of(["greeting", "old", "new", "x1", "x2", "x3", told_on]))


def test_a_lone_greeting_or_line_convinces_nobody():
    """A greeting, or one line from the middle of a chat, is no evidence; the first user message after a greeting is."""
    tree = pm.Tree()
    grow(tree, ["greeting", "hello", "reply", "ok", "fine"])
    assert not pm.align(tree, digests(["greeting"])).convincing
    assert not pm.align(tree, digests(["greeting", "something else"])).convincing
    assert not pm.align(tree, digests(["ok", "what now"], 3)).convincing
    assert not pm.align(tree, digests(["reply"], 2)).convincing
    assert pm.align(tree, digests(["greeting", "hello"])).convincing
    assert pm.align(tree, digests(["reply", "ok", "fine", "on"], 2)).convincing


def test_a_folded_persona_may_change_and_lose_what_followed_it():
    """Without system messages the first message is the persona: it changes, the window slides, the branch goes on."""
    tree = pm.Tree()
    chat = ["persona", "u1", "a1", "u2", "a2", "u3", "a3"]
    head = grow(tree, chat)
    found = pm.align_floating(
        tree, digests(["persona, changed", *chat[4:], "u4"], 0)[:1] + digests([*chat[4:], "u4"], 4)
    )
    assert found.skipped == 1 and found.tip == head and found.convincing
    found = pm.align_floating(tree, digests(["persona", "u1", "a1"]))
    assert found.skipped == 1 and tree.path(found.tip) == tree.path(head)[:3]


@given(st.lists(st.integers(0, 40), unique=True).map(sorted))
def test_the_longest_run_of_neighbours(places):
    """Against the plain definition."""
    best = max(
        (n for n in range(len(places) + 1) if any(set(range(p, p + n)) <= set(places) for p in places)), default=0
    )
    assert pm.longest_run(places) == best


@pytest.mark.parametrize(
    "one, other", [("a\r\nb", "a\nb"), (" a ", "a"), ("e\u0301", "\u00e9"), ("\ud800x", "\ud800x")]
)
def test_texts_that_count_as_the_same(one, other):
    """Line ends, outer white space and Unicode composition; lone surrogates do no harm."""
    assert pm.message_digest("user", one) == pm.message_digest("user", other)
    assert pm.message_digest("user", one) != pm.message_digest("assistant", other)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 3), max_size=12)), min_size=1, max_size=6),
    st.integers(-40, 40),
    st.integers(-40, 40),
)
def test_a_branch_is_as_a_list(steps, start, end):
    """However it has grown out of others, which stay as they were."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pm.Branch, "BLOCK", 4)
        made = [([], pm.Branch())]
        for kept, more in steps:
            items, branch = made[-1]
            made.append(([*items[:kept], *more], branch.grown(min(kept, len(items)), more)))
        items, branch = made[-1]
        assert [list(some) for _, some in made] == [some for some, _ in made]
        assert (branch, len(branch), list(reversed(branch))) == (items, len(items), items[::-1])
        assert branch[start:end] == items[start:end] and branch[start:][:end] == items[start:][:end]
        for other, some in made:
            assert branch.shared(some) == branch.shared(pm.Branch(other)) == pm.shared_front(items, other)
        if -len(items) <= start < len(items):
            assert branch[start] == items[start]
        else:
            with pytest.raises(IndexError):
                branch[start]


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=30), st.data())
def test_a_path_is_the_way_to_the_root_whatever_was_walked_before(parents, data):
    """The last path is kept; a tree that grows and other branches must not show."""
    tree, ids = pm.Tree(), []
    for number, (parent, confirmed) in enumerate(parents):
        above = ids[parent] if parent < len(ids) else pm.ROOT
        message = pm.Message(f"m{number}", above, "user", f"text {number}", confirmed=confirmed)
        tree.put(replace(message, confirmed=False), number)
        tree.branch(message.id)
        tree.put(message, number)
        ids.append(message.id)
        tip = data.draw(st.sampled_from([pm.ROOT, *ids]))
        slow, at = [], tip
        while at:
            slow.insert(0, at)
            at = tree.nodes[at].parent
        walked = tree.path(tip)
        assert walked == slow
        assert tree.branch(tip) == [tree.nodes[i] for i in slow]
    assert tree.unshown == {i for i, (_, confirmed) in zip(ids, parents, strict=True) if not confirmed}


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from(["", "Helena: ", "<status>\nwet\n</status>\n"])), min_size=2
    )
)
def test_messages_that_are_hung_anew_stay_where_they_are(written):
    """With names and blocks around their words too; what can still be read of a chat whose parents are lost follows on
    what was written before it."""
    messages, parent = [], pm.ROOT
    for number, (n, dress) in enumerate(written):
        messages.append(pm.new_message(parent, role(number), f"{dress}line {n}"))
        parent = messages[-1].id
    hung, moved = pm.rehung(messages)
    assert hung == messages and all(old == new for old, new in moved.items())
    rows = [(f"m:{m.id}", {**pm.asdict(m), "order": i}) for i, m in enumerate(messages)]
    left, *_ = pm.salvaged(rows[:1] + rows[2:])
    assert [m.content for m in left] == [m.content for m in messages[:1] + messages[2:]]
    assert [m.parent for m in left] == [pm.ROOT, *(m.id for m in left[:-1])]
