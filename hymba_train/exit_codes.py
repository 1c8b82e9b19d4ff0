"""Exit codes of ``hymba train``, for launchers and people (docs/troubleshooting.md). 0: finished.

Codes of a rank; torchrun shows them in its table of failures and itself ends with 1.
"""

from __future__ import annotations

USER_ERROR = 2  # something that the user can mend, said in one line each
STOPPED_EARLY = 75  # EX_TEMPFAIL: saved, start again to go on
GUARD_STOP = 76  # a guard ended the run, or none did and nothing was trained any more; unchanged it would end again
HUNG = 77  # the watchdog ended the ranks; start again (a rank that cannot even end itself is killed: -9)
DRIFTED = 78  # replicas of parameters differ; no checkpoint was written; start again to go on from the newest one
INTERRUPTED = 130  # of any verb: Ctrl-C
