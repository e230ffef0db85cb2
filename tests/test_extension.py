"""The SillyTavern extension: its files put in and taken out, and its script run in a browser on a stand-in client."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml
from browser import close_pages, needs_chromium, open_browser
from fakes import LocalServer, branch_texts, free_port, run_program, settings

import persona_memory as pm

TIMEOUT = 60
NOWHERE = "http://127.0.0.1:9/v1"  # an upstream that is not there
CLIENT = (Path(__file__).parent / "data" / "client.html").read_bytes()
SCRIPT_PATH = "/scripts/extensions/third-party/persona_memory/index.js"

# ---------------------------------------------------------------------------- the files


def sillytavern(root: Path, version: str = "1.12.6", users: tuple[str, ...] = (), data: str = "data") -> Path:
    """A folder that looks like a SillyTavern, with those users."""
    (root / "public" / "scripts").mkdir(parents=True)
    (root / "package.json").write_text(json.dumps({"name": "sillytavern", "version": version}))
    for user in users:
        (root / data / user / "extensions").mkdir(parents=True)
        (root / data / user / "settings.json").write_text("{}")
    return root


def snapshot(root: Path) -> dict[str, bytes | None]:
    """All files of a folder with their bytes, and its folders."""
    return {str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in sorted(root.rglob("*"))}


def test_the_extension_goes_to_every_user_and_out_again(tmp_path):
    root = sillytavern(tmp_path / "st", users=("default-user", "ada"))
    (root / "data" / "_storage").mkdir()
    before = snapshot(root)
    done = run_program("--install-extension", root, "--port", 5321)
    assert (done.returncode, done.stderr) == (0, "")
    files = pm.extension_files("http://127.0.0.1:5321")
    for user in ("default-user", "ada"):
        home = root / "data" / user / "extensions" / "persona_memory"
        assert str(home) in done.stdout
        assert snapshot(home) == files
    assert len(snapshot(root)) == len(before) + 2 * (1 + len(files))
    installed = snapshot(root)
    assert run_program("--install-extension", root, "--port", 5321).returncode == 0
    assert snapshot(root) == installed
    assert run_program("--uninstall-extension", root).returncode == 0
    assert snapshot(root) == before
    again = run_program("--uninstall-extension", root)
    assert (again.returncode, "is not in" in again.stdout) == (0, True)
    assert snapshot(root) == before


def test_a_newer_version_replaces_the_files_and_leaves_others(tmp_path):
    root = sillytavern(tmp_path, users=("default-user",))
    pm.install_extension(pm.Settings(), str(root))
    home = root / "data" / "default-user" / "extensions" / "persona_memory"
    (home / "index.js").write_text("// an older one")
    (home / "notes.txt").write_text("mine")
    pm.install_extension(pm.Settings(), str(root))
    assert snapshot(home) == pm.extension_files("http://127.0.0.1:5100") | {"notes.txt": b"mine"}
    pm.uninstall_extension(pm.Settings(), str(root))
    assert snapshot(home) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("version", "users", "config", "home"),
    [
        ("1.12.6", (), "", "data/default-user/extensions"),
        ("1.13.0", ("ada",), "dataRoot: ./elsewhere\nport: 8000\n", "elsewhere/ada/extensions"),
        ("1.12.0", (), 'dataRoot: "/config"\n', None),
        ("1.11.8", (), "", "public/scripts/extensions/third-party"),
    ],
)
def test_where_it_goes(tmp_path, version, users, config, home):
    root = sillytavern(tmp_path, version, users, "elsewhere" if "elsewhere" in config else "data")
    (root / "config.yaml").write_text(config)
    expected = root / home / "persona_memory" if home else Path("/config/default-user/extensions/persona_memory")
    assert [f.resolve() for f in pm.extension_homes(root)] == [expected.resolve()]


def user(folder: Path) -> Path:
    """A user's data as SillyTavern makes it; where our extension goes in it."""
    for name in ("characters", "chats", "extensions"):
        (folder / name).mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    return folder / "extensions" / "persona_memory"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, in which one works."""
    place = tmp_path / "home"
    place.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(place))
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(place)
    return place


def test_of_an_npm_installation_the_users_data_folder_is_meant(home):
    """Whatever is named of it; the package's own folder is not read, but where its server.js was started."""
    package = sillytavern(home / ".nvm" / "lib" / "node_modules" / "sillytavern", "1.19.0")
    data = home / ".local/share/SillyTavern/data"
    for named in (package, home / ".nvm"):
        assert pm.extension_homes(named) == [data / "default-user/extensions/persona_memory"]
    ada, own = user(data / "ada"), user(package / "data" / "default-user")
    for named in (package, home / ".nvm"):
        assert pm.extension_homes(named) == [ada, own]
    assert pm.extension_homes(data) == [ada]


@pytest.mark.parametrize(
    "system, variable, place",
    [
        ("linux", "XDG_DATA_HOME", "SillyTavern/data"),
        ("linux", None, ".local/share/SillyTavern/data"),
        ("darwin", None, "Library/Application Support/SillyTavern/data"),
        ("win32", "LOCALAPPDATA", "SillyTavern/Data/data"),
        ("win32", None, "AppData/Local/SillyTavern/Data/data"),
    ],
)
def test_each_system_has_its_place_for_data(home, monkeypatch, system, variable, place):
    monkeypatch.setattr(sys, "platform", system)
    if variable:
        monkeypatch.setenv(variable, str(home / "elsewhere"))
    assert pm.global_data_root() == (home / "elsewhere" if variable else home) / place


