"""Settings: one declaration serves flag, variable, `.env` file and README; and what is in the README is in the code."""

import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fakes import PROGRAM, LocalServer, free_port, settings

import persona_memory as pm

README = (Path(pm.__file__).parent / "README.md").read_text(encoding="utf8")
EXAMPLE = (Path(pm.__file__).parent / ".env.example").read_text(encoding="utf8")
NAMES = [f.name for f in pm.OPTIONS]
SELF = Path("/proc/self/mem")  # a file that is there and cannot be read, not even by root


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the README's table under a heading, without its two head lines."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("|")][
        2:
    ]


def test_the_settings_table_says_what_the_code_says():
    """Every field of `Settings` has its row, word for word, and no row is about anything else."""
    shown = {f.name: f.metadata["shown"] for f in pm.OPTIONS}
    expected = [
        [
            f"`{pm.flag_of(f.name)}`",
            f"`{pm.variable_of(f.name)}`",
            f"`{shown[f.name]}`" if shown[f.name] == str(f.default) else shown[f.name],
            f.metadata["help"],
        ]
        for f in pm.OPTIONS
    ]
    assert table_rows("Settings") == expected


def test_the_http_table_lists_the_routes_of_the_code(tmp_path):
    """Every route of the app is in the README's table, and every call of the table is a route."""
    app = pm.create_app(pm.Settings(proxy=True, data=str(tmp_path), upstream="http://127.0.0.1:9/v1"))
    rules = ((method, str(rule)) for rule in app.url_map.iter_rules() for method in rule.methods - {"HEAD", "OPTIONS"})
    routes = {f"{method} {re.sub('<[a-z]+:', '<', rule)}" for method, rule in rules}
    calls = re.findall(r"`((?:GET|POST|PATCH|DELETE) [^`?]+)", "\n".join(row[0] for row in table_rows("HTTP")))
    assert set(calls) == routes


