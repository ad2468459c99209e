"""A real Slurm of one machine: munged, slurmctld and slurmd, set up in a folder of its own and started by hand."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
START_SECONDS = 40.0
# No cgroups, no accounting, no systemd: it has to work in a container. Jobs that are queued again may start after
# cred_expire seconds (5 is the least), and what does not end on SIGTERM is killed after KillWait seconds.
CONF = """\
ClusterName=grasstest
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 MaxTime=60 State=UP
PartitionName=high Nodes={host} PriorityTier=10 MaxTime=60 PreemptMode=OFF State=UP
"""


def missing() -> list[str]:
    """Programs that are not installed here."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SlurmHere:
    """Started on entering, gone on leaving; ``environment`` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def __enter__(self) -> "SlurmHere":
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        ports = {"controller_port": _free_port(), "node_port": _free_port()}
        text = CONF.format(folder=self.folder, host=host, user=getpass.getuser(), **ports)
        (self.folder / "slurm.conf").write_text(text)
        files = {"key": "munge.key", "pid": "munge.pid", "log": "munge.log", "seed": "munge.seed"}
        words = [f"--{name}-file={self.folder / file}" for name, file in files.items()]
        try:
            self._start("munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", *words)
            self._until(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            self._start("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", host)
            self._until(lambda: self.call("sinfo", "--noheader", "--format=%T", check=False).split()[:1] == ["idle"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *ignored: object) -> None:
        if len(self.processes) > 1:
            self.call("scancel", f"--user={os.getuid()}", check=False)
            deadline = time.monotonic() + 12
            while self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def call(self, *words: str, check: bool = True) -> str:
        """Output of a command of Slurm."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def _start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as log:
            process = subprocess.Popen(
                [name, *words], stdout=log, stderr=log, env={**os.environ, **self.environment}, start_new_session=True
            )
        self.processes.append(process)

    def _until(self, condition) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            dead = [process.args for process in self.processes if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.out"))
                raise RuntimeError(f"Slurm did not start ({'ended: ' + str(dead) if dead else 'too slow'}):\n{logs}")
            time.sleep(0.1)