@pytest.mark.parametrize("named", ["a data root", "a user's folder", "volumes", "a clone with volumes", "new volumes"])
def test_it_goes_where_the_client_reads(home, named):
    """Data roots, users' folders, Docker's volumes beside a compose file, or in the clone's docker folder."""
    root = home / "st"
    if named == "a data root":
        expected, folder = [user(root / "ada"), user(root / "default-user")], root
        (root / "_cache").mkdir()
    elif named == "a user's folder":
        expected, folder = [user(root / "ada")], root / "ada"
    elif named == "volumes":
        expected, folder = [user(root / "data" / "default-user")], root
        (root / "docker-compose.yml").write_text("services: {}")
    elif named == "a clone with volumes":
        folder = sillytavern(root, "1.19.0")
        expected = [user(root / "docker" / "data" / "default-user")]
    else:
        expected, folder = [root / "data" / "default-user" / "extensions" / "persona_memory"], root
        (root / "data").mkdir(parents=True)
        (root / "config").mkdir()
        (root / "config" / "config.yaml").write_text("port: 8000")
    said = pm.install_extension(pm.Settings(), str(folder))
    assert all(str(place) in said and (place / "manifest.json").is_file() for place in expected)
    assert len(list(home.rglob("manifest.json"))) == len(expected)


def test_without_a_folder_the_usual_places_are_looked_through(home):
    """All that are found get it; where there is none, the refusal says where it was looked for."""
    done = run_program("--install-extension")
    assert done.returncode == 2 and "Name its folder" in done.stderr and str(home / "SillyTavern") in done.stderr
    clone = sillytavern(home / "SillyTavern", "1.19.0", users=("default-user",))
    ada = user(home / ".local/share/SillyTavern/data/ada")
    done = run_program("--install-extension")
    places = [ada, clone / "data" / "default-user" / "extensions" / "persona_memory"]
    assert done.returncode == 0 and all(str(place) in done.stdout for place in places)
    assert all((place / "index.js").is_file() for place in places)
    assert run_program("--uninstall-extension").returncode == 0
    assert not any((place / "index.js").exists() for place in places)


def test_what_else_is_there_is_named_and_left_alone(home):
    clone = sillytavern(home / "SillyTavern", "1.19.0", users=("default-user",))
    ada = user(home / ".local/share/SillyTavern/data/ada")
    done = run_program("--install-extension", clone)
    assert "Left alone" in done.stdout and str(ada) in done.stdout.partition("Left alone")[2]
    assert not ada.exists() and (clone / "data/default-user/extensions/persona_memory/index.js").is_file()


def test_a_folder_that_git_keeps_is_left_to_it(home):
    """SillyTavern updates what it has installed from an address; files written into that would stop it."""
    place = user(home / "ada")
    (place / ".git").mkdir(parents=True)
    (place / "manifest.json").write_text(json.dumps(pm.EXTENSION_MANIFEST))
    with pytest.raises(pm.SettingsError, match="git address"):
        pm.install_extension(pm.Settings(), str(home / "ada"))


