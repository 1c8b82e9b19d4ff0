"""Who is guilty of a hang, from what every rank's monitor reports. Standard library only."""

from dataclasses import asdict, dataclass, fields

from hymba_train.guards.marks import ACTIVITIES


@dataclass(frozen=True)
class Report:
    """One rank, as its monitor sees it once somebody has called for an investigation."""

    rank: int
    host: str
    pid: int
    process_state: str  # of /proc: R, S, D run or wait; T, t stopped; X, Z dead; ? unknown
    step: int
    activity: int
    seconds: float  # since it last moved on
    seconds_without_beat: float  # since its own thread last got the interpreter
    collectives: int  # that it has begun, all groups
    frames: tuple[str, ...]  # of the main thread, innermost first; empty: no answer
    waiting: bool  # in communication, or for its device

    @classmethod
    def from_dict(cls, saved: dict) -> "Report":
        values = {f.name: saved[f.name] for f in fields(cls)}
        return cls(**{**values, "frames": tuple(values["frames"])})

    def to_dict(self) -> dict:
        return asdict(self)

    def place(self) -> str:
        return f"in step {self.step} ({ACTIVITIES[self.activity]}) for {self.seconds:.0f} s"

    def top(self) -> str:
        """The innermost frame, and the innermost one of this package."""
        if not self.frames:
            return "no stack"
        ours = next((frame for frame in self.frames if "/hymba_train/" in frame), self.frames[0])
        return self.frames[0] if ours == self.frames[0] else f"{self.frames[0]}, called from {ours}"


NO_BEAT_SECONDS = 3.0


def cannot_answer(report: Report) -> str | None:
    """Why a rank itself cannot speak; None if it can."""
    if report.process_state in ("T", "t"):
        return "its process is stopped (SIGSTOP or a debugger)"
    if report.process_state in ("Z", "X"):
        return "its process is dead"
    if report.process_state == "D" and not report.frames:
        return "its process is stuck in the kernel (file system or driver)"
    if report.seconds_without_beat > max(NO_BEAT_SECONDS, 0.5 * report.seconds):
        return "a call holds Python's interpreter lock (GIL)"
    return None


def find_guilty(reports: list[Report], world_size: int) -> dict[int, str]:
    """Rank -> what is wrong with it. Empty if every rank waits for the others or for its device.

    The first of these that is found: ranks nobody reports; ranks that cannot answer; ranks that do not wait, and of
    those the ones that are furthest behind.
    """
    known = {report.rank for report in reports}
    guilty = {rank: "silent: neither it nor its monitor answers" for rank in range(world_size) if rank not in known}
    for report in reports:
        why = cannot_answer(report)
        if why:
            guilty[report.rank] = f"{why}, {report.place()}: {report.top()}"
    if guilty:
        return guilty
    busy = [report for report in reports if not report.waiting]
    for position in (lambda r: (r.step, r.activity), lambda r: r.collectives):
        if busy:
            behind = min(map(position, busy))
            if behind < max(map(position, reports)):
                busy = [report for report in busy if position(report) == behind]
    return {report.rank: f"{report.place()}: {report.top()}" for report in busy}


def verdict(reports: list[Report], world_size: int) -> str:
    """What is printed and kept, in a few lines."""
    guilty = find_guilty(reports, world_size)
    hosts = {report.rank: f" on {report.host}, pid {report.pid}" for report in reports}
    lines = [f"guilty: rank {rank}{hosts.get(rank, '')}: {why}" for rank, why in sorted(guilty.items())]
    if not guilty:
        lines.append("guilty: nobody: every rank waits for another or for its device; suspect the network or a kernel")
    waiting = sorted(report.rank for report in reports if report.rank not in guilty)
    if waiting:
        lines.append(f"waiting for it: rank {', '.join(map(str, waiting))}")
    return "\n".join(lines)
