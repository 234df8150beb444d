"""A real Slurm of several nodes on this one machine, from Debian's slurm-wlm: controller, a slurmd a node, and its own munge.

    python -m tests.slurm.local_cluster 2       # prints `export SLURM_CONF=…`; Ctrl-C ends it

Everything lies in one temporary folder; no configuration of the system is read or changed. Every daemon runs under a keeper
(keeper.py), so that nothing outlives the process that started the cluster. Nodes pretend to have four GPUs each, which Slurm
counts and hands out; the processes find none.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_KEEPER = Path(__file__).with_name("keeper.py")
_CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=15
SlurmdTimeout=15
SchedulerParameters=sched_interval=5,bf_interval=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
"""

#: What a launcher, or a test in the same process that joined a process group, left in the environment.
_NOT_INHERITED = ("SLURM", "SBATCH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_")


class SlurmMissingError(RuntimeError):
    """Slurm is not installed and cannot be installed. The message states the reason."""


def install_slurm() -> None:
    """Install Debian's slurm-wlm unless it is there. Raises SlurmMissingError without apt, root or network."""
    needed = ("slurmctld", "slurmd", "munged", "sbatch")
    if all(shutil.which(name) for name in needed):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise SlurmMissingError("slurm-wlm is not installed, and this is no Debian with root to install it")
    quiet = {"DEBIAN_FRONTEND": "noninteractive", **os.environ}
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-yq", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True)
        if done.returncode:
            raise SlurmMissingError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")


class LocalCluster:
    """While entered, `environment` makes sbatch, srun, scancel and scontrol talk to this cluster."""

    def __init__(self, num_nodes: int = 2) -> None:
        install_slurm()
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "LocalCluster":
        self.folder = Path(tempfile.mkdtemp(prefix="opt-ds-slurm-"))  # a socket's path must be short
        self.folder.chmod(0o711)  # or munged calls its socket inaccessible
        (self.folder / "state").mkdir()
        self._write_configuration()
        # The cluster's processes begin with a clean slate: no rank of a run around us, no Slurm of another cluster.
        own = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
        self.environment = own | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._start_munge()
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in self.nodes:
                self.start_node(node)
            self.wait(lambda: len(self.idle_nodes()) == len(self.nodes), 60, "the nodes did not come up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in list(self._keepers):
            self._stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- nodes

    def start_node(self, node: str) -> None:
        """Boot a node, for the first time or after `kill_node`."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """Simulate a power failure of a node: its daemon and every process of its jobs die at once."""
        self._stop(node)

    def idle_nodes(self) -> list[str]:
        """Nodes that answer and have nothing to do."""
        return self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()

    # ---- jobs

    def run(self, *command: str | Path, cwd: Path | None = None, check: bool = True) -> str:
        """A Slurm command's stdout. Raises RuntimeError with its stderr if it fails."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`, such as JobState, Restarts, ExitCode, NodeList."""
        return dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", "-o", number).split())

    def wait(self, condition: Callable[[], object], seconds: float, otherwise: str) -> None:
        """Wait until the condition holds. Raise TimeoutError with `otherwise` and the ends of the daemons' logs."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = [f"{log.name}: {log.read_text(errors='replace')[-800:]}" for log in self.folder.glob("*.log")]
                raise TimeoutError("\n".join([otherwise, *logs]))
            time.sleep(0.3)

    # ---- daemons

    def _write_configuration(self) -> None:
        import getpass

        ports = iter(_free_ports(1 + len(self.nodes)))
        host = socket.gethostname().split(".")[0]
        lines = [_CONFIG.format(host=host, controller_port=next(ports), user=getpass.getuser(), folder=self.folder).strip()]
        for node in self.nodes:
            size = "CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN"
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={next(ports)} {size}")
        lines.append(f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        # Slurm identifies a job's GPUs by the numbers of their device files; no machine has these, so real GPUs stay unused.
        for number in range(96, 100):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[96-99]\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        socket_path = self.folder / "munge.socket"
        self._start("munged", ["munged", "--foreground", "--force", f"--socket={socket_path}", *files])
        self.wait(socket_path.exists, 20, "munged did not start")

    def _start(self, name: str, command: list[str]) -> None:
        program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        log = open(self.folder / f"{name}.out.log", "ab")  # noqa: SIM115 - the daemon's
        keeper = [sys.executable, str(_KEEPER), str(program), *command[1:]]
        self._keepers[name] = subprocess.Popen(keeper, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        log.close()

    def _stop(self, name: str) -> None:
        keeper = self._keepers.pop(name, None)
        if keeper is not None:
            keeper.send_signal(signal.SIGTERM)
            keeper.wait(timeout=30)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main() -> None:
    """Keep a cluster running for manual use."""
    with LocalCluster(int(sys.argv[1]) if len(sys.argv) > 1 else 2) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