@pytest.mark.parametrize("package", [None, "{}", '{"name": "other"}', "[]", "not json"])
def test_a_folder_that_is_no_sillytavern_is_refused_with_a_sentence(tmp_path, package):
    if package is not None:
        (tmp_path / "package.json").write_text(package)
    before = snapshot(tmp_path)
    done = run_program("--install-extension", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a SillyTavern" in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before


def test_what_stands_in_its_place_is_left_alone(tmp_path):
    root = sillytavern(tmp_path / "st", users=("default-user",))
    home = root / "data" / "default-user" / "extensions" / "persona_memory"
    home.mkdir()
    (home / "manifest.json").write_text('{"display_name": "something else"}')
    before = snapshot(root)
    with pytest.raises(pm.SettingsError, match="something else"):
        pm.install_extension(pm.Settings(), str(root))
    pm.uninstall_extension(pm.Settings(), str(root))
    assert snapshot(root) == before


def test_the_download_holds_the_same_files(server):
    answer = httpx.get(f"{server.url}/extension.zip", timeout=TIMEOUT)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    assert found == {f"persona_memory/{name}": content for name, content in pm.extension_files(server.url).items()}
    assert httpx.get(f"{server.url}/extension.zip", timeout=TIMEOUT).content == answer.content


def git(folder: Path, *arguments) -> str:
    """What git says; it must succeed."""
    named = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(
        ["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | named
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def newer(monkeypatch, version: str) -> None:
    """The program is another version by now."""
    monkeypatch.setitem(pm.EXTENSION_MANIFEST, "version", version)
    monkeypatch.setattr(pm, "__version__", version)


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_git_clones_the_extension_and_pulls_the_next_version(tmp_path, data_dir, monkeypatch):
    """As SillyTavern does it, with depth 1; and without, and after restarts, which make no new commits."""
    with LocalServer(settings(data_dir, NOWHERE), ready=False) as server:
        address = f"{server.url}/persona_memory.git"
        git(tmp_path, "clone", "--depth", "1", address, tmp_path / "shallow")
        git(tmp_path, "clone", address, tmp_path / "whole")
        assert snapshot_of(tmp_path / "shallow") == pm.extension_files(server.url)
        first, port = git(tmp_path / "shallow", "rev-parse", "HEAD"), server.server.effective_port
    for version in ("0.2.0", "0.3.0"):
        newer(monkeypatch, version)
        with LocalServer(settings(data_dir, NOWHERE, port=port), ready=False) as server:
            for folder in ("shallow", "whole"):
                git(tmp_path / folder, "pull")
                assert snapshot_of(tmp_path / folder) == pm.extension_files(server.url)
                assert git(tmp_path / folder, "fsck", "--strict") == ""
            git(tmp_path, "clone", "--depth", "2", address, tmp_path / version)
            assert git(tmp_path / version, "status", "--porcelain") == ""
    names = ["Persona Memory 0.3.0", "Persona Memory 0.2.0", "Persona Memory 0.1.0"]
    for folder, expected in (("shallow", names), ("whole", names), ("0.3.0", names[:2])):
        assert git(tmp_path / folder, "log", "--format=%s").split("\n") == expected
    assert git(tmp_path / "whole", "rev-parse", "HEAD~2") == first
    with LocalServer(
        settings(tmp_path / "other", NOWHERE, port=port), ready=False
    ) as server:  # the same files make the same commit
        newer(monkeypatch, "0.1.0")
        assert git(tmp_path, "ls-remote", address, "HEAD").split()[0] == first  # the same files make the same commit


def snapshot_of(clone: Path) -> dict[str, bytes]:
    """A clone's files without git's own."""
    return {f.name: f.read_bytes() for f in clone.iterdir() if f.is_file()}


def pkt(text: str) -> str:
    """A line as git's protocol frames it."""
    return f"{len(text) + 4:04x}{text}"


def test_the_repository_can_be_read_only_and_needs_no_key(data_dir):
    """Git can send none, and it holds no data; what is not asked in git's words is refused without harm."""
    with LocalServer(settings(data_dir, NOWHERE, api_key="sesame"), ready=False) as server:
        address = f"{server.url}/persona_memory.git"
        refs = httpx.get(f"{address}/info/refs", params={"service": "git-upload-pack"}, timeout=TIMEOUT)
        assert refs.status_code == 200 and refs.headers["content-type"] == "application/x-git-upload-pack-advertisement"
        newest = refs.content.split(b"0000", 1)[1][4:44].decode()
        for path in ("info/refs", "info/refs?service=git-receive-pack"):
            assert httpx.get(f"{address}/{path}", timeout=TIMEOUT).status_code == 404
        for path in ("HEAD", "objects/info/packs", "git-receive-pack", "config"):
            assert httpx.get(f"{address}/{path}", timeout=TIMEOUT).status_code in (401, 404)
        want, done = pkt(f"want {newest} side-band-64k\n"), "0000" + pkt("done\n")
        strange = ["", "0000", "nonsense", "zzzz", pkt("done\n"), pkt(f"want {'0' * 40}\n") + done, "0005", "0032want "]
        depths = [want + pkt(f"deepen {n}\n") + done for n in ("-5", "99", "xx", "")]
        for asked, expected in [(a, b"ERR ") for a in strange] + [(a, b"PACK") for a in (want + done, *depths)]:
            answer = httpx.post(f"{address}/git-upload-pack", content=asked.encode(), timeout=TIMEOUT)
            assert answer.status_code == 200 and expected in answer.content
        headers = {"Content-Encoding": "gzip"}
        broken = httpx.post(f"{address}/git-upload-pack", content=b"plain text", headers=headers, timeout=TIMEOUT)
        assert broken.status_code == 400


def test_the_manifest_names_what_the_script_has():
    files = pm.extension_files(pm.EXTENSION_ADDRESS)
    manifest = json.loads(files["manifest.json"])
    assert manifest["js"] in files
    assert f"globalThis.{manifest['generate_interceptor']} =" in files["index.js"].decode()
    assert (manifest["version"], manifest["auto_update"], manifest["requires"]) == (pm.__version__, False, [])
    assert {manifest["css"], *manifest["i18n"].values()} < set(files)
    assert all(f"export function {name}(" in files["index.js"].decode() for name in manifest["hooks"].values())
    assert manifest["loading_order"] > 100, "Vector Storage, which takes messages out of the chat, comes first"


def placeholders(text: str) -> list[str]:
    """The places of values in a sentence, whatever their order."""
    return sorted(re.findall(r"\$\{\d\}", text))


def test_all_that_the_script_says_is_said_in_every_language():
    said = set()
    for words in re.findall(r"(?<!\w)t`([^`]*)`", pm.EXTENSION_SCRIPT):
        numbers = itertools.count()
        said.add(re.sub(r"\$\{[^}]*\}", lambda _, n=numbers: f"${{{next(n)}}}", words))
    said |= set(pm.EMOTIONS) - {"neutral"}
    for language, words in pm.extension_words().items():
        assert set(words) == said, language
        assert all(placeholders(theirs) == placeholders(english) for english, theirs in words.items()), language
        assert len(set(words.values())) == len(words), language


# ---------------------------------------------------------------------------- the script

ELVEN = "The password of the northern gate is silverthorn, and only Aldo knows it besides us."


REAL_PATIENCE = b"TIMEOUT_MS = 2000"  # of the extension, which a busy machine tries


class Site:
    """The stand-in client's web server: its page and the extension, as it was made for the memory server's address; it
    waits for that as long as it really does, or as a busy machine may take."""

    def __init__(self, address: str, hasty: bool):
        site, script = self, pm.extension_files(address)["index.js"]
        assert REAL_PATIENCE in script
        self.script = script if hasty else script.replace(REAL_PATIENCE, b"TIMEOUT_MS = 30000")
        self.closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/hang":
                    return site.closing.wait()
                path = self.path.partition("?")[0]
                content, kind = (site.script, "text/javascript") if path == SCRIPT_PATH else (CLIENT, "text/html")
                found = path in (SCRIPT_PATH, "/")
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content) if found else 0))
                self.end_headers()
                if found:
                    self.wfile.write(content)
                return None

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.httpd.shutdown()
        self.httpd.server_close()


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests."""
    with open_browser() as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory, shared_upstream):
    """The memory server, with the proxy."""
    data = tmp_path_factory.mktemp("extension") / "data"
    with LocalServer(settings(data, shared_upstream.url, no_guidance=True)) as running:
        yield running


class Client:
    """The stand-in client in a page of its own."""

    def __init__(self, page):
        self.page = page

    def do(self, script: str, *given):
        """The value of an expression in the page, in which `stand` is the stand-in and `a` what is given."""
        return self.page.evaluate(f"async (a) => ({script})", given[0] if given else None)

    def talk(self, *lines: str):
        """Messages of the user and the character in turns, the user first."""
        for place, text in enumerate(lines):
            self.do("stand.say(a[0], a[1])", [place % 2 == 0, text])

    def generate(self, **more) -> dict:
        """A generation; the prompts that were placed for it, by key."""
        return self.do("await stand.generate(a)", more)

    @property
    def id(self) -> str | None:
        """The open chat's id."""
        return self.do("stand.context.chatMetadata.persona_memory?.id ?? null")

    @property
    def notices(self) -> list[str]:
        """What the user was told."""
        return [notice["text"] for notice in self.do("stand.notices")]

    def panel(self) -> str:
        """The text of the panel."""
        return self.page.locator("#persona_memory_settings").text_content()

    def set(self, name: str, value):
        """A setting, set in the panel as a user does."""
        if isinstance(value, bool):
            self.page.locator("#persona_memory_settings input[type=checkbox]").first.set_checked(value)
            return
        kinds = {"server": "url", "key": "password", "depth": "number"}
        entry = self.page.locator(f"#persona_memory_settings input[type={kinds[name]}]")
        entry.fill(str(value))
        entry.dispatch_event("change")


