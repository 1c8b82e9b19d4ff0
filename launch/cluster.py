"""A cluster, typed: what `hymba launch slurm` has to know about the machines. One YAML file each in recipes/cluster/.

The string under a field is its documentation; recipes/cluster/template.yaml shows every key with its default. Nothing
here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hymba_train.config import TO_BE_GIVEN


@dataclass
class ContainerConfig:
    image: str | None = None
    """Image for pyxis/enroot: a .sqsh file, or registry#name:tag. None: no container."""
    mounts: list[str] = field(default_factory=list)
    """SOURCE:TARGET[:FLAGS]. The working directory, the run directory and the data must be seen under their own paths,
    so mount them onto themselves: /lustre/me:/lustre/me."""


@dataclass
class VariableConfig:
    value: str = TO_BE_GIVEN
    """Value of the environment variable."""
    reason: str = TO_BE_GIVEN
    """Why it is set: a comment in the script."""


@dataclass
class HealthCheckConfig:
    enabled: bool = True
    """Check every node before each start of training; a bad one is left out and a spare takes its place."""
    timeout_seconds: int = 300
    """A node that has not answered by then is bad."""
    min_free_disk_gib: float = 20.0
    """Free space in the run directory."""
    min_free_memory_gib: float = 8.0
    """Free main memory."""
    max_clock_skew_seconds: int = 10
    """Largest difference between a node's clock and that of the batch script's node."""
    command: str | None = None
    """A command of the site, run on every node; a node on which it fails is bad. For instance `dcgmi diag -r 1`, or
    `python -m hymba_train doctor --quick`, which multiplies matrices on every GPU."""


@dataclass
class RestartConfig:
    signal_seconds_before_limit: int = 300
    """Training is told to save and end this long before the time limit: more than a step, an evaluation and a save."""
    max_requeues: int = 20
    """Times a job may put itself back into the queue. 0 where the site forbids it: use chain."""
    chain: int = 1
    """Jobs submitted at once, each starting when the one before ended unfinished. For partitions without requeueing."""
    max_restarts: int = 3
    """Times training is started again within one allocation after a rank or node failed; then the job is requeued."""
    no_progress_limit: int = 3
    """The job gives up after this many starts in a row from the same checkpoint."""
    kill_grace_seconds: int = 120
    """After the first node has ended, the others may go on for this long: longer than publishing a checkpoint takes."""


@dataclass
class ClusterConfig:
    time_limit: str = TO_BE_GIVEN
    """HH:MM:SS, or D-HH:MM:SS; quote it in YAML."""
    gpus_per_node: int = TO_BE_GIVEN
    """GPUs to ask for on every node; 0: a run on CPUs."""
    gpu_type: str | None = None
    """Type in the GPU request (--gres=gpu:TYPE:8), where the site wants one."""
    processes_per_node: int | None = None
    """Ranks on every node. None: one a GPU."""
    nodes: int | None = None
    """Nodes that train; --nodes overrides. None: as many as parallel.world_size needs."""
    spare_nodes: int = 0
    """Nodes asked for beyond these, to take the place of bad ones. A requeued job asks for as many nodes less as it has
    excluded."""
    cpus_per_process: int | None = None
    """Processor cores to ask for per rank. None: the site's default."""
    memory_per_node: str | None = None
    """As sbatch's --mem: "500G", or "0" for all of the node. None: the site's default."""
    partition: str | None = None
    """Partition, or several with commas."""
    account: str | None = None
    """Account the time is charged to."""
    qos: str | None = None
    """Quality of service."""
    exclusive: bool = True
    """Share the nodes with nobody."""
    extra_sbatch: list[str] = field(default_factory=list)
    """Further #SBATCH options, one an entry: "--constraint=h100", "--exclude=node17"."""
    extra_srun: list[str] = field(default_factory=list)
    """Further options of the srun that starts training: "--network=..."."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Run inside a container (pyxis)."""
    venv: str | None = None
    """Virtual environment to activate, on a path that all nodes see. Not together with a container."""
    python: str | None = None
    """Interpreter. None: `python` of the container or venv; with neither, the one that runs `hymba launch`."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before anything else: "module load cuda"."""
    environment: dict[str, VariableConfig] = field(default_factory=dict)
    """Environment variables, each with its reason. Secrets do not belong here: set them where you run hymba launch."""
    head_address: str | None = None
    """Shell command that prints the address of node "$1" for the rendezvous. None: NodeAddr of scontrol, or the node's
    own `hostname --ip-address`."""
    sweep_parallel: int | None = None
    """Points of a sweep that may run at the same time. None: as the scheduler likes."""
    health_check: HealthCheckConfig = field(default_factory=HealthCheckConfig)
    """Check of the nodes before training."""
    restart: RestartConfig = field(default_factory=RestartConfig)
    """What happens at the time limit and after failures."""

    @property
    def ranks_per_node(self) -> int:
        """Processes a node, resolved."""
        return self.gpus_per_node if self.processes_per_node is None else self.processes_per_node


@dataclass
class ClusterFile:
    """The root that gives every key its prefix ``cluster.`` in messages."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
