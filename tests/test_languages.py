"""What a model is told in the chat's own language: frames, mood, summaries; and how that language is found."""

import json
import string

import pytest
from chats import LANGUAGES, open_chat, read_chat
from fakes import LocalServer, say, settings
from hypothesis import given
from hypothesis import strategies as st

import persona_memory as pm

# Per language two texts, a promise, a line that is sad, one that is not, and a refusal.
SAMPLES = {
    "en": ("I don't know what it is, but I like it when you are here.", "We will go there together.",
           "I promise you that I will come back.", "I'm so sad, I miss you.", "I sit down by the fire.",
           "I'm sorry, but I can't help with that."),
    "de": ("Ich weiß nicht, was es ist, aber ich mag es, wenn du hier bist.", "Wir gehen zusammen hin.",
           "Ich verspreche dir, dass ich wiederkomme.", "Ich bin so traurig, ich vermisse dich.",
           "Ich bin nicht traurig.", "Es tut mir leid, dabei kann ich nicht helfen."),
    "es": ("No sé qué es, pero me gusta cuando estás aquí conmigo.", "Vamos a ir juntos en cuanto podamos.",
           "Te lo prometo, volveré.", "Estoy muy triste.", "No estoy triste.", "Lo siento, no puedo ayudar."),
    "fr": ("Je ne sais pas ce que c'est, mais j'aime quand tu es là avec moi.", "Nous irons ensemble dès que possible.",
           "Je te promets de revenir.", "Je suis si triste.", "Je ne suis pas triste.", "Je suis désolé, c'est non."),
    "it": ("Non so che cosa sia, ma mi piace quando sei qui con me.", "Ci andremo insieme appena potremo.",
           "Te lo giuro, tornerò.", "Sono così triste.", "Non sono triste.", "Mi dispiace, non è possibile."),
    "pt": ("Não sei o que é isto, mas gosto quando estás aqui comigo.", "Vamos lá juntos assim que pudermos.",
           "Eu prometo que volto.", "Estou tão triste.", "Não estou triste.", "Desculpe, não é possível."),
    "pl": ("Nie wiem, co to jest, ale lubię, kiedy jesteś tutaj ze mną.", "Pójdziemy tam razem, jak będziemy mogli.",
           "Obiecuję ci, że wrócę.", "Jest mi tak smutno.", "Nie jestem smutna.", "Przepraszam, nie da się."),
    "ru": ("Я не знаю, что это такое, но мне нравится, когда ты здесь.", "Мы пойдём туда вместе, как только сможем.",
           "Я обещаю вернуться.", "Мне так грустно.", "Мне не грустно.", "Извините, это невозможно."),
    "zh": ("我不知道这是什么，但是你在这里我就喜欢。", "我们一起去吧。", "我保证会回来。", "我好难过。", "我不难过。",
           "抱歉，我帮不了这个忙。"),
    "ja": ("それが何か分からないけど、君がここにいるのが好きだ。", "一緒に行こう。", "必ず戻ると約束する。",
           "とても悲しい。", "悲しくない。", "申し訳ありませんが、できません。"),
    "ko": ("그게 뭔지 모르겠지만 네가 여기 있으면 좋아.", "우리 같이 가자.", "꼭 돌아온다고 약속할게.", "너무 슬퍼.",
           "슬프지 않아.", "죄송하지만 도와드릴 수 없습니다."),
}  # fmt: skip
CHANGES = {
    "en": "We no longer live there.",
    "de": "Wir wohnen nicht mehr dort.",
    "es": "Ya no vivimos allí.",
    "fr": "Nous n'habitons plus là.",
    "it": "Non abitiamo più lì.",
    "pt": "Já não moramos lá.",
    "pl": "Już nie mieszkamy tam.",
    "ru": "Мы там больше не живём.",
    "zh": "我们搬到别处了。",
    "ja": "私たちは引っ越した。",
    "ko": "우리는 이사했어.",
}
OTHERS = [
    "Ik weet niet wat dit is, maar ik vind het leuk dat je er bent.",
    "Jag vet inte vad det är, men jag gillar när du är här.",
    "Я не знаю, що це таке, але мені подобається, коли ти поруч зі мною.",
    "Nevím, co to je, ale mám rád, když jsi tady se mnou.",
]


@pytest.mark.parametrize("language", SAMPLES)
def test_each_language_is_found_and_has_its_words(language):
    texts, words = SAMPLES[language], pm.WORDINGS[language]
    assert set(SAMPLES) == set(pm.WORDINGS) == {*pm.FELT, "en"}
    assert words.language == language and pm.wording_for(texts[:2]) is pm.wording_for([texts[0], "ok"]) is words
    assert pm.tells(pm.PROMISE, texts[2]) and not any(pm.tells(pm.PROMISE, texts[i]) for i in (0, 1, 3, 4))
    assert pm.tells(pm.CHANGED, CHANGES[language]) and not any(pm.tells(pm.CHANGED, text) for text in texts)
    assert pm.REFUSAL.match(texts[5]) and not any(pm.REFUSAL.match(text) for text in texts[:5])
    assert pm.feeling_in(language, texts[3]).label == "sadness" and pm.feeling_in(language, texts[4]).label == "neutral"