@contextlib.contextmanager
def open_client(browser, address: str, before: str = "", hasty: bool = False):
    """A page with the stand-in, the extension loaded after the script `before` has run."""
    with Site(address, hasty) as site:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(TIMEOUT * 1000)
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(site.url)
        client = Client(page)
        if before:
            client.do(before)
        client.do("await stand.load().then(() => null)")
        yield client
        close_pages(page)
        context.close()
        assert errors == []


@pytest.fixture
def client(browser, server):
    """A client whose chats go to some other API than the proxy."""
    with open_client(browser, server.url) as opened:
        yield opened


def long_chat(client, *more: str):
    """A chat too long for its prompt, that began with a fact, and asks for it now."""
    walks = [
        text
        for i in range(40)
        for text in (
            f"Walk {i}: we went along the harbour again and counted {i + 3} grey gulls on the wall.",
            f"*Mira nods at walk {i}.* The harbour is quiet today, and the tide takes its own time.",
        )
    ]
    client.talk(ELVEN, "Then I will guard it well.", *walks, *(more or ["What is the password of the northern gate?"]))


def placed_text(placed: dict) -> str:
    """All text that was placed."""
    return "\n".join(prompt["value"] for prompt in placed.values())


@needs_chromium
class TestBesideAnotherApi:
    """Memories are asked for, and placed in the client's prompt."""

    def test_memories_are_placed_at_depth_one_and_taken_back(self, client):
        long_chat(client)
        placed = client.generate()
        assert list(placed) == ["persona_memory_memories"]
        memories = placed["persona_memory_memories"]
        assert "2026-03-01 Robin: " + ELVEN in memories.pop("value")
        assert memories == {"position": 1, "depth": 1, "scan": False, "role": 0}
        client.do("await stand.open('Mira - 2', {}, [])")
        assert client.do("stand.placed()") == {}

    def test_what_a_message_says_in_braces_is_no_macro(self, client):
        long_chat(client, "What about the {{user}} and the gate's password?")
        client.do("stand.context.chat[0].mes += ' {{setvar::x::1}}'")
        assert "{{" not in placed_text(client.generate())

    def test_the_depth_is_the_users(self, client):
        long_chat(client)
        client.set("depth", 4)
        assert client.generate()["persona_memory_memories"]["depth"] == 4
        assert client.do("stand.context.extensionSettings.persona_memory.depth") == 4
        assert client.do("stand.saves.settings") > 0

    def test_off_is_off(self, client):
        long_chat(client)
        assert client.generate() != {}
        client.set("enabled", False)
        assert client.do("stand.placed()") == {}
        assert client.generate() == {}
        client.set("enabled", True)
        assert client.generate() != {}

    def test_a_short_chat_needs_nothing(self, client):
        client.talk("Good morning.")
        assert client.generate() == {}
        assert client.notices == []

    def test_the_chat_arrives_as_it_is_shown(self, client, server):
        """Hidden messages are part of it; notices, comments and what was replaced by a swipe are not."""
        client.do("stand.say(false, '', {is_system: true, extra: {type: 'group'}})")
        client.talk("One.", "Two.")
        client.do("stand.say(true, 'Hidden.', {is_system: true})")
        client.do("stand.say(false, 'A comment.', {is_system: true, extra: {type: 'comment'}})")
        client.do("stand.say(false, 'Night falls.', {name: 'System', extra: {type: 'narrator'}})")
        client.do("stand.say(false, 'Chosen.', {swipes: ['Rejected.', 'Chosen.'], swipe_id: 1})")
        client.generate()
        assert branch_texts(server.url, client.id) == ["One.", "Two.", "Hidden.", "Chosen."]
        client.generate(type="swipe")
        assert branch_texts(server.url, client.id) == ["One.", "Two.", "Hidden."]
        rows = httpx.get(f"{server.url}/api/persona_memory/chats/{client.id}/messages", timeout=TIMEOUT).json()
        assert [row["name"] for row in rows["messages"]] == ["Robin", "Mira", "Robin"]

    def test_deleted_messages_are_forgotten(self, client, server):
        long_chat(client)
        assert "silverthorn" in placed_text(client.generate())
        client.do("stand.context.chat.splice(0, 2)")
        assert "silverthorn" not in placed_text(client.generate())

    def test_a_members_words_carry_its_name(self, client):
        client.do("Object.assign(stand.context, {groupId: '7', characterId: 1, name2: 'Borin'})")
        client.talk("Borin, where is the spare key?", "The spare key lies under the anvil in my forge.")
        client.do("Object.assign(stand.context, {characterId: 0, name2: 'Mira'})")
        long_chat(client, "Mira, where does the spare key lie?", "Hm.")
        assert "Borin: The spare key lies under the anvil" in placed_text(client.generate(type="group_chat"))

    def test_prompts_that_are_only_counted_ask_nothing(self, client):
        long_chat(client)
        client.generate(dryRun=True)
        assert client.id is None

    def test_a_client_that_lacks_most_things_still_remembers(self, browser, server):
        lacks = (
            "['timestampToMoment', 'substituteParams', 'saveMetadata', 'chatCompletionSettings']"
            ".map((name) => delete stand.context[name])"
        )
        with open_client(browser, server.url, lacks) as client:
            long_chat(client)
            assert "silverthorn" in placed_text(client.generate())
            client.do("stand.context.mainApi = 'openai'")
            assert "silverthorn" in placed_text(client.generate())


