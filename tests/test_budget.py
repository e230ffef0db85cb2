"""The token budget: property-based, over random personas, histories, reply lengths and context sizes."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import persona_memory as pm

SHARES = (0.20, 0.25, 0.35, 0.20)
shares = st.tuples(*[st.integers(1, 97)] * 3).map(lambda t: (*t, 100 - sum(t))).filter(lambda t: t[3] >= 1)
sizes = st.integers(0, 3000)


@given(st.integers(1, 40000), shares, sizes, sizes, st.integers(0, 5000), sizes)
def test_shares_fill_the_context_and_never_exceed_it(context, percent, persona, required, max_tokens, more):
    """Either an error, or four parts that sum to the context, with what may not be cut inside them."""
    fractions = [p / 100 for p in percent]
    try:
        budget = pm.plan_budget(context, fractions, persona, required, max_tokens, required + more)
    except pm.ContextLengthExceeded as error:
        least = max_tokens or min(int(fractions[3] * context), pm.MIN_RESPONSE)
        assert persona + required + least > context
        assert str(context) in str(error) and str(persona) in str(error)
        return
    assert budget.persona + budget.memories + budget.history + budget.response == context
    assert budget.persona == persona and budget.history >= required
    assert budget.memories >= 0 and budget.response >= max_tokens


@given(st.integers(500, 40000), sizes, sizes)
def test_a_greater_persona_takes_from_the_history_first_then_from_the_memories(context, persona, required):
    """Memories keep their share as long as the history has more than the newest exchange."""
    assume(persona + required <= 0.8 * context)
    budget = pm.plan_budget(context, SHARES, persona, required)
    assert budget.memories == int(0.25 * context) or budget.history == max(required, budget.history)
    if budget.memories < int(0.25 * context):
        assert budget.history == required


def test_what_the_persona_leaves_goes_to_the_history():
    """The shares of the design at 8192 tokens: a persona of 300 leaves 1338 tokens more to the history."""
    budget = pm.plan_budget(8192, SHARES, 300, 100)
    assert (budget.memories, budget.response) == (2048, 1638)
    assert budget.history == 8192 - 2048 - 1638 - 300


def test_what_the_memories_cannot_use_goes_to_the_history():
    """As long as there is no story to tell, its part of the memories' share is the history's."""
    budget = pm.plan_budget(8192, SHARES, 300, 100, wanted=800)
    assert (budget.memories, budget.history) == (800, 8192 - 1638 - 300 - 800)
    assert pm.plan_budget(8192, SHARES, 300, 100, wanted=5000).memories == 2048


def test_a_client_that_asks_for_a_long_reply_gets_it_reserved():
    """`max_tokens` above the response's share is kept free in full."""
    assert pm.plan_budget(8192, SHARES, 300, 100, max_tokens=4000).response == 4000


@given(st.lists(st.integers(1, 400), min_size=1, max_size=80), st.integers(1, 4000), st.integers(1, 2000), st.data())
def test_the_history_fits_and_keeps_what_it_must(tokens, budget, block, data):
    """From the anchor on the history is inside its budget, and the anchor is no later than it may be."""
    latest = data.draw(st.integers(0, len(tokens) - 1))
    assume(sum(tokens[latest:]) <= budget)
    starts = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    anchor = pm.history_anchor(np.array(tokens), np.array(tokens), starts, budget, block, latest)
    assert 0 <= anchor <= latest and sum(tokens[anchor:]) <= budget
    if anchor:
        assert starts[anchor] or not any(starts[anchor : latest + 1])


@given(st.lists(st.integers(1, 200), min_size=1, max_size=200), st.integers(400, 3000))
def test_the_anchor_moves_in_blocks(tokens, budget):
    """While a chat grows, the anchor never goes back, and each move leaves out about a block at least."""
    block = budget // 2
    grown = [np.array(tokens[:n]) for n in range(1, len(tokens) + 1)]
    anchors = [pm.history_anchor(part, part, [True] * len(part), budget, block, len(part) - 1) for part in grown]
    assert anchors == sorted(anchors)
    starts = sorted(set(anchors))
    for earlier, later in zip(starts[1:], starts[2:], strict=False):
        assert sum(tokens[earlier:later]) > block - 200


