"""How fast the memory page is with a long chat, measured in Chromium.

A made chat is imported into a server of its own, then opened in a fresh browser profile:

    python tests/bench/page.py                     10,000 messages
    python tests/bench/page.py --messages 50000
    python tests/bench/page.py --embed             waits until all vectors are there (minutes) before it measures

A view is open when its last message, its story or its chart is drawn: from the click (or the address) to the first
frame after that. "after a restart" has the server read the chat from disk first.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
from browser import CHROMIUM, DESKTOP, open_browser
from fakes import Server, health
from playwright.sync_api import expect
from prefix import print_table, progress, roleplay

CHAT = "bench"
BATCH = 1000  # messages of one import request

FRAMES = """seconds => new Promise(resolve => {
  const times = [];
  const end = performance.now() + 1000 * seconds;
  let last = performance.now();
  const step = now => {
    times.push(now - last);
    last = now;
    scrollBy(0, -900);
    if (now < end) requestAnimationFrame(step);
    else resolve(times);
  };
  requestAnimationFrame(step);
})"""
NEXT_FRAME = "() => new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)))"


def fill(url: str, count: int) -> None:
    """Imports a made chat of so many messages."""
    rows = [{"role": m["role"], "content": m["content"]} for m in roleplay(count // 2)][:count]
    random.Random(1).shuffle(rows)
    for start in range(0, len(rows), BATCH):
        progress(f"imported {start} of {len(rows)}")
        body = {"messages": rows[start : start + BATCH]}
        httpx.post(f"{url}/api/persona_memory/chats/{CHAT}/messages", json=body, timeout=600).raise_for_status()


def opened(page, address: str, selector: str) -> float:
    """Milliseconds from going to an address until what the selector means is drawn."""
    page.goto("about:blank")
    started = time.perf_counter()
    page.goto(address)
    page.wait_for_selector(selector)
    page.evaluate(NEXT_FRAME)
    return 1000 * (time.perf_counter() - started)


def clicked(page, link: str, selector: str) -> float:
    """The same from a click on a link of the open page."""
    started = time.perf_counter()
    page.get_by_role("link", name=link, exact=True).click()
    page.wait_for_selector(selector)
    page.evaluate(NEXT_FRAME)
    return 1000 * (time.perf_counter() - started)


def measure(page, server: Server, count: int) -> list[tuple[str, str]]:
    """What was measured, in words and figures."""
    link = f"{server.url}/#/chat/{CHAT}"
    last = f".message[aria-posinset='{count}'] .text"
    rows = [("messages, server just started", f"{opened(page, f'{link}/messages', last):.0f} ms")]
    again = statistics.median(opened(page, f"{link}/messages", last) for _ in range(5))
    rows.append(("messages, median of 5", f"{again:.0f} ms"))
    fetched = page.evaluate("performance.getEntriesByType('resource').reduce((n, e) => n + e.encodedBodySize, 0)")
    rows.append(("fetched for that", f"{fetched / 1000:.0f} kB"))
    frames = sorted(page.evaluate(FRAMES, 4))
    rows.append(("rows in the document", str(page.locator(".message[aria-posinset]").count())))
    rows.append(("frames while scrolling, median", f"{statistics.median(frames):.1f} ms"))
    rows.append(("frames while scrolling, 99 of 100", f"{frames[int(0.99 * len(frames))]:.1f} ms"))
    rows.append(("chats", f"{opened(page, f'{server.url}/#/', '.chats > li'):.0f} ms"))
    rows.append(("memory", f"{opened(page, link, '.card .list li'):.0f} ms"))
    rows.append(("mood, first feelings drawn", f"{clicked(page, 'Mood', '.timeline'):.0f} ms"))
    started = time.perf_counter()
    expect(page.locator("main p[role=status]")).to_have_text("", timeout=600_000)
    rows.append(("mood, all of it read", f"{1000 * (time.perf_counter() - started):.0f} ms more"))
    return [
        *rows,
        ("search across chats", f"{searched(server):.0f} ms"),
        ("poll when idle", f"{polled(server):.1f} ms"),
    ]


def searched(server: Server) -> float:
    """Milliseconds of a search whose words stand nowhere: every message is looked at."""
    started = time.perf_counter()
    httpx.get(f"{server.url}/api/persona_memory/search", params={"q": "nowhere to be found"}, timeout=60)
    return 1000 * (time.perf_counter() - started)


def polled(server: Server) -> float:
    """Milliseconds of the page's poll when nothing is new, median of 20."""
    times, headers = [], {}
    with httpx.Client(base_url=server.url) as client:
        for _ in range(21):
            started = time.perf_counter()
            answer = client.get("/api/persona_memory/state", params={"chat": CHAT}, headers=headers)
            times.append(1000 * (time.perf_counter() - started))
            headers = {"If-None-Match": answer.headers["ETag"]}
    return statistics.median(times[1:])


def wait_for_vectors(server: Server) -> None:
    """Until recall waits for nothing."""
    httpx.get(
        f"{server.url}/api/persona_memory/chats/{CHAT}/search", params={"q": "x"}, timeout=7200
    ).raise_for_status()


def main() -> None:
    """Imports, restarts, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--embed", action="store_true")
    args = parser.parse_args()
    if not CHROMIUM:
        sys.exit("There is no Chromium on this machine.")
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        server = Server(Path(folder) / "data", "http://127.0.0.1:9/v1")
        with server:
            server.wait_ready()
            fill(server.url, args.messages)
            if args.embed:
                wait_for_vectors(server)
        with server:
            server.wait_ready()
            page = browser.new_context(viewport=DESKTOP).new_page()
            assert health(server.url)["chats"] == 1
            print_table([{"what": what, "measured": value} for what, value in measure(page, server, args.messages)])


if __name__ == "__main__":
    main()