@needs_chromium
class TestTheWholeChat:
    """The server knows a chat as it stands, whatever its requests show."""

    def opened(self, client, script: str) -> None:
        """Runs a script, and waits for what the extension sends because of it."""
        with client.page.expect_response(lambda response: "/sync" in response.url and response.ok):
            client.do(script)

    def test_it_is_read_in_when_it_is_opened(self, client, server):
        long_chat(client)
        self.opened(client, "await stand.open('Mira - 1', {})")
        assert branch_texts(server.url, client.id) == client.do("stand.context.chat.map((m) => m.mes)")
        client.page.get_by_text("messages of this chat are known").wait_for(state="attached")

    def test_the_characters_picture_goes_with_it(self, client, server):
        """Small, from the client's own thumbnail; where there is none the chat goes without."""
        asked = []

        def thumbnail(route):
            asked.append(route.request.url)
            route.fulfill(path=Path(pm.__file__).parent / "tests" / "data" / "page_prompts.png")

        client.page.route("**/thumbnail?*", thumbnail)
        long_chat(client)
        self.opened(client, "await stand.open('Mira - 1', {})")
        assert asked[0].endswith("/thumbnail?type=avatar&file=mira.png")
        chats = {row["chat_id"]: row for row in httpx.get(f"{server.url}/api/persona_memory/chats").json()}
        assert chats[client.id]["picture"].startswith("data:image/jpeg;base64,")

    def test_what_the_server_knows_is_not_sent_again(self, client, server):
        long_chat(client)
        self.opened(client, "await stand.open('Mira - 1', {})")
        sent = []
        client.page.on("request", lambda request: sent.append(request.url))
        with client.page.expect_response(lambda response: response.url.endswith("/known") and response.ok):
            client.do("await stand.open('Mira - 1', stand.context.chatMetadata)")
        client.generate()  # which waits for whatever is being read in
        assert not [url for url in sent if url.endswith("/sync")]

    def test_an_edit_above_the_window_is_known(self, client, server):
        long_chat(client)
        self.opened(client, "await stand.open('Mira - 1', {})")
        client.do("stand.context.chat[0].mes = 'There is no password.'")
        self.opened(client, "await stand.context.eventSource.emit('message_edited', 0)")
        assert branch_texts(server.url, client.id)[0] == "There is no password."

    def test_a_chat_through_the_proxy_is_known_before_its_first_reply(self, client, server):
        """Its requests show a part of it only."""
        long_chat(client)
        client.do("Object.assign(stand.context, {mainApi: 'openai'})")
        client.do(f"stand.context.chatCompletionSettings.custom_url = '{server.url}/v1'")
        client.generate()
        assert branch_texts(server.url, client.id)[0] == ELVEN
        assert client.do("stand.requests.length") == 1

    def test_a_message_that_was_hidden_without_an_event_is_known_as_hidden(self, client, server):
        long_chat(client)
        client.do("Object.assign(stand.context, {mainApi: 'openai'})")
        client.do(f"stand.context.chatCompletionSettings.custom_url = '{server.url}/v1'")
        client.generate()
        before = branch_texts(server.url, client.id)
        client.do("stand.context.chat[0].is_system = true")
        self.opened(client, "await stand.generate({})")
        assert branch_texts(server.url, client.id) == before
        assert "All" in client.panel()

    def test_what_is_off_is_not_read_in(self, client):
        long_chat(client)
        client.set("enabled", False)
        client.do("await stand.open('Mira - 1', {})")
        client.generate()
        assert client.id is None


@needs_chromium
class TestWhoTheChatIs:
    """An id of its own for each chat, kept with the chat."""

    def test_it_stays_when_the_chat_is_renamed(self, client):
        client.talk("Good morning.")
        client.generate()
        first = client.id
        assert first.startswith("st-")
        assert client.do("stand.saves.metadata") == 1
        client.generate()
        assert client.do("stand.saves.metadata") == 1
        client.do("await stand.open('Another name', stand.context.chatMetadata)")
        client.generate()
        assert client.id == first
        assert client.do("stand.context.chatMetadata.persona_memory.file") == "Another name"

    def test_a_branch_has_its_own_and_names_its_parent(self, client, server):
        long_chat(client)
        client.generate()
        parent, before = client.id, branch_texts(server.url, client.id)
        client.do("stand.kept = stand.context.chatMetadata")
        client.do(
            "await stand.open('Branch #4', {...stand.kept, main_chat: 'Mira - 1'}, stand.context.chat.slice(0, 5))"
        )
        client.generate()
        assert client.id != parent
        assert client.do("stand.context.chatMetadata.persona_memory.parent") == parent
        assert branch_texts(server.url, client.id) == before[:5]
        client.do("await stand.open('Mira - 1', stand.kept)")
        client.generate()
        assert client.id == parent

    def test_other_chats_and_a_group_made_of_one_have_their_own(self, client):
        client.talk("Good morning.")
        ids = []
        for script in (
            "null",
            "await stand.open('Mira - 2', {})",
            "(stand.context.groupId = '7', await stand.open('Group', {...stand.context.chatMetadata}))",
        ):
            client.do(script)
            client.generate()
            ids.append(client.id)
        assert len(set(ids)) == 3

    def test_without_an_open_chat_nothing_happens(self, client):
        client.do("await stand.open(undefined, {}, [])")
        assert client.generate() == {}
        assert client.id is None


