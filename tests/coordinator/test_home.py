import os
import resource
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.coordinator.home import Address, Home, Settings
from farfield.protocols.errors import FarfieldError, HomeError, StorageError

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home that nobody changes."""
    return Home.create(tmp_path_factory.mktemp("made") / "home", ["coordinator.example", "10.1.2.3"], NOW)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home", ["coordinator.example"], NOW)


def edit(home: Home, old: str, new: str) -> None:
    toml = home.path / "coordinator.toml"
    text = toml.read_text()
    assert text.count(old) == 1
    toml.write_text(text.replace(old, new))


# --- What is made ---------------------------------------------------------------------------------------------------


def test_a_home_holds_everything_and_shows_it_to_nobody(made: Home) -> None:
    found = {
        str(path.relative_to(made.path)): stat.S_IMODE(path.stat().st_mode)
        for path in made.path.rglob("*")
        if path.parent.name != "keys"
    }
    assert found == {
        "coordinator.toml": 0o600,
        "farfield.db": 0o600,
        **dict.fromkeys(("keys", "runs", "superlink", "logs"), 0o700),
    }
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    assert (made.runs, made.superlink, made.logs) == tuple(made.path / name for name in ("runs", "superlink", "logs"))
    assert made.lock == made.path / "serve.lock"
    assert [path.name for path in made.path.parent.iterdir()] == ["home"]


def test_a_home_opens_as_it_was_made(made: Home) -> None:
    opened = Home.open(made.path)
    assert opened == made
    assert opened.settings.service.hostnames == ("coordinator.example", "10.1.2.3")
    assert opened.authority().days_left(NOW) == {"server": 365, "signer": 365, "authority": 3650}
    store = opened.store()
    assert store.nodes() == []
    assert store.name == f"sqlite:///{made.path}/farfield.db"
    store.close()


def test_every_setting_is_in_the_file_with_its_default(made: Home) -> None:
    """One that limits nothing by default stands there as a comment."""
    text = (made.path / "coordinator.toml").read_text()
    document = tomllib.loads(text.replace("# max_epsilon = ", "max_epsilon = "))
    sections = {name: type(section).model_fields for name, section in made.settings}
    assert tomllib.loads(text)["privacy"] == {"delta": 1e-5}
    assert {name: list(keys) for name, keys in document.items()} == {
        name: list(keys) for name, keys in sections.items()
    }
    assert made.settings == Settings.model_validate({"service": {"hostnames": ["coordinator.example", "10.1.2.3"]}})


def test_settings_that_are_given_are_written(tmp_path: Path) -> None:
    database = 'sqlite:///my "own" [b]€.db'
    made = Home.create(tmp_path / "h", ["::1"], NOW, database=database, fleet="[::]:1", control="localhost:2")
    assert Home.open(made.path) == made
    assert (made.settings.service.fleet, made.settings.service.control) == (Address("::", 1), Address("localhost", 2))
    assert made.settings.database.url == database
    assert (made.path / 'my "own" [b]€.db').is_file()


def test_an_empty_folder_becomes_the_home(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    made = Home.create(tmp_path / "home", ["a"], NOW)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_there_is_never_overwritten(tmp_path: Path, what: str) -> None:
    place = tmp_path / "home"
    if what == "folder":
        place.mkdir()
        (place / "letter").write_text("dear aunt")
    else:
        place.write_text("dear aunt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HomeError, match="home: exists already and is not an empty folder"):
        Home.create(place, ["a"], NOW)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_home_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    """The database is the last thing that is made."""
    with pytest.raises(StorageError, match="no/such/folder"):
        Home.create(tmp_path / "home", ["a"], NOW, database="sqlite:////no/such/folder/f.db")
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
from datetime import datetime, UTC
from pathlib import Path
from farfield.coordinator.home import Home
from farfield.protocols.errors import FarfieldError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    Home.create(Path(sys.argv[1]), ["a"], datetime.now(UTC))
except FarfieldError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("largest_file", "said"),
    [
        (10, "cannot be made: file too large. Make room"),
        (2 * resource.getpagesize(), "disk I/O error. Make room"),
    ],
)
def test_a_full_disk_leaves_nothing(tmp_path: Path, largest_file: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "home", str(largest_file)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert said in done.stdout
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nobody_may_write() -> None:
    with pytest.raises(HomeError, match="/proc/home: cannot be made: "):
        Home.create(Path("/proc/home"), ["a"], NOW)


def test_a_home_may_lie_behind_a_link_and_move(home: Home, tmp_path: Path) -> None:
    home.path.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    opened = Home.open(tmp_path / "link")
    assert opened.path == tmp_path / "moved"
    opened.store().close()


# --- Opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["nowhere", "file", "folder"])
def test_what_is_no_home(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HomeError, match=f"{place}: not a coordinator's home. Name it with --home, or make one with"):
        Home.open(tmp_path / place)


@pytest.mark.parametrize(
    ("secret", "mode", "right"),
    [
        ("coordinator.toml", 0o640, 600),
        ("keys", 0o750, 700),
        ("keys/ca.key", 0o604, 600),
        ("keys/signer.key", 0o620, 600),
        ("farfield.db", 0o660, 600),
    ],
)
def test_a_secret_that_others_can_reach(home: Home, secret: str, mode: int, right: int) -> None:
    (home.path / secret).chmod(mode)
    with pytest.raises(HomeError) as caught:
        Home.open(home.path)
    said = str(caught.value)
    assert said.startswith(f"{home.path / secret}: open to others than its owner (mode {mode:04o}).")
    command = said.partition("protect it with: ")[2]
    assert command == f"chmod {right} {home.path / secret}"
    subprocess.run(command.split(), check=True)
    assert Home.open(home.path) == home


def test_a_home_that_cannot_be_read(home: Home) -> None:
    (home.path / "coordinator.toml").write_bytes(b"\xff")
    with pytest.raises(HomeError, match=r"cannot be read: .*utf-8"):
        Home.open(home.path)
    toml = home.path / "coordinator.toml"
    toml.write_text("[service\n")
    with pytest.raises(HomeError, match=r"coordinator.toml: not valid TOML: .*line 1"):
        Home.open(home.path)
    toml.unlink()
    toml.mkdir()
    with pytest.raises(HomeError, match=r"cannot be read: .*directory"):
        Home.open(home.path)


MISTAKES = {
    "unknown section": ("[runs]", "[run]", "unknown key 'run'. Did you mean 'runs'?"),
    "unknown key": ("parallel = 1", "paralel = 1", "unknown key 'runs.paralel'. Did you mean 'parallel'?"),
    "misspelled key": ("calls_per_peer", "call_per_peer", "'limits.call_per_peer'. Did you mean 'calls_per_peer'?"),
    "top level": (
        "[service]",
        "x = 1\n[service]",
        "unknown key 'x'. Known are: database, limits, privacy, runs, service.",
    ),
    "missing": ('hostnames = ["coordinator.example"]', "", "'service.hostnames' is missing"),
    "no hostname": ('["coordinator.example"]', "[]", "service.hostnames = []: "),
    "odd hostname": ("coordinator.example", "https://x", "'https://x' is neither the name nor the IP address"),
    "half an address": ("coordinator.example", "10.1.2", "'10.1.2' is neither the name nor the IP address"),
    "no port": ("0.0.0.0:9094", "0.0.0.0", 'service.enrolment: an address is HOST:PORT, for example "0.0.0.0:9094"'),
    "port 0": ("0.0.0.0:9092", "0.0.0.0:0", "service.fleet: an address is HOST:PORT"),
    "open control": ("127.0.0.1:9091", "0.0.0.0:9091", "service.control: 0.0.0.0:9091 can be reached from other"),
    "control by name": ("127.0.0.1:9091", "example.com:9091", "can be reached from other machines; give a loopback"),
    "same port": ("0.0.0.0:9094", "0.0.0.0:9092", "service: 'enrolment' and 'fleet' have the same port, 9092"),
    "a number as text": ("parallel = 1", 'parallel = "1"', "runs.parallel = '1': Input should be a valid integer"),
    "no runs": ("parallel = 1", "parallel = 0", "runs.parallel = 0: Input should be greater than"),
    "tiny messages": ("message_bytes = 262144", "message_bytes = 10", "limits.message_bytes = 10: "),
    "not a section": ("[runs]\n", "[[runs]]\n", "runs = [{'parallel': 1}]: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_settings_is_named(home: Home, mistake: str) -> None:
    old, new, said = MISTAKES[mistake]
    edit(home, old, new)
    with pytest.raises(HomeError) as caught:
        Home.open(home.path)
    assert str(caught.value).startswith(f"{home.path}/coordinator.toml: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hostnames", "more", "said"),
    [
        (["a b"], {}, "service.hostnames.0: 'a b' is neither"),
        ([], {}, "service.hostnames"),
        (["a"], {"fleet": "0.0.0.0:9091"}, "'fleet' and 'control' have the same port, 9091"),
        (["a"], {"flet": "0.0.0.0:1"}, "unknown key 'service.flet'. Did you mean 'fleet'?"),
        (["a"], {"control": "10.0.0.1:9091"}, "can be reached from other machines"),
        (["a"], {"database": "oracle://x"}, "'oracle' databases are not supported"),
    ],
)
def test_no_home_is_made_with_settings_that_are_wrong(
    tmp_path: Path, hostnames: list[str], more: dict[str, str], said: str
) -> None:
    with pytest.raises(FarfieldError) as caught:
        Home.create(tmp_path / "home", hostnames, NOW, **more)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_password_stays_where_it_is(home: Home) -> None:
    edit(home, "sqlite:///farfield.db", "postgresql://user:hidden@127.0.0.1:1/x")
    with pytest.raises(StorageError) as caught:
        Home.open(home.path).store()
    assert "hidden" not in str(caught.value)


# --- Addresses ------------------------------------------------------------------------------------------------------


@given(st.one_of(st.ip_addresses().map(str), st.just("localhost"), st.just("a-b.example")), st.integers(1, 65535))
def test_an_address_reads_back(host: str, port: int) -> None:
    assert Address.parse(str(Address(host, port))) == Address(host, port)


@given(st.text(max_size=12))
def test_what_is_no_address_is_refused(text: str) -> None:
    for one in (text, text + ":", text + ":0", text + ":65536", text + ":x", text + ":-1", text + ":９"):
        with pytest.raises(ValueError):
            Address.parse(one)


@pytest.mark.parametrize("text", ["::1:80", "[::1]", "[localhost]:80", ":80", "a_b:80", "-a:80", "1.2.3:80", 80, None])
def test_what_looks_like_an_address_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        *((text, True) for text in ("127.0.0.1:1", "127.8.0.1:1", "[::1]:1", "localhost:1")),
        *((text, False) for text in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "localhost.example:1")),
    ],
)
def test_which_addresses_stay_on_this_machine(text: str, loopback: bool) -> None:
    assert Address.parse(text).is_loopback is loopback


def test_the_home_of_the_person_is_spelt_out(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", str(home.path.parent))
    assert Home.open(Path("~/home")) == home
    with pytest.raises(HomeError):
        Home.open(Path("~nobody-of-that-name/home"))
