"""The environments of peers that are Python packages: one each, so that what they need is kept out of ours."""

import os
import subprocess
import sys
from pathlib import Path

from machine import CONSOLE, ROOT

PEERS = Path(__file__).with_name("peers")
ENVIRONMENTS = Path.home() / ".cache" / "innerloop" / "bench"


class PeerError(Exception):
    """A peer could not be measured; the message says why."""


def environment(peer: str) -> Path:
    """The interpreter of the peer's environment, installed from peers/<peer>.txt when that has changed.

    peers/<peer>.toml, where there is one, tells uv how. Raises PeerError.
    """
    folder, wanted = ENVIRONMENTS / peer, (PEERS / f"{peer}.txt").read_text()
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return folder / "bin" / "python"
    CONSOLE.print(f"Installing {peer} into {folder}.")
    how = PEERS / f"{peer}.toml"
    settings = {**os.environ, "UV_CONFIG_FILE": str(how)} if how.exists() else dict(os.environ)
    for arguments in (
        ["venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        ["pip", "install", "--quiet", "--python", str(folder), "-r", str(PEERS / f"{peer}.txt")],
    ):
        uv = str(ROOT / ".venv" / "bin" / "uv")
        done = subprocess.run([uv, *arguments], capture_output=True, text=True, check=False, env=settings)
        if done.returncode:
            raise PeerError(f"it cannot be installed: {done.stderr.strip()[-300:]}")
    stamp.write_text(wanted)
    return folder / "bin" / "python"
