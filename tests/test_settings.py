"""Settings: one declaration serves flag, variable, `.env` file and README; and what is in the README is in the code."""

import re
from pathlib import Path

import pytest

import persona_memory as pm

README = (Path(pm.__file__).parent / "README.md").read_text(encoding="utf8")
EXAMPLE = (Path(pm.__file__).parent / ".env.example").read_text(encoding="utf8")
NAMES = [f.name for f in pm.OPTIONS]


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
    routes = {f"{method} {rule.replace('<chat:', '<')}" for method, rule in rules}
    calls = re.findall(r"`((?:GET|POST|PATCH|DELETE) [^`?]+)", "\n".join(row[0] for row in table_rows("HTTP")))
    assert set(calls) == routes


def test_every_flag_and_variable_that_the_readme_names_exists():
    """The prose names no option that the code does not have."""
    flags = {pm.flag_of(n) for n in (*NAMES, *pm.ACTIONS)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags
    assert set(re.findall(r"PERSONA_MEMORY_[A-Z_]+", README + EXAMPLE)) == {pm.variable_of(n) for n in NAMES}


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


def test_an_upstream_that_is_no_url_is_refused_with_the_three_ways(tmp_path):
    """A typo in --upstream names what it could be."""
    with pytest.raises(pm.SettingsError, match="three ways"):
        pm.make_upstream(pm.Settings(upstream="lokal", data=str(tmp_path)), pm.Metrics())