def test_every_flag_and_variable_that_the_readme_names_exists():
    """The prose names no option that the code does not have."""
    flags = {pm.flag_of(n) for n in (*NAMES, *pm.ACTIONS)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags
    for text in (README, EXAMPLE):
        assert set(re.findall(r"PERSONA_MEMORY_[A-Z_]+", text)) == {pm.variable_of(n) for n in NAMES}


def test_the_errors_table_lists_the_codes_of_the_code():
    """Each code with its status, and no other."""
    own = {c.code: c.status for c in vars(pm).values() if isinstance(c, type) and issubclass(c, pm.PersonaMemoryError)}
    source = Path(pm.__file__).read_text(encoding="utf8")
    made = re.findall(r'UpstreamError\(\s*(\d+), [^)]*?"code": "(\w+)"', source)
    expected = {(f"`{code}`", str(status)) for code, status in own.items() if code} | {(f"`{c}`", n) for n, c in made}
    assert {(code, status) for code, status, _ in table_rows("Errors")} == expected


def test_the_readme_names_the_extensions_slash_commands():
    """All of them, and none that it does not have."""
    known = {f"/pm-{name}" for name in re.findall(r"\badd\('([a-z]+)'", pm.EXTENSION_SCRIPT)}
    assert known and set(re.findall(r"/pm-[a-z]+", README)) == known


def test_the_readmes_pictures_are_there():
    """And no picture lies in the tests' data that nothing shows."""
    folder = Path(pm.__file__).parent
    shown = set(re.findall(r"\]\((tests/data/[^)]+)\)|src=\"([^\"]+)\"", README))
    names = {Path(a or b).name for a, b in shown}
    assert names == {file.name for file in (folder / "tests" / "data").glob("*.png")}


def test_flags_go_before_the_environment_and_that_before_the_env_file(tmp_path):
    """One setting given in all three ways, then in two, then in one."""
    file = tmp_path / ".env"
    file.write_text("PERSONA_MEMORY_PORT=1\nPERSONA_MEMORY_LOG_TEXT=on\n")
    environ = {"PERSONA_MEMORY_PORT": "2"}
    assert pm.load_settings(["--port", "3"], environ, file).port == 3
    assert pm.load_settings([], environ, file).port == 2
    assert pm.load_settings([], {}, file).port == 1
    assert pm.load_settings([], {}, file).log_text is True
    assert pm.load_settings([], {}, tmp_path / "absent").port == 5100


def test_a_tilde_is_the_home_folder_wherever_it_is_given(monkeypatch):
    """Shells leave it as it is behind a flag's =, and in a variable."""
    monkeypatch.setenv("HOME", "/somewhere")
    found = pm.load_settings(["--data=~/chats", "--api-key=~key"], {"PERSONA_MEMORY_EMBEDDER": "~/model"})
    assert (found.data, found.embedder, found.api_key) == ("/somewhere/chats", "/somewhere/model", "~key")


def test_settings_know_where_they_were_set_also_when_they_are_copied(tmp_path):
    """And a setting from a flag equals the same one from a variable."""
    file = tmp_path / ".env"
    file.write_text("PERSONA_MEMORY_LOG_TEXT=on\n")
    loaded = pm.load_settings(["--port", "3"], {"PERSONA_MEMORY_MODEL": "m"}, file)
    known = {
        "port": "flag --port", "model": "variable PERSONA_MEMORY_MODEL", "log_text": ".env PERSONA_MEMORY_LOG_TEXT"
    }  # fmt: skip
    assert loaded.sources == replace(loaded, proxy=True).sources == known
    assert loaded == pm.load_settings(["--port", "3", "--model", "m", "--log-text"], {}, None)
    assert pm.Settings().sources == {}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_env_file_may_have_any_encoding_that_windows_writes(tmp_path, encoding):
    """Its editors and shells put a byte order mark in front, and some write UTF-16."""
    file = tmp_path / ".env"
    file.write_text("PERSONA_MEMORY_PORT=7\nPERSONA_MEMORY_MODEL=caf\u00e9\n", encoding)
    loaded = pm.load_settings([], {}, file)
    assert (loaded.port, loaded.model) == (7, "caf\u00e9")


@pytest.mark.parametrize(
    "raw",
    ["PERSONA_MEMORY_PORT=7".encode("utf-16-le"), b"\xff\xfe\x00", b"PERSONA_MEMORY_MODEL=caf\xe9\n"],
    ids=["utf-16 without a mark", "half utf-16", "latin-1"],
)
def test_an_env_file_that_is_no_text_is_named(tmp_path, raw):
    """With what to do, and not half read."""
    (tmp_path / ".env").write_bytes(raw)
    with pytest.raises(pm.SettingsError, match=r"\.env cannot be read.*UTF-8"):
        pm.load_settings([], {}, tmp_path / ".env")


@pytest.mark.skipif(not SELF.is_file(), reason="no /proc here")
def test_an_env_file_that_cannot_be_read_is_named(tmp_path):
    """As where it belongs to somebody else."""
    (tmp_path / ".env").symlink_to(SELF)
    with pytest.raises(pm.SettingsError, match=r"\.env cannot be read"):
        pm.load_settings([], {}, tmp_path / ".env")


def test_what_is_misspelt_is_told_with_what_it_may_mean(tmp_path, caplog, capsys):
    """Settings in the file and in the environment, a line that is none, and an option."""
    file = tmp_path / ".env"
    file.write_text("PERSONA_MEMORY_UPSTREM=http://127.0.0.1:1/v1\nPERSONA_MEMORY_PORT 5135\n")
    found = pm.load_settings([], {"PERSONA_MEMORY_CONTEX": "4096", "PERSONA_MEMORY_PORT_5100_TCP": "tcp"}, file)
    assert (found.upstream, found.port, found.context) == ("local", 5100, 0)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "Did you mean PERSONA_MEMORY_UPSTREAM?" in told and "Did you mean PERSONA_MEMORY_CONTEXT?" in told
    assert f"{file}, line 2" in told and "5100_TCP" not in told
    with pytest.raises(SystemExit):
        pm.load_settings(["--contextsize", "2048"], {}, None)
    assert "Did you mean --context?" in capsys.readouterr().err


def test_a_folder_named_env_is_none_of_ours(tmp_path):
    """Some keep a virtual environment there."""
    (tmp_path / ".env").mkdir()
    assert pm.load_settings([], {}, tmp_path / ".env").port == 5100


@pytest.mark.parametrize("variable", pm.GEMINI_KEY_VARIABLES)
def test_a_gemini_key_makes_gemini_the_upstream(variable):
    """A key in the environment is all that Gemini needs; an upstream that is named goes before it."""
    settings = pm.load_settings([], {variable: "secret"}, None)
    assert (settings.upstream, settings.upstream_key) == ("gemini", "secret")
    assert pm.load_settings(["--upstream", "http://127.0.0.1:1/v1"], {variable: "secret"}, None).upstream_key == ""
    assert pm.load_settings([], {}, None).upstream == "local"


def test_the_address_of_gemini_may_come_from_googles_own_variable():
    """A gateway's address in the variable that Google's tools read; our own setting goes before it."""
    environ = {"GEMINI_API_KEY": "secret", "GOOGLE_GEMINI_BASE_URL": "http://127.0.0.1:9"}
    assert pm.load_settings([], environ, None).gemini_endpoint == "http://127.0.0.1:9"
    assert pm.load_settings(["--gemini-endpoint", "http://127.0.0.1:8"], environ, None).gemini_endpoint.endswith(":8")


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--budget", "50/50/50/50"], "--budget"),
        (["--budget", "a/b"], "--budget"),
        (["--budget", "40/30/30/0"], "--budget"),
        (["--port", "x"], "--port"),
        (["--port", "65536"], "--port"),
        (["--context", "9" * 5000], "--context"),
        (["--context", "10"], "--context"),
        (["--upstream", "gemini"], "GEMINI_API_KEY"),
        (["--upstream-limit", "0"], "--upstream-limit"),
        (["--upstream-timeout", "0"], "--upstream-timeout"),
        (["--gemini-safety", "sometimes"], "--gemini-safety"),
        (["--log-format", "xml"], "--log-format"),
    ],
)
def test_settings_that_cannot_be_run_with_are_refused_with_advice(argv, word):
    """The sentence names the option to change."""
    with pytest.raises(pm.SettingsError, match=re.escape(word)):
        pm.load_settings(argv, {}, None)