@needs_chromium
class TestThroughTheProxy:
    """Requests say which chat they are of, and nothing is placed."""

    @pytest.fixture
    def client(self, browser, server):
        with open_client(browser, server.url) as opened:
            opened.do("stand.context.mainApi = 'openai'")
            opened.do("stand.context.chatCompletionSettings.custom_url = a", f"{server.url}/v1")
            yield opened

    @staticmethod
    def said(client) -> dict:
        """The identity in the last request."""
        return yaml.safe_load(client.do("stand.requests.at(-1).custom_include_body"))["persona_memory"]

    def test_a_request_names_its_chat_and_nothing_is_placed(self, client):
        long_chat(client)
        assert client.generate() == {}
        named = {"chat_id": client.id, "title": "Mira - 1", "character": "Mira", "user": "Robin"}
        assert self.said(client) == {**named, "kind": "normal"}
        assert client.do("stand.context.chatCompletionSettings.custom_include_body ?? null") is None

    def test_a_groups_name_is_told(self, client):
        client.do("stand.context.groups = [{ id: 'g1', name: 'The crew' }, { id: 'g2', name: 'Others' }]")
        client.do("stand.context.groupId = 'g1'")
        client.talk("Good morning.")
        client.generate()
        assert self.said(client)["group"] == "The crew"

    @pytest.mark.parametrize("kind", ["normal", "swipe", "regenerate", "continue", "impersonate", "quiet"])
    def test_the_kind_of_generation(self, client, kind):
        client.talk("Good morning.")
        client.generate(type=kind)
        assert self.said(client)["kind"] == kind

    def test_other_names_of_a_normal_generation(self, client):
        client.talk("Good morning.")
        for kind in ("group_chat", None, "a new one"):
            client.generate(type=kind)
            assert self.said(client)["kind"] == "normal"

    def test_a_prompt_without_a_generation_is_a_quiet_one(self, client):
        client.talk("Good morning.")
        client.generate(type="swipe")
        client.generate(type="normal", dryRun=True)
        client.do("await stand.post({})")
        assert self.said(client)["kind"] == "quiet"
        client.do("await stand.post({type: 'impersonate'})")
        assert self.said(client)["kind"] == "impersonate"

    def test_a_branch_names_its_parent(self, client):
        client.talk("Good morning.")
        client.generate()
        parent = client.id
        client.do("await stand.open('Branch', {...stand.context.chatMetadata, main_chat: 'Mira - 1'})")
        client.generate()
        assert self.said(client)["parent_chat_id"] == parent

    def test_what_the_user_has_in_the_body_stays(self, client):
        for text in (
            "", "   \n", "# a comment\n", "min_p: 0.05\ntop_k: 40\n", "# mine\nmin_p: 0.05", "---\nmin_p: 0.05\n",
            "  min_p: 0.05\n  top_k: 40", "- min_p: 0.05\n- top_k: 40", '{"min_p": 0.05, "top_k": 40}', "{min_p: 0.05}",
            "[{min_p: 0.05}, {top_k: 40}]", "stop: |\n  one\n  two\n", "stop: [one, two]", "a:\n  b:\n    - c",
            "min_p: 0.05 # with a remark\n\n",
        ):  # fmt: skip
            client.talk("Good morning.")
            client.do("stand.context.chatCompletionSettings.custom_include_body = a", text)
            client.generate()
            sent = client.do("stand.requests.at(-1).custom_include_body")
            assert merged(sent).pop("persona_memory")["chat_id"] == client.id
            assert {k: v for k, v in merged(sent).items() if k != "persona_memory"} == merged(text), text

    def test_this_machine_has_several_names(self, client, server):
        client.talk("Good morning.")
        client.do("stand.context.chatCompletionSettings.custom_url = a", server.url.replace("127.0.0.1", "localhost"))
        client.generate()
        assert self.said(client)["chat_id"] == client.id

    def test_other_servers_are_told_nothing(self, client, server):
        long_chat(client)
        for change in (
            "chatCompletionSettings.custom_url = 'http://127.0.0.1:9/v1'",
            "chatCompletionSettings.chat_completion_source = 'claude'",
        ):
            client.do(f"stand.context.{change}")
            placed = client.generate()
            assert client.do("stand.requests.at(-1).custom_include_body ?? null") is None
            assert "silverthorn" in placed_text(placed)

    def test_off_says_nothing(self, client):
        client.talk("Good morning.")
        client.set("enabled", False)
        client.generate()
        assert client.do("stand.requests.at(-1).custom_include_body ?? null") is None

    def test_the_panel_shows_what_the_proxy_recalled(self, client, server):
        """The stand-in's request is posted by the test, as the client's own server does."""
        long_chat(client)
        client.generate()
        shown = client.do("stand.context.chat.map((m) => ({role: m.is_user ? 'user' : 'assistant', content: m.mes}))")
        body = {"model": "m", "messages": [{"role": "system", "content": "You are Mira."}, *shown], "max_tokens": 200}
        body |= merged(client.do("stand.requests.at(-1).custom_include_body"))
        with server.context(1600):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=TIMEOUT).raise_for_status()
        client.do("await stand.context.eventSource.emit('generation_ended')")
        client.page.get_by_text("silverthorn").wait_for()
        assert "chats go through persona_memory" in client.panel()


def merged(text: str) -> dict:
    """What SillyTavern's server adds to a request for an "include body" text."""
    found = yaml.safe_load(text)
    rows = found if isinstance(found, list) else [found]
    return {k: v for row in rows if isinstance(row, dict) for k, v in row.items()}


