"""An objective that one rank does not come back from."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from pretrain.objectives.clip import Clip
from pretrain.values import Pairs, Terms


class Sleepy(Clip):
    """CLIP; rank 1 sleeps in its third step."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Clip.Options):
        pass

    def forward(self, pairs: Pairs) -> Terms:
        self._steps = getattr(self, "_steps", 0) + 1
        if self._steps == 3 and os.environ.get("RANK") == "1":
            time.sleep(600)
        return super().forward(pairs)
