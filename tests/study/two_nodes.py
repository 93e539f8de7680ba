"""A SLURM cluster of two nodes on this machine, for test_slurm.py: munged, slurmctld and two slurmd.

Each node is a PID namespace with a hostname of its own, so that everything in it can end at once. A node has two cores,
a pretended GPU, and this machine's files. All of it ends with the PID namespace of make test-slurm.
"""

import contextlib
import getpass
import os
import socket
import subprocess
from pathlib import Path

from conftest import wait_for

ADDRESS = "192.0.2.1"  # given to the loopback device by make test-slurm: SLURM resolves no 127.0.0.1 where it is alone
NODES = ("n1", "n2")
CONFIG = """\
ClusterName=two_nodes
SlurmctldHost={host}({address})
SlurmctldPort=16817
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=5
KillWait=10
MessageTimeout=4
NodeName=n1 NodeAddr={address} Port=16818 CPUs=2 RealMemory=4000 Gres=gpu:1
NodeName=n2 NodeAddr={address} Port=16819 CPUs=2 RealMemory=4000 Gres=gpu:1
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=10 MaxTime=60 DefaultTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=off MaxTime=60
"""


class TwoNodes:
    """The running cluster; its configuration, state and logs lie in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("state", *NODES):
            (folder / name).mkdir()
        config = CONFIG.format(folder=folder, address=ADDRESS, host=socket.gethostname(), user=getpass.getuser())
        (folder / "slurm.conf").write_text(config)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # unused; v2 would need systemd
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        # --force: in a user's namespace the folders above belong to nobody
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={folder / name}" for option, name in names.items()]
        self._daemons = {"munged": self._start("munged", "munged", "--foreground", "--force", *files)}
        wait_for((folder / "munge.socket").exists)
        self._daemons["slurmctld"] = self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self._power_on(node)
        wait_for(lambda: self.states() == {"n1": "idle", "n2": "idle"})

    def _start(self, name: str, *command: str) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _power_on(self, node: str) -> None:
        # the shell stays as the first process of the node and collects its orphans
        boot = f"hostname {node}; slurmd -D -N {node}; exit"
        private = ("--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._daemons[node] = self._start(node, "unshare", *private, "sh", "-c", boot)

    def call(self, *command: str) -> str:
        """Return the output of a SLURM command."""
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=self.folder).stdout

    def states(self) -> dict[str, str]:
        """Return the state of each node: idle, mixed, allocated, down, drained …, with * while it does not answer."""
        table = subprocess.run(["sinfo", "-hN", "-p", "main", "-o", "%N %T"], capture_output=True, text=True).stdout
        return dict(line.split() for line in table.splitlines())

    def queue(self, columns: str = "%i") -> list[str]:
        """Return one line for each job in the queue and each element of an array, in squeue's format."""
        return self.call("squeue", "-hr", "-o", columns).splitlines()

    def submit(self, command: str, *options: str) -> str:
        """Submit a batch job; return its number."""
        return self.call("sbatch", "--parsable", "-o", "%j.out", *options, "--wrap", command).strip()

    def fill(self, cores: int) -> str:
        """Take cores until the job that is returned is cancelled."""
        return self.submit("sleep 1000", f"-n{cores}")

    def kill(self, node: str) -> None:
        """End everything on a node at once, as a loss of power does."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def restore(self, node: str) -> None:
        """Start a node that was killed, or end its draining; wait until it takes jobs."""
        if self._daemons[node].poll() is not None:
            self._power_on(node)
        if "drain" in self.states()[node]:
            self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        wait_for(lambda: self.states()[node] in ("idle", "mixed", "allocated"))

    def reset(self) -> None:
        """Empty the queue and restore both nodes."""
        self.call("scancel", "-u", getpass.getuser())
        for node in NODES:
            self.restore(node)
        wait_for(lambda: self.states() == {"n1": "idle", "n2": "idle"} and not self.queue())

    def logs(self) -> str:
        """Return the ends of the logs of all daemons."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


def processes(*texts: str) -> list[int]:
    """Return the processes on any node whose command line holds all of these texts, without their own forks."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            line = (entry / "cmdline").read_text().replace("\0", " ")
            if all(text in line for text in texts):
                parents[int(entry.name)] = parent_of(int(entry.name))
    return [process for process, parent in parents.items() if parent not in parents]


def environment_of(process: int) -> dict[str, str]:
    entries = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