def test_a_data_folder_that_cannot_be_used_is_said_at_the_start(tmp_path, capsys):
    """No server starts whose chats would be kept nowhere."""
    file = tmp_path / "notes.txt"
    file.write_text("")
    assert pm.main(["--data", str(file), "--port", "0"]) == 2
    assert "--data" in capsys.readouterr().err


def test_an_upstream_that_is_no_url_is_refused_with_the_three_ways(tmp_path):
    """A typo in --upstream names what it could be."""
    with pytest.raises(pm.SettingsError, match="three ways"):
        pm.make_upstream(pm.Settings(upstream="lokal", data=str(tmp_path)), pm.Metrics())
    missing = tmp_path / "model.gguf"
    with pytest.raises(pm.SettingsError, match=re.escape(str(missing))):
        pm.make_upstream(pm.Settings(upstream=str(missing), data=str(tmp_path)), pm.Metrics())


@pytest.mark.parametrize(
    "url",
    ["http://", "http://[::1", "http://[bad]/v1", "http://host:5001x/v1", "http://host:99999", "http://a..b/v1",
     f"http://{'a' * 70}.com/v1", "http://xn--/v1", "ftp://host/v1", "[::1", "host:5001x"],
)  # fmt: skip
def test_an_address_that_nothing_can_be_asked_at_is_refused_at_the_start(tmp_path, url):
    """No turn should be the first to find out."""
    for given in ({"upstream": url}, {"upstream": "gemini", "gemini_endpoint": url, "upstream_key": "k"}):
        with pytest.raises(pm.SettingsError, match="is no URL"):
            pm.make_upstream(pm.Settings(data=str(tmp_path), **given), pm.Metrics())


