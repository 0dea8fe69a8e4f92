"""The replay page asks no host for anything, runs no text as code, and shows a robot that moves."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zlib
from html.parser import HTMLParser
from importlib import resources
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt.envs import replay

NASTY = "</script></title><script>alert('&')</script><img src=https://example.org/x onerror=alert(1)>"


# -- without a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env():
    envs = pytest.importorskip("brax.envs")
    return envs.get_environment("inverted_double_pendulum", backend="spring")


def still(frames=3, links=3):
    """`frames` states of `links` links at rest, stacked."""
    pos = np.zeros((frames, links, 3), np.float32)
    return SimpleNamespace(x=SimpleNamespace(pos=pos, rot=np.tile(np.float32([1, 0, 0, 0]), (frames, links, 1))))


class Resources(HTMLParser):
    """The addresses in a page, its tags, the text of its tags, and what would run."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.handlers, self.texts, self.tag = [], [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        self.addresses += [
            v for k, v in attrs if k in {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
        ]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_endtag(self, tag):
        self.tag = None

    def handle_data(self, data):
        self.texts.setdefault(self.tag, []).append(data)


def bundle(page):
    """The modules and the trajectory packed in a page."""
    packed = re.search(r'<script type="text/plain" id="bundle">([A-Za-z0-9+/=]+)</script>', page)
    return json.loads(zlib.decompress(base64.b64decode(packed[1])))


def test_page_loads_nothing(env):
    page = replay.render(env.sys, still(), title=NASTY, caption={NASTY: NASTY})
    parsed = Resources(page)
    assert parsed.addresses == ["data:,"]  # the icon
    assert parsed.handlers == []
    assert not any(re.search(r"url\(|@import", style) for style in parsed.texts["style"])
    assert "default-src 'none'" in page
    known = []
    for name, source in bundle(page)["modules"]:
        # The loader links `from '...'`; an import in any other form would be left to the browser.
        imports = re.findall(
            r"""^\s*import\b[^'"`;]*['"]([^'"]+)['"]|\}\s*from\s*['"]([^'"]+)['"]""", source, re.MULTILINE
        )
        assert set(re.findall(r"\bfrom '([^']+)';", source)) == {a or b for a, b in imports}
        assert {a or b for a, b in imports} <= set(known), name
        assert "import(" not in source
        known.append(name)
    assert known[-1] == "viewer"


