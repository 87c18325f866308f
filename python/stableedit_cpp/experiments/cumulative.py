"""The positive cumulative effect: does a model with prior edits take new ones better?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import Editor
from stableedit_cpp.experiments.scorer import summary

__all__ = ["CumulativeProbe"]


class CumulativeProbe:
    """Edits the same requests at several moments of a stream, scores them, and takes everything back.

    Args:
        requests: edited and scored; none of them is in the stream.
        warm_up: the stream's.
        score: gives one record a request.
    """

    def __init__(
        self,
        requests: Sequence[EditRequest],
        warm_up: Sequence[EditRequest],
        score: Callable[[Sequence[EditRequest]], list[dict]],
    ) -> None:
        self._requests = requests
        self._warm_up = warm_up
        self._score = score

    def measure(self, editor: Editor, *, fresh: bool) -> dict[str, object]:
        """Scores of the requests before and after they are edited, on the model as it is; it is the same afterwards.

        Args:
            fresh: the model is unedited; the warm-up alone is then looked at as well.
        """
        found = {"before": summary(self._score(self._requests)), "after": self._branch(editor, [])}
        if fresh and self._warm_up:
            found["after_warm_up"] = self._branch(editor, self._warm_up)
        return found

    def _branch(self, editor: Editor, warm_up: Sequence[EditRequest]) -> dict:
        here, observer = editor.checkpoint(), editor.on_turn
        editor.on_turn = None
        try:
            if warm_up:
                editor.warm_up(warm_up, progress=False)
            editor.edit(self._requests, outcomes=False, progress=False)
            return summary(self._score(self._requests))
        finally:
            here.restore()
            editor.on_turn = observer
