"""Is the persona ever touched: long chats with a persona inside its share of the context, over it, and too large.

Every request's leading system block is compared with the one that reached the upstream, character for character:

    python tests/bench/persona.py --turns 250 --context 8192
"""

import argparse
import json
import sys
from itertools import chain, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import openai
from prefix import count, print_table, product, progress, requests_of, roleplay, send

# What a program that tidies, re-encodes or templates text would change.
ODDITIES = (
    "Ends in blanks:   \t \r\nCRLF line\r\n\n\n\nfour line ends; e\u0301 is not \u00e9; \ufb01 and \u212b; "
    "\u200bzero width\u200d; \U0001f469\u200d\U0001f680 \U0001f3f4\u200d\u2620\ufe0f; {{char}} {{user}} {0} %s "
    '\\n <|im_end|> </s> \u2028 "quoted" <b>&amp;</b>\n '
)
TRAITS = (
    "she counts the stairs",
    "he hums when he lies",
    "the door is never locked on feast days",
    "nobody has seen the cellar since the flood",
    "her word is good for a year and a day",
    "he keeps a list of debts in verse",
    "the river took two of her brothers",
)


def persona(tokens: int) -> list[dict]:
    """Leading system messages of about so many tokens: a main prompt, a description, the chat's start."""
    facts = chain.from_iterable(repeat(TRAITS))
    description = "Description of {{char}}: " + ODDITIES
    number = 0
    while count(description) < tokens - 60:
        number += 1
        description += f"{number}. Remember that {next(facts)}.\n"
    return [
        {"role": "system", "content": "Write {{char}}'s next reply in a fictional chat.  \n"},
        {"role": "system", "content": description},
        {"role": "system", "content": "[Start a new Chat]"},
    ]


def size(block: list[dict]) -> int:
    """The tokens of all the messages' texts."""
    return sum(count(message["content"]) for message in block)


def intact(block: list[dict], prompt: list[dict]) -> bool:
    """The block stands unchanged at the head of the prompt."""
    return prompt[: len(block)] == block


def play(label: str, share: float, args) -> dict:
    """A whole chat, its history growing, under one persona."""
    block, prompts = persona(int(share * args.context)), []
    with product(args.context) as (upstream, api):
        for visible, answer in requests_of(roleplay(args.turns)):
            prompts.append(send(api, upstream, [*block, *visible], answer))
            if len(prompts) % 50 == 0:
                progress(f"{label}: turn {len(prompts)}")
    return {
        "persona": label,
        "tokens": size(block),
        "of context %": round(100 * size(block) / args.context),
        "messages": len(visible) + 1,
        "requests": len(prompts),
        "intact": sum(intact(block, prompt["body"]["messages"]) for prompt in prompts),
        "degraded": sum("degraded" in prompt["memory"] for prompt in prompts),
        "messages sent with the last": len(prompts[-1]["body"]["messages"]) - len(block),
        "largest prompt": max(size(prompt["body"]["messages"]) for prompt in prompts),
    }


def refused(args) -> dict:
    """A persona larger than the context: the error, and what reached the upstream (nothing should)."""
    block = persona(args.context + 500)
    with product(args.context) as (upstream, api):
        try:
            send(api, upstream, [*block, {"role": "user", "content": "Good evening."}], "Good evening, traveller.")
        except openai.APIStatusError as error:
            found = {
                "status": error.status_code,
                "code": error.code,
                "type": error.type,
                "param": error.param,
                "message": (error.body or {}).get("message", error.message),
            }
        else:
            found = {"status": 200, "code": None, "type": None, "param": None, "message": "no error at all"}
        return {"tokens": size(block), **found, "reached_upstream": len(upstream.chats)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=250)
    parser.add_argument("--context", type=int, default=8192)
    args = parser.parse_args()
    rows = [play("inside its share", 0.15, args), play("over its share", 0.45, args)]
    error = refused(args)
    print_table(rows)
    print("a persona that cannot fit:")
    for key, value in error.items():
        print(f"  {key}: {value}")
    print(json.dumps({"benchmark": "persona", "context": args.context, "runs": rows, "too_large": error}))


if __name__ == "__main__":
    main()