def test_text_stays_text(env):
    page = replay.render(env.sys, still(), title=NASTY, caption={NASTY: NASTY, "return": "1 < 2"})
    parsed = Resources(page)
    assert "".join(parsed.texts["h1"]) == "".join(parsed.texts["title"]).strip() == NASTY
    assert "".join(parsed.texts["dt"]) == NASTY + "return"
    assert "".join(parsed.texts["dd"]) == NASTY + "1 < 2"
    assert (
        page.count("<script") == 2
    )  # the bundle, which is no code, and the loader, which the policy names by its hash
    digest = base64.b64encode(hashlib.sha256(parsed.texts["script"][-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' blob:;" in page


def test_names_of_links_are_plain(env):
    """The viewer sets a link's name as innerHTML, and three.js reads `.` and `[` in it."""
    system = env.sys.replace(link_names=["<img src=x onerror=alert(1)>", "leg.left[0]", "leg_left:0]"])
    names = list(bundle(replay.render(system, still(), title="names"))["system"]["geoms"])
    assert names == ["world", "_img src_x onerror_alert_1__", "leg_left_0_", "leg_left_0__"]


def test_page_is_deterministic_and_states_may_be_stacked_or_listed(env):
    stacked = still(4)
    listed = [SimpleNamespace(x=jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), vars(stacked.x))) for i in range(4)]
    listed = [SimpleNamespace(x=SimpleNamespace(**state.x)) for state in listed]
    page = replay.render(env.sys, stacked, title="t", dt=env.dt)
    assert (
        page
        == replay.render(env.sys, stacked, title="t", dt=env.dt)
        == replay.render(env.sys, listed, title="t", dt=env.dt)
    )
    system = bundle(page)["system"]
    assert len(system["states"]["x"]) == 4
    assert system["opt"]["timestep"] == float(env.dt)
    assert bundle(replay.render(env.sys, stacked, title="t"))["system"]["opt"]["timestep"] == pytest.approx(0.005)


def test_write_makes_the_directory(env, tmp_path):
    path = replay.write(tmp_path / "new" / "replay.html", env.sys, still(), title="é", height=300)
    assert path.read_bytes() == replay.render(env.sys, still(), title="é", height=300).encode()
    assert "flex: 0 0 300px" in path.read_text("utf-8")
    (victim := tmp_path / "victim").write_text("mine")
    (link := tmp_path / "link.html").symlink_to(victim)
    replay.write(link, env.sys, still(), title="é")  # a link is replaced: in a folder of somebody else it is a trap
    assert victim.read_text() == "mine"
    with pytest.raises(OSError, match="usual cause: a full disk"):
        replay.write(victim / "under.html", env.sys, still(), title="é")


def test_replay_ends_before_the_first_nan(env):
    states = still(5)
    states.x.pos[3, 1, 0] = np.nan
    page = replay.render(env.sys, states, title="t")
    assert len(bundle(page)["system"]["states"]["x"]) == 3
    assert "no finite state after frame 3 of 5" in page
    states.x.pos[0] = np.inf
    with pytest.raises(ValueError, match="usual cause: the simulation had diverged"):
        replay.render(env.sys, states, title="t")


@pytest.mark.parametrize(
    "states", [[], still(0), still(3, links=2), [still()]], ids=["none", "empty", "links", "batch"]
)
def test_refuses_what_is_not_one_episode(env, states):
    with pytest.raises(ValueError, match=r"expected positions \(T, 3, 3\)"):
        replay.render(env.sys, states, title="t")


def test_without_brax(monkeypatch):
    monkeypatch.setitem(sys.modules, "brax.base", None)
    with pytest.raises(ImportError, match=r"pip install evoopt-jax\[brax\]"):
        replay.render(None, [], title="t")


def test_import_does_not_import_brax():
    code = "import sys, evoopt.envs.replay; sys.exit('brax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bundled_files_are_upstream_s():
    viewer = resources.files("evoopt.envs") / "viewer"
    sums = dict(
        re.findall(r"^\| `(\S+)` .* `([0-9a-f]{64})` \|$", (viewer / "LICENSES.md").read_text("utf-8"), re.MULTILINE)
    )
    assert sums == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in viewer.iterdir()
        if file.name.endswith(".js")
    }


# -- in Chromium ---------------------------------------------------------------------------------------------------

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--window-size=800,600",
    "--force-device-scale-factor=1",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


