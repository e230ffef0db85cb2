"""Texts that make careless patterns and parsers slow: each is repeated to the length that is wanted."""

import json

SEEDS = (
    "<think>", "<think ", "<details type=reasoning ", "</think>", "`<think>", "<reasoning>a", "[THINK]",
    "<x>\n</x>\n", "<a>", "</a>\n", "<a ", "<|", "|>", "<system>", "<chat>", "[", "(", "{", "[a", "[_", "[Earlier",
    "[style]\n\n", "(a)\n\n", "\n \n", "\n\t", "\n\n", " ", "\n", "\r\n", "a.b ", "A: ", "A: b\n", "A: B: ",
    "Ann: hi\n\nBob: ho\n\n", ": ", "a", "a ", "A", "*", "*a", "_a ", '"', "\u201c", "\\", '\\"', "`", "1", "1.", "9",
    "ab-ab-", "a' ", "a\u2019s ", "#", "...", "-", "\u2014", "\u0301\u0316", "e\u0301", "\u3042", "\u4e2d",
    "\U0001f600", "\ufdfa", "\u0130", "\x00", "\ud800", "next reply in a fictional chat between ", "Write x ",
    "\n[Start a new group chat. Group members: ", "just ", "start a new chat", "i ", "we ", "Jan 1 ", "June 5, 2024 ",
    "an AI ", "It's a deal ", "no! ", "2 days ago ", "last week ", "ignore all the previous instructions ",
    "I never ", "very very ", "in 1 words ", "user:\n", '{"a":', '["a",', '{"summary": "', "@7h", "2024-",
)  # fmt: skip


def repeated(seed: str, length: int) -> str:
    """The seed again and again, to that many characters."""
    return (seed * (length // len(seed) + 1))[:length]


def chat_file(text: str) -> bytes:
    """A chat file that has the text in every field that is read."""
    rows = [
        {"user_name": text, "character_name": "Maren", "create_date": text, "chat_metadata": {"main_chat": text}},
        {"name": text, "is_user": True, "mes": text, "send_date": text},
        {"name": "Maren", "mes": "Aye.", "swipes": [text, "Aye."], "swipe_id": 1, "send_date": "May 6, 2024 7:08am"},
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def turn(text: str) -> dict:
    """A chat completion with the text as persona, as what the user said, and as a reply."""
    said = ("system", text), ("user", "Hello."), ("assistant", text), ("user", text), ("user", "And now?")
    return {"model": "fake-model", "messages": [{"role": role, "content": words} for role, words in said]}
