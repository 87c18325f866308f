"""A stream of edits for the long run: a session on the disk, its journal, rollback and revert."""

from stableedit_cpp.editors.guard import Drift, LocalityGuard
from stableedit_cpp.files.lock import SessionLocked
from stableedit_cpp.lifelong.audit import AuditEntry, AuditReport, audit
from stableedit_cpp.lifelong.history import RequestEntry
from stableedit_cpp.lifelong.journal.journal import JournalDamaged
from stableedit_cpp.lifelong.journal.rebuild import OtherBits
from stableedit_cpp.lifelong.journal.snapshots import SnapshotDamaged
from stableedit_cpp.lifelong.journal.writer import SessionWriteError
from stableedit_cpp.lifelong.repair import RepairReport, repair
from stableedit_cpp.lifelong.revert import RevertedRequest, RevertReport
from stableedit_cpp.lifelong.session import LifelongSession
from stableedit_cpp.lifelong.verify import VerifyReport, verify
from stableedit_cpp.lifelong.view import LogEntry, SessionStatus, SessionView

__all__ = [
    "AuditEntry",
    "AuditReport",
    "Drift",
    "JournalDamaged",
    "LifelongSession",
    "LocalityGuard",
    "LogEntry",
    "OtherBits",
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
    "repair",
    "verify",
]