class Browser:
    """One page of a headless Chromium without a network, driven by the DevTools protocol."""

    def __init__(self, program, profile):
        websocket = pytest.importorskip("websocket", reason="needs websocket-client: pip install evoopt-jax[dev]")
        command = [
            program,
            *FLAGS,
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.socket, self.events, self.sent = None, [], 0
        try:
            port = self.wait(lambda: (profile / "DevToolsActivePort").read_text().split()[0])
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

            def page():
                with direct.open(f"http://127.0.0.1:{port}/json", timeout=10) as reply:
                    return next(target for target in json.load(reply) if target["type"] == "page")

            address = self.wait(page)["webSocketDebuggerUrl"]
            self.socket = websocket.create_connection(address, timeout=60, http_no_proxy=["127.0.0.1"])
        except BaseException:
            self.close()
            raise

    def wait(self, ready, seconds=60):
        """What `ready` answers, as soon as that is neither None nor False."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                answer = ready()
                if answer is not None and answer is not False:
                    return answer
            except (OSError, IndexError, StopIteration):  # a file or a port that is not there yet
                pass
            assert time.monotonic() < deadline, f"not within {seconds} s; the page said {self.errors()}"
            time.sleep(0.1)

    def call(self, method, **params):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv())).get("id") != self.sent:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def evaluate(self, expression):
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def screenshot(self):
        """Float RGB in [0, 1], (height, width, 3)."""
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return pytest.importorskip("matplotlib.image").imread(io.BytesIO(png), format="png")[..., :3]

    def requests(self):
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def errors(self):
        """Exceptions, console errors and refusals (of the policy, of the network), as text."""
        kinds = {
            "Runtime.exceptionThrown": lambda p: True,
            "Runtime.consoleAPICalled": lambda p: p["type"] in {"error", "assert"},
            "Log.entryAdded": lambda p: p["entry"]["level"] == "error",
        }
        return [str(e["params"]) for e in self.events if e["method"] in kinds and kinds[e["method"]](e["params"])]

    def close(self):
        if self.socket is not None:
            self.socket.close()
        os.killpg(self.process.pid, signal.SIGKILL)  # its own group: its children and nobody else's
        self.process.wait()


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    browser = Browser(program, tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def episode(env):
    """60 states under random actions, stacked."""

    @jax.jit
    def run(key):
        reset, act = jax.random.split(key)
        actions = jax.random.uniform(act, (60, env.action_size), minval=-1.0, maxval=1.0)

        def step(state, action):
            state = env.step(state, action)
            return state, state.pipeline_state

        return jax.lax.scan(step, env.reset(reset), actions)[1]

    with jax.numpy_dtype_promotion("standard"):  # as Brax expects
        return run(jax.random.key(0))


def robot(picture):
    """Where the robot is: its links are brown, all else is grey. (height, width) of bool."""
    return picture[..., 0] - picture[..., 2] > 0.08


@pytest.mark.browser
def test_robot_is_drawn_and_moves(env, episode, browser, tmp_path):
    caption = {"environment": "inverted_double_pendulum", "backend": "spring", NASTY: NASTY}
    path = replay.write(tmp_path / "replay.html", env.sys, episode, title=NASTY, caption=caption, dt=env.dt)
    for domain in ("Page", "Network", "Runtime", "Log"):
        browser.call(f"{domain}.enable")
    browser.call("Page.navigate", url=path.as_uri())
    browser.wait(lambda: browser.evaluate("globalThis.viewer?.renderer.info.render.frame > 2"))

    meshes = "let n = 0; viewer.scene.traverse((part) => { n += part.isMesh ? 1 : 0; }); n"
    assert browser.evaluate(meshes) == 1 + 4 * 3  # the floor; the rail, the cart and two poles of three meshes each
    assert browser.evaluate("viewer.animator.duration") == pytest.approx(59 * env.dt, rel=1e-3)
    assert browser.evaluate("viewer.animator.playing")  # nobody clicked
    assert browser.evaluate("document.title") == browser.evaluate("document.querySelector('h1').textContent") == NASTY
    assert browser.evaluate("document.documentElement.scrollHeight <= innerHeight")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")

    # The camera follows the robot, which moves the floor in the picture too. Hold it, so that only the robot moves.
    browser.evaluate("viewer.camera.follow = false; viewer.controls.enableDamping = false")
    bottom = int(browser.evaluate("document.querySelector('canvas').getBoundingClientRect().bottom"))
    first = browser.screenshot()[:bottom]
    assert first.std() > 0.02  # neither black nor blank
    assert 0.002 < robot(first).mean() < 0.3

    def moved():
        time.sleep(0.5)
        second = browser.screenshot()[:bottom]
        assert 0.002 < robot(second).mean() < 0.3
        return second if (robot(first) ^ robot(second)).sum() > 0.2 * robot(first).sum() else None

    changed = np.abs(browser.wait(moved, seconds=30) - first).max(-1) > 0.1
    assert changed.mean() < 0.3  # the robot and its shadow, not the picture
    assert browser.errors() == []
    assert [url for url in browser.requests() if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