@pytest.mark.parametrize("key", ["sk-abc…xyz", "sk abc", "sk-\u00a0abc", "sk-\nabc"])
@pytest.mark.parametrize("upstream", ["gemini", "http://127.0.0.1:9/v1"])
def test_a_key_that_was_not_copied_whole_is_refused_at_the_start(tmp_path, key, upstream):
    """Every turn would fail with it. It is not repeated."""
    with pytest.raises(pm.SettingsError, match="Copy the whole key") as refused:
        pm.make_upstream(pm.Settings(upstream=upstream, upstream_key=key, data=str(tmp_path)), pm.Metrics())
    assert key not in str(refused.value)


def test_white_space_around_a_setting_is_no_part_of_it(tmp_path):
    """Shells of Windows keep what stands in front of && in a variable's value."""
    file = tmp_path / ".env"
    file.write_text('PERSONA_MEMORY_MODEL=" a model "')
    environ = {"PERSONA_MEMORY_UPSTREAM_KEY": "sk-house \r", "PERSONA_MEMORY_PORT": "7 ", "PERSONA_MEMORY_BUDGET": " "}
    found = pm.load_settings(["--upstream", " http://127.0.0.1:9/v1 "], environ, file)
    assert (found.model, found.upstream_key, found.port) == ("a model", "sk-house", 7)
    assert (found.upstream, found.budget) == ("http://127.0.0.1:9/v1", pm.Settings().budget)
    google = pm.load_settings([], {"GEMINI_API_KEY": " AIza ", "GOOGLE_API_KEY": "other"}, None)
    assert (google.upstream, google.upstream_key) == ("gemini", "AIza")


# ---------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "host, url",
    [
        ("127.0.0.1", "http://127.0.0.1:5100"),
        ("localhost", "http://localhost:5100"),
        ("::1", "http://[::1]:5100"),
        ("0.0.0.0", "http://127.0.0.1:5100"),
        ("::", "http://[::1]:5100"),
    ],
)
def test_the_printed_address_is_one_that_a_client_can_use(host, url):
    """IPv6 addresses stand in brackets, and of all addresses one is named."""
    given = pm.Settings(host=host, proxy=True, upstream="http://127.0.0.1:9/v1")
    assert pm.local_url(given, 5100) == url
    assert f"{url}/v1\n" in pm.start_text(given, 5100)
    assert ("other addresses" in pm.start_text(given, 5100)) == (host in ("0.0.0.0", "::"))


