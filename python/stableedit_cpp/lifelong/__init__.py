"""A stream of edits for the long run: a session on the disk, its journal, rollback and revert."""

from stableedit_cpp.editors.guard import Drift, LocalityGuard
from stableedit_cpp.errors import DamagedJournal, DamagedSnapshot, OtherBits, SessionBusy, SessionWriteError
from stableedit_cpp.lifelong.audit import AuditEntry, AuditReport, audit
from stableedit_cpp.lifelong.history import RequestEntry
from stableedit_cpp.lifelong.plan import Plan, plan_stream
from stableedit_cpp.lifelong.repair import RepairReport, repair
from stableedit_cpp.lifelong.revert import RevertedRequest, RevertReport
from stableedit_cpp.lifelong.session import LifelongSession
from stableedit_cpp.lifelong.status import LogEntry, SessionStatus
from stableedit_cpp.lifelong.verify import VerifyReport, verify
from stableedit_cpp.lifelong.view import SessionView

# Their earlier names.
SessionLocked, JournalDamaged, SnapshotDamaged = SessionBusy, DamagedJournal, DamagedSnapshot

__all__ = [
    "AuditEntry",
    "AuditReport",
    "Drift",
    "JournalDamaged",
    "LifelongSession",
    "LocalityGuard",
    "LogEntry",
    "OtherBits",
    "Plan",
    "RepairReport",
    "RequestEntry",
    "RevertReport",
    "RevertedRequest",
    "SessionLocked",
    "SessionStatus",
    "SessionView",
    "SessionWriteError",
    "SnapshotDamaged",
    "VerifyReport",
    "audit",
    "plan_stream",
    "repair",
    "verify",
]