@pytest.mark.parametrize(
    ("language", "text", "label"),
    [
        ("de", "Der König war wütend und ließ die Brücke sperren.", "neutral"),
        ("de", "Wenn ich traurig wäre, würde ich es dir sagen.", "neutral"),
        ("de", "Ich kann nicht aufhören zu weinen.", "sadness"),
        ("es", "Mi hermano odia las arañas.", "neutral"),
        ("es", "No puedo dejar de llorar. Estoy muy triste.", "sadness"),
        ("fr", "As-tu peur du noir ?", "neutral"),
        ("fr", "*tremble* J'ai peur, ne pars pas.", "fear"),
        ("fr", "Tais-toi !", "anger"),
        ("ru", "Боюсь, гостиница сегодня полна.", "neutral"),
        ("ru", "Мне страшно, не уходи.", "fear"),
        ("nl", "Mijn broer is bang voor spinnen 😱", "fear"),
        ("nl", "Mijn broer is bang voor spinnen.", "neutral"),
    ],
)
def test_only_the_speakers_own_feelings_are_read(language, text, label):
    """Not somebody else's, nor asked or supposed ones; a language without a list has its pictures alone."""
    assert pm.feeling_in(language, text).label == label


@pytest.mark.parametrize("language", SAMPLES)
def test_the_words_are_whole(language):
    """Each template takes what is put into it, and the mood line keeps to its tokens."""
    words = pm.WORDINGS[language]
    named = {f: {n for _, n, _, _ in string.Formatter().parse(getattr(words, f)) if n} for f in ("mood", "retell")}
    assert named["mood"] == {"name", "feels", "since", "answer"} and {"words"} <= named["retell"] <= {"words", "what"}
    for label in pm.EMOTIONS[: pm.NEUTRAL]:
        line = pm.guidance_line(pm.Mood(label, 0.95, 1213), "", words)
        assert words.user in line and "#1214" in line
        assert pm.count_tokens(line) + pm.MESSAGE_OVERHEAD + 2 <= words.mood_tokens
    for strict in (False, True):
        lines = [f"#{n} Ann: {text}" for n, text in enumerate(SAMPLES[language][:4], 1)]
        asked = pm.summary_request(lines, "messages", 100, strict)[0]["content"]
        assert asked.startswith(words.retell[:8]) and ('"summary"' in asked) != strict and "{words}" not in asked


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["ok", "はい", "*waves at 桜*"],
        ["What do you want to do now?", "Ich weiß es nicht, du vielleicht?"],
        *([text, text] for text in OTHERS),
    ],
)
def test_anything_else_is_told_in_english(texts):
    """What is short, mixed, or in a language that is not known but looks like one that is."""
    assert pm.wording_for(texts) is pm.ENGLISH


def test_a_chats_language_settles(data_dir, upstream):
    """It may change when the chat has doubled, never in between, and not at all later: other words at a prompt's
    beginning cost a backend its cache."""
    texts = [f"{SAMPLES['de' if n % 3 else 'en'][0]} {n}" for n in range(2 * pm.SETTLED + 9)]
    messages = [{"role": "user", "content": text} for text in texts]
    with LocalServer(settings(data_dir, upstream.url)) as running:
        say(running.url, messages[:1], stream=False, chat_id="tale")
        running.server.memory.archive.append("tale", messages[1:])
        chat = open_chat(running, "tale")
        with chat.lock:
            path = chat.path()
            found = [chat.wording(path[:count]).language for count in range(1, len(path) + 1)]
    changes = [count for count in range(2, len(found) + 1) if found[count - 1] != found[count - 2]]
    assert len(found) >= 2 * pm.SETTLED and found[-1] == "de"
    assert all(count & (count - 1) == 0 and count <= pm.SETTLED for count in changes)


@given(st.text(max_size=60))
def test_any_text_is_read_in_any_language(text):
    for words in pm.WORDINGS.values():
        assert abs(sum(pm.feeling_in(words, text).scores.values()) - 1) < 1e-6
    assert isinstance(pm.told_language(text), str)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_chat_is_told_of_in_its_language(language, upstream, data_dir):
    """End to end: what is recalled stands in its frame, also a mood that is named."""
    (talk, asks), words = read_chat(f"language_{language}"), pm.WORDINGS[language]
    messages = [{"role": m.role, "content": m.content} for m in talk[: len(talk) // 2 * 2]]
    messages += [{"role": "user", "content": SAMPLES[language][3]}, {"role": "assistant", "content": "..."}]
    context = int(0.8 * sum(map(pm.message_tokens, messages)))  # so that the beginning has left the prompt
    told, prompts = (words.memories, words.end_of_memories, words.feelings[1]), []
    with LocalServer(settings(data_dir, upstream.url, context=context)) as running:
        for _, question, *_ in asks:
            asked = [{"role": "system", "content": "Mira."}, *messages, {"role": "user", "content": question}]
            say(running.url, asked, stream=False, chat_id="tale")
            prompts.append("\n".join(m["content"] for m in upstream.last["body"]["messages"]))
            if all(line in prompts[-1] for line in told):
                break
    assert all(line in prompts[-1] for line in told)
    assert not any(pm.ENGLISH.memories in prompt for prompt in prompts)


def test_other_rules_for_what_is_kept_of_texts_have_another_number():
    """It is found in the stores by SEGMENT_RULES and TREE_RULES: raise them where these digests change, and write the
    new ones here."""
    texts = [text for language in sorted(SAMPLES) for text in SAMPLES[language]]
    segment = json.dumps(vars(pm.segment_of([*texts, "\n".join(texts)], pm.Counter())))
    assert (pm.SEGMENT_RULES, pm.short_hash(segment)) == (2, "8c46676545b7fd43f0dc4a706d12be34")
    tree = pm.Tree()
    for order, text in enumerate(texts):
        name, shown = ("Ann", f"Ann: {text}") if order % 3 else (None, None)
        tree.put(pm.Message(str(order), str(order - 1) if order else pm.ROOT, "user", text, name, shown=shown), order)
    assert (pm.TREE_RULES, pm.short_hash(json.dumps(tree.rows()))) == (1, "a4d6ad4696f971b323b187a0c024b6ef")