def has_ipv6() -> bool:
    """Whether this machine can listen on ::1."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_the_server_answers_at_the_address_that_it_prints(data_dir, upstream):
    """With IPv6 too."""
    given = settings(data_dir, upstream.url, host="::1")
    with LocalServer(given, ready=False) as running:
        url = pm.local_url(given, running.server.effective_port)
        assert httpx.get(f"{url}/api/persona_memory/chats").json() == []


def test_an_address_that_is_not_this_machines_is_a_readable_error(data_dir, upstream):
    """RFC 5737 keeps that one free for examples."""
    with pytest.raises(pm.SettingsError, match=r"Cannot listen on 203\.0\.113\.7"):
        pm.create_server(settings(data_dir, upstream.url, host="203.0.113.7"))


def test_a_key_given_as_a_flag_warns_that_others_can_see_it():
    """Flags stand in the list of processes; variables do not."""
    by_flag = pm.load_settings(["--api-key", "open sesame"], {}, None)
    by_variable = pm.load_settings([], {"PERSONA_MEMORY_API_KEY": "open sesame"}, None)
    assert "--api-key was given as a flag" in pm.start_text(by_flag, 5100)
    assert "PERSONA_MEMORY_API_KEY" in pm.start_text(by_flag, 5100)
    assert "as a flag" not in pm.start_text(by_variable, 5100)
    assert "open sesame" not in pm.start_text(by_flag, 5100)


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("upstream", ["local", "gemini", "http://127.0.0.1:9/v1"])
@pytest.mark.parametrize("proxy", [True, False])
def test_the_start_text_names_page_base_url_model_and_next_step_in_six_lines(upstream, proxy):
    """Also with keys given as flags, whose warning is the sixth."""
    keys = dict.fromkeys(("api_key", "upstream_key", "summary_key"), "flag --x")
    given = pm.Settings(upstream=upstream, proxy=proxy, model="m", api_key="k", host="0.0.0.0", sources=keys)
    text = pm.start_text(given, 5100)
    assert text.count("\n") <= 5
    assert "Memory page: http://127.0.0.1:5100/" in text and "Next:" in text
    assert ("http://127.0.0.1:5100/v1" in text, "Model:" in text) == (proxy, proxy)


def test_the_help_shows_every_option_once_in_its_group_and_examples():
    """The groups name no option that is gone."""
    text = pm.argument_parser().format_help()
    for name in (*NAMES, *pm.ACTIONS):
        assert len(re.findall(rf"^  {pm.flag_of(name)}\b(?!-)", text, re.MULTILINE)) == 1, name
    assert {n for names in pm.OPTION_GROUPS.values() for n in names} <= set(NAMES)
    assert text.index("examples:") < text.index("\nserver:") < text.index("\nmodel:") < text.index("\nmemory:")


def test_an_older_python_is_told_what_it_lacks():
    """Not by a traceback of an import."""
    older = "import sys; sys.hexversion = 0x030A00F0; import persona_memory"
    ended = subprocess.run([sys.executable, "-c", older], cwd=PROGRAM.parent, capture_output=True, text=True)
    assert "needs Python 3.11 or newer" in ended.stderr


def test_who_has_not_installed_the_packages_is_told_how():
    """The system's own Python often lets nobody install any."""
    bare = [getattr(sys, "_base_executable", sys.executable), "-S", "-E", str(PROGRAM), "--help"]  # -S: no packages
    ended = subprocess.run(bare, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert all(part in ended.stderr for part in (str(PROGRAM.parent / "requirements.txt"), "-m venv venv", "--help"))


def test_the_program_imports_nothing_from_where_it_is_started(tmp_path):
    """Though it begins anew as a module: only what lies beside it, and the packages, are its own."""
    for name in ("os", "runpy", "flask", "persona_memory"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted')")
    told = subprocess.run(
        [sys.executable, str(PROGRAM), "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == pm.__version__


def test_a_deferred_import_waits_for_its_first_call(monkeypatch):
    """Within the block alone, and not where the module is there already. There nothing is an instance of what a
    stand-in stands for, and what it decorates stays as it is."""
    monkeypatch.delitem(sys.modules, "sched", raising=False)
    with pm.deferring_imports(["sched", "re"]):
        from sched import Event, scheduler

        assert sys.modules["re"] is re
        assert not isinstance(re, Event)
        for decorate in (scheduler, scheduler(None, recursive=False)):
            assert decorate(print) is print
    assert "sched" not in sys.modules
    assert scheduler().empty()
    assert "sched" in sys.modules


def examined(given: pm.Settings, capsys) -> tuple[int, dict[str, list[str]]]:
    """What --doctor says: whether something is wrong, and its lines by what they are about."""
    try:
        pm.run_doctor(given, "")
        failed = 0
    except pm.SettingsError:
        failed = 1
    found, subject = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            found[subject][-1] += line
        else:
            level, rest = line.split(maxsplit=1)
            subject = rest.partition(":")[0]
            found.setdefault(subject, []).append(f"{level} {rest}")
    return failed, found


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of nobody, and the working one too."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_the_doctor_finds_all_well_and_leaves_nothing_behind(upstream, home, data_dir, capsys):
    """A turn is asked for, and nothing is kept of it; the extension is looked for where SillyTavern is."""
    user = home / "SillyTavern" / "data" / "default-user"
    (user / "characters").mkdir(parents=True)
    upstream.steer(reply=lambda body: "Hello!")
    given = settings(data_dir, upstream.url, port=free_port())
    failed, found = examined(given, capsys)
    assert not failed
    assert {"Python", "Packages", "Data folder", "Server", "Embedder", "Upstream", "A turn"} <= set(found)
    assert all(
        lines[0].startswith("ok") for subject, lines in found.items() if subject not in ("Extension", "Packages")
    )
    assert "Hello!" in found["A turn"][0]
    assert found["Extension"][0].startswith("note") and "--install-extension" in found["Extension"][0]
    assert not data_dir.exists()
    pm.install_extension(given, "")
    assert examined(given, capsys)[1]["Extension"] == [f"ok Extension: {user / 'extensions' / pm.EXTENSION}"]
    moved = examined(replace(given, port=free_port()), capsys)[1]["Extension"][0]
    assert moved.startswith("note") and "another address" in moved


def test_the_programs_own_data_is_not_taken_for_a_sillytavern(home):
    """It lies in the folder that the program is started in, and has a part named `characters` too."""
    memory = pm.PersonaMemory(settings(home / "data", "http://127.0.0.1:9/v1"))
    memory.recaller.change_character("Mira", True)
    memory.close()
    assert (home / "data" / "characters").exists()
    assert pm.seen_homes() == []


def test_the_doctor_says_what_is_wrong_and_what_to_do(upstream, home, data_dir, capsys):
    """An upstream that refuses the key, one that is not there, one that knows no such model; a foreign server."""
    upstream.steer(status=401, error="Invalid API key")
    failed, found = examined(settings(data_dir, upstream.url, port=upstream.port, upstream_key="sk-wrong"), capsys)
    assert failed and "another program" in found["Server"][0] and "--port" in found["Server"][0]
    assert any("Invalid API key" in line and "--upstream-key" in line for line in found["Upstream"])
    failed, found = examined(settings(data_dir, upstream.url, model="absent"), capsys)
    assert not failed and any(line.startswith("note") and "own key" in line for line in found["Upstream"])
    assert any("does not list the model absent" in line for line in found["Upstream"])
    gone = f"http://127.0.0.1:{free_port()}/v1"
    failed, found = examined(settings(data_dir, gone, summary_upstream="no url"), capsys)
    assert failed and "cannot reach" in found["Upstream"][0] and "What to do" in found["Upstream"][0]
    assert "three ways" in found["Upstream of the summaries"][0]


def test_a_second_program_on_a_data_folder_is_told_of_the_first(upstream, home, data_dir, caplog, capsys):
    """In the log, and by --doctor, which leaves no mark of its own."""
    first = pm.note_use(data_dir)
    assert not [words for words in caplog.messages if words.startswith("Another program uses")]
    found = examined(settings(data_dir, upstream.url), capsys)[1]["Data folder"][0]
    assert found.startswith("ok") and found.endswith("open in a program that runs")
    second = pm.note_use(data_dir)
    assert [words for words in caplog.messages if words.startswith("Another program uses")]
    for mark in (first, second):
        mark.close()
    assert not examined(settings(data_dir, upstream.url), capsys)[1]["Data folder"][0].endswith("runs")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder that nobody can write to")
def test_the_doctor_names_a_folder_that_cannot_be_written(upstream, home, capsys):
    """With what to do."""
    failed, found = examined(settings("/proc/none", upstream.url), capsys)
    assert failed and found["Data folder"][0].startswith("WRONG") and "--data" in found["Data folder"][0]


def test_the_doctors_exit_status_tells_scripts(upstream, home, data_dir, monkeypatch, capsys):
    """0 when all is well, 2 when something is wrong."""
    monkeypatch.setattr(pm, "set_up_log", lambda settings: None)
    ports = ["--port", str(free_port()), "--data", str(data_dir)]
    assert pm.main(["--doctor", "--upstream", upstream.url, *ports]) == 0
    assert pm.main(["--doctor", "--upstream", f"http://127.0.0.1:{free_port()}/v1", *ports]) == 2
    assert "Not everything works yet. Look at: Upstream." in capsys.readouterr().err
