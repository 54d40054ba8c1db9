"""Signatures by minisign, an existing tool: we call it where it is installed and make no cryptography of our own.

A certificate alone is a claim that anybody can make. Signed, it is the claim of whoever holds the key. The signature is
over the bytes of certificate.json, which binds the record and the bundle by digests.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from harness.errors import HarnessError, Undecided

TOOL, SUFFIX, PATIENCE_S = "minisign", ".minisig", 300


def sign(path: Path, key: Path, comment: str) -> Path:
    """Sign a file with a secret key; minisign itself asks for the key's password. Returns the signature's path.

    `comment` is signed as well. Raises Undecided without the tool, HarnessError where it refuses.
    """
    if not key.is_file():
        raise HarnessError("no such secret key", where=key, fix=f"make one: {TOOL} -G -p KEY.pub -s KEY")
    done = _run("-S", "-s", str(key), "-m", str(path), "-t", comment)
    if done.returncode:
        raise HarnessError(f"{TOOL} did not sign it ({_said(done)})", where=path)
    return path.with_name(path.name + SUFFIX)


def unsigned(path: Path, public: str) -> str | None:
    """Why a file is not signed by a public key (a file, or the key's own text); None where it is.

    Raises Undecided where minisign is not installed: a signature that cannot be checked is not a good one.
    """
    signature = path.with_name(path.name + SUFFIX)
    if not signature.is_file():
        return f"{signature.name} is missing, so nobody has signed {path.name}"
    given = ("-p", public) if Path(public).is_file() else ("-P", public)
    done = _run("-V", "-q", *given, "-m", str(path), "-x", str(signature))
    return f"{path.name} is not signed by that key ({_said(done)})" if done.returncode else None


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(TOOL) is None:
        raise Undecided(f"{TOOL} is not installed, so no signature can be made or checked",
                        fix=f"apt install {TOOL}, brew install {TOOL}, or check the signature where it is")
    try:
        return subprocess.run([TOOL, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise Undecided(f"{TOOL} did not answer within {PATIENCE_S} s") from error


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"exit code {done.returncode}"