message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text("abc \n", max_size=300)},
    optional={"name": st.sampled_from(["Helena", "Robin"])},
)


NEIGHBOURS = (  # which a strict client's prompt joins
    (("user", ""), ("user", "a"), ("assistant", "a"), ("user", "a")),
    (("user", "a"), ("assistant", "a"), ("user", ""), ("user", "b")),
    (("user", "a"), ("assistant", "a"), ("user", "a"), ("user", "b")),
)


@given(
    st.text("xyz ", max_size=900),
    st.lists(message, min_size=1, max_size=25),
    st.integers(60, 1200),
    st.sampled_from([None, 5, 60, 400]),
    st.booleans(),
)
@example("", [{"role": r, "content": c} for r, c in NEIGHBOURS[0]], 60, None, False)
@example("", [{"role": r, "content": c} for r, c in NEIGHBOURS[1]], 60, None, False)
@example("", [{"role": r, "content": c} for r, c in NEIGHBOURS[2]], 60, None, False)
def test_no_prompt_exceeds_its_context(persona, messages, context, max_tokens, with_tools):
    """Random requests, laid out and composed: all fits, the persona is whole, the newest message is there."""
    body = {"messages": [{"role": "system", "content": persona}, *messages], "max_tokens": max_tokens}
    body |= {"tools": [{"type": "function", "function": {"name": "look"}}]} if with_tools else {}
    request = pm.parse_request(body)
    assume(request.turns)
    counts = [pm.message_tokens(turn.raw) for turn in request.turns]
    try:
        left = pm.beside_tools(context, pm.tool_tokens(body), request.max_tokens)
        layout = pm.lay_out(request, left, SHARES, np.array(counts), [turn.role for turn in request.turns])
    except pm.ContextLengthExceeded:
        return
    prompt = pm.compose_prompt(request, layout, [], layout.anchor, "")
    used = pm.REPLY_PRIMING + sum(pm.message_tokens(m) for m in prompt)
    used += pm.tool_tokens(body)
    whole = used + max(layout.room, 0) + layout.budget.response
    assert whole == context or (request.strict and whole < context)  # neighbours that are joined take less than two
    assert layout.room >= 0 and layout.budget.response >= (max_tokens or 0)
    assert prompt[: len(request.persona)] == list(request.persona)
    newest = request.turns[-1].raw
    joined = (m for m in prompt if request.strict and m["role"] == newest["role"])
    assert newest in prompt or any(m["content"].endswith(newest["content"]) for m in joined)


@given(st.lists(st.text("abc d\n", min_size=1, max_size=60), min_size=1, max_size=10))
def test_a_memory_block_takes_what_was_counted_for_it(texts):
    """The frame and the lines, counted one by one, are no less than the block counted whole."""
    memories = [pm.Memory(pm.Message("i", "", "user", t), i, 1.0, {}) for i, t in enumerate(texts)]
    counted = pm.memory_frame_tokens(pm.ENGLISH) + sum(map(pm.memory_cost, memories))
    assert pm.count_tokens(pm.memory_block(memories) + "\n\n") + pm.MESSAGE_OVERHEAD <= counted


LINES = st.lists(
    st.sampled_from(
        ["", " ", "\n", "\r\n", "\t\n ", "The end.", "...", "it's", "12345", " 'S", "x\u2028y", "\x1c", "夜\n"]
    )
)


@given(st.one_of(LINES.map("\n".join), LINES.map("".join), st.text()))
def test_a_long_text_has_the_tokens_of_its_lines(text):
    """Counted line by line, a text has what its tokenizer makes of it as a whole."""
    long = text + "\n" + "word " * pm.SHORT_TEXT + "\n" + text
    assert pm.count_tokens(long) == len(pm.tokens_of(long))


@pytest.mark.parametrize("text", ["", "20/25/35", "20/25/35/21", "-5/25/60/20", "20/25/35/2O"])
def test_bad_shares_are_refused(text):
    """Four whole percentages that sum to 100."""
    with pytest.raises(pm.SettingsError):
        pm.parse_shares(text)
