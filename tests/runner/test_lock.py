import json
import os
import socket
import subprocess
import sys

import pytest

from grass_lib.errors import GrassError
from grass_lib.runner.lock import LOCK_FILE, _alive, run_lock


def test_second_holder_is_refused_with_the_owner(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(GrassError, match=rf"process {os.getpid()} on .* since 20"),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):
        pass


def test_stale_lock_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "since": "then"}))
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_damaged_lock_file_is_no_obstacle(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    with run_lock(tmp_path):
        pass


def test_lock_outlives_an_owner_whose_child_still_holds_it(tmp_path):
    code = f"""
import subprocess, sys
from pathlib import Path
from grass_lib.runner.lock import run_lock
with run_lock(Path({str(tmp_path)!r})) as file:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=(file,))
    print(child.pid, flush=True)
    import os; os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL)
    with pytest.raises(GrassError, match="being executed"), run_lock(tmp_path, patience=0.2):
        pass
    with run_lock(tmp_path, patience=20):
        pass


def test_owner_that_ended_but_was_not_waited_for_is_not_alive(tmp_path):
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    owner = {"pid": zombie.pid, "host": socket.gethostname()}
    assert not _alive(owner)
    assert _alive({**owner, "pid": os.getpid()})
    assert _alive({**owner, "host": "elsewhere"}), "who knows"
    zombie.wait()