@needs_chromium
class TestServerAway:
    """The chat goes on, and the user is told once."""

    def test_one_notice_until_it_is_back(self, browser, tmp_path, shared_upstream):
        given = settings(tmp_path / "data", shared_upstream.url, no_guidance=True, port=free_port())
        with open_client(browser, f"http://127.0.0.1:{given.port}") as client, contextlib.ExitStack() as stack:
            for there, notices in ((True, 0), (False, 1), (True, 1), (False, 2)):
                stack.enter_context(LocalServer(given)) if there else stack.close()
                if not notices:
                    long_chat(client)
                for _ in range(2):
                    assert ("silverthorn" in placed_text(client.generate())) == there
                assert len(client.notices) == notices
            assert "no answer" in client.notices[0]

    def test_a_server_that_never_answers_holds_no_reply_up(self, browser):
        silent = socket.create_server(("127.0.0.1", 0))
        with silent, open_client(browser, f"http://127.0.0.1:{silent.getsockname()[1]}", hasty=True) as client:
            client.talk("Good morning.")
            assert client.generate() == {}
            client.page.wait_for_function("stand.notices.length")
            assert "in time" in client.notices[0]

    def test_a_server_that_is_late_is_not_away(self, browser, server):
        late = "(globalThis.fetch = (url, given) => fetched(url.endsWith('/inject') ? '/hang' : url, given), null)"
        with open_client(browser, server.url, hasty=True) as client:
            client.do("globalThis.fetched = globalThis.fetch")
            client.do(late)
            client.talk("Good morning.")
            assert client.generate() == {}
            client.page.get_by_text("Too late for this reply").wait_for()
            assert client.notices == []

    def test_the_key(self, browser, tmp_path, shared_upstream):
        given = settings(tmp_path / "data", shared_upstream.url, no_guidance=True, api_key="sesame-7")
        with LocalServer(given) as running, open_client(browser, running.url) as client:
            long_chat(client)
            assert client.generate() == {}
            assert len(client.notices) == 1 and "under Key" in client.notices[0]
            client.set("key", "sesame-7")
            assert "silverthorn" in placed_text(client.generate())
            client.page.get_by_text("Connected").wait_for()


@needs_chromium
class TestPanel:
    """What the user sees among the client's extensions."""

    def test_where_nothing_was_recalled_it_says_why(self, client):
        client.talk("Good morning.")
        client.generate()
        client.page.get_by_text("everything is still in the prompt").wait_for()

    def test_what_was_recalled_is_text_and_nothing_else(self, client):
        planted = '<img src=x onerror="stand.hacked = true"> the password of the northern gate'
        client.talk(planted, "<b>Then</b> I will guard it.")
        long_chat(client)
        assert planted in placed_text(client.generate())
        assert f"Robin: {planted}" in client.panel()
        assert client.page.locator("#persona_memory_settings img, #persona_memory_settings ol b").count() == 0
        assert client.do("stand.hacked ?? null") is None

    def test_a_link_to_the_chats_page(self, client, server):
        link = client.page.locator("#persona_memory_settings a")
        assert link.get_attribute("href") == f"{server.url}/persona_memory/#/"
        client.talk("Good morning.")
        client.generate()
        assert link.get_attribute("href") == f"{server.url}/persona_memory/#/chat/{client.id}"

    def test_carrying_over_is_set_for_the_character(self, client, server):
        url = f"{server.url}/api/persona_memory/characters/Mira"
        box = client.page.get_by_label("Recall from other chats with Mira")
        box.set_checked(True)
        client.page.wait_for_function(
            "url => fetch(url).then((r) => r.json()).then((answer) => answer.carry_over)", arg=url
        )
        client.do("await stand.open('Mira - 2', {})")
        client.page.wait_for_function("() => document.querySelectorAll('[type=checkbox]')[1].checked")
        box.set_checked(False)
        client.page.wait_for_function(
            "url => fetch(url).then((r) => r.json()).then((answer) => !answer.carry_over)", arg=url
        )

    def test_what_is_set_for_a_character_is_not_shown_without_one(self, client):
        box = client.page.get_by_label("Recall from other chats with")
        box.wait_for(state="visible")
        client.do("Object.assign(stand.context, { characterId: undefined }), await stand.open('', {}, []), null")
        box.wait_for(state="hidden")

    def test_it_speaks_the_users_language(self, browser, server):
        words = json.dumps(pm.extension_words()["de-de"])
        with open_client(browser, server.url, f"(stand.words = {words}, null)") as client:
            long_chat(client)
            client.generate()
            for said in ("Meine Chats merken", "Erinnerungen:"):
                client.page.get_by_text(said).wait_for(state="attached")

    def test_what_the_proxy_does_itself_is_not_asked(self, client, server):
        depth = client.page.get_by_text("messages from the end")
        depth.wait_for()
        client.do("Object.assign(stand.context, {mainApi: 'openai'})")
        client.do("stand.context.chatCompletionSettings.custom_url = a", f"{server.url}/v1")
        client.do("await stand.open('Mira - 1', {})")
        depth.wait_for(state="hidden")

    def test_the_role_is_the_users(self, client):
        client.page.get_by_label("Role").select_option("user")
        long_chat(client)
        assert client.generate()["persona_memory_memories"]["role"] == 1

    def test_how_much_is_known_is_said_in_words(self, client, server):
        """A chat that changed while the server was away; the button has it read in."""
        client.talk("One.", "Two.", "Three.", "Four.")
        client.generate()
        client.talk("Five.", "Six.")
        client.do("stand.context.chat[3].mes = 'Four, changed.'")
        client.page.locator("#persona_memory_settings .inline-drawer-header").click()
        client.page.get_by_text("3 of 6 messages of this chat are not known yet.").wait_for()
        client.page.get_by_text("Read them in").click()
        client.page.get_by_text("All 6 messages of this chat are known").wait_for()
        assert branch_texts(server.url, client.id)[3:] == ["Four, changed.", "Five.", "Six."]

    def test_a_recalled_line_names_its_speaker_and_can_be_forgotten_and_pinned(self, client, server):
        long_chat(client)
        client.generate()
        row = client.page.locator("#persona_memory_settings li", has_text="silverthorn")
        assert row.text_content().startswith(f"Robin: {ELVEN}")
        for title, other in (("Forget", "Remember again"), ("Remember again", "Forget"), ("Pin", "Unpin")):
            row.get_by_title(title, exact=True).dispatch_event("click")
            row.get_by_title(other, exact=True).wait_for(state="attached")
        first = rows(server, client)[0]
        assert (first["pinned"], first["forgotten"]) == (True, False)

    def test_it_says_so_when_another_extension_puts_the_same_into_the_prompt(self, client):
        long_chat(client)
        notice = client.page.get_by_text("tells the model the same")
        for prompt, told in (("Something else.", False), (f"Past events:\n  Robin: {ELVEN}", True), ("", False)):
            client.do("(stand.context.extensionPrompts['3_vectors'] = { value: a }, null)", prompt)
            client.generate()
            assert (notice.count() == 1) == told
        assert "Vector Storage" not in client.panel()

    def test_its_data_can_be_removed(self, client):
        client.set("depth", 4)
        client.do("(await import(a)).clean()", SCRIPT_PATH)
        assert client.do("stand.context.extensionSettings.persona_memory?.depth ?? 1") == 1

    def test_it_is_there_once(self, client):
        client.do("await import(a).then(() => null)", SCRIPT_PATH + "?again")
        assert client.page.locator("#persona_memory_settings").count() == 1


def rows(server, client) -> list[dict]:
    """The open chat's messages as the server has them."""
    address = f"{server.url}/api/persona_memory/chats/{client.id}/messages"
    return httpx.get(address, timeout=TIMEOUT).json()["messages"]


@needs_chromium
class TestMessages:
    """A message's button, and the slash commands."""

    @staticmethod
    def look_at(client, number: int):
        """What the button of that message shows."""
        client.do(
            "(document.querySelector('#chat').replaceChildren(stand.message(a)),"
            " document.querySelector('#chat .persona_memory_button').click(), null)",
            number,
        )
        shown = client.page.locator("#chat .persona_memory_message")
        shown.wait_for()
        return shown

    def test_a_message_is_pinned_and_forgotten(self, client, server):
        """One that the server does not know yet is read in first."""
        client.talk("One.", "<think>Hm.</think>Two.", "One.")
        shown = self.look_at(client, 1)
        shown.get_by_title("Pin", exact=True).dispatch_event("click")
        shown.get_by_title("Unpin", exact=True).wait_for(state="attached")
        shown = self.look_at(client, 1)
        assert shown.locator("h3").text_content() == "Message #1, Mira"
        shown.get_by_title("Forget", exact=True).dispatch_event("click")
        shown.get_by_title("Remember again", exact=True).wait_for(state="attached")
        assert [(row["pinned"], row["forgotten"]) for row in rows(server, client)][1] == (True, True)
        assert self.look_at(client, 2).locator("h3").text_content() == "Message #2, Robin"

    def test_why_a_reply_was_said(self, client):
        long_chat(client)
        client.generate()
        client.talk("x", "Silverthorn.")
        client.do("(stand.context.chat.splice(-2, 1), null)")
        shown = self.look_at(client, client.do("stand.context.chat.length - 1"))
        assert "Why this was said" in shown.text_content()
        assert f"Robin: {ELVEN}" in shown.locator("li").first.text_content()
        assert "Nothing is kept" in self.look_at(client, 3).text_content()

    def test_why_no_memory_came(self, client):
        client.talk("Good morning.")
        client.generate()
        client.do("stand.say(false, 'And to you.'), null")
        shown = self.look_at(client, 1)
        assert "Nothing was recalled: everything is still in the prompt." in shown.text_content()

    def test_what_is_no_message_of_the_chat_is_refused_in_words(self, client):
        client.talk("One.")
        client.do("stand.say(false, 'Night falls.', {extra: {type: 'narrator'}})")
        client.do(
            "(document.querySelector('#chat').replaceChildren(stand.message(1)),"
            " document.querySelector('#chat .persona_memory_button').click(), null)"
        )
        client.page.wait_for_function("stand.notices.length")
        assert client.notices == ["The server does not know this message."]

    @staticmethod
    def command(client, name: str, text: str = "", **named: str) -> str:
        """What a slash command returns."""
        return client.do("await stand.commands[a[0]].callback(a[1], a[2])", [f"pm-{name}", named, text])

    def test_commands_return_values_for_scripts(self, client, server):
        long_chat(client)
        assert self.command(client, "state") == "83 of 83 messages of this chat are not known yet."
        said = self.command(client, "note", "Mira has a scar.")
        assert said == "Mira has a scar."
        assert "All" in self.command(client, "state")
        assert json.loads(self.command(client, "state", **{"as": "json"}))["current"] is True
        found = self.command(client, "recall", "the password of the northern gate", limit="2").split("\n")
        assert found[0] == f"Robin: {ELVEN}" and len(found) == 2
        assert json.loads(self.command(client, "recall", "gate", **{"as": "json"}))[0]["id"]
        assert self.command(client, "pin", "0-2", quiet="true") == "3"
        before = len(client.notices)
        assert self.command(client, "forget", "1") == "1"
        assert self.command(client, "pin", "2 undo=true") == "1"
        shown = client.notices[before:]
        assert [words.split(": ")[0] for words in shown] == ["Forget", "Unpin"] and "#1 Mira: " in shown[0]
        assert self.command(client, "pin") == "1"
        kept = [(row["pinned"], row["forgotten"]) for row in rows(server, client)]
        assert kept[:4] + kept[-1:] == [(True, False), (True, True), (False, False), (False, False), (True, False)]
        assert "Mira has a scar." in placed_text(client.generate())

    @pytest.mark.parametrize(
        "name, text, words", [("pin", "one", "number"), ("forget", "99", "does not know"), ("recall", " ", "behind")]
    )
    def test_commands_say_what_is_wrong(self, client, name, text, words):
        client.talk("One.")
        with pytest.raises(Exception, match=words):
            self.command(client, name, text)
