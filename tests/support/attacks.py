"""The tries of an attack: few of them, or all."""

import datetime
import random
from dataclasses import dataclass


def today() -> int:
    """Return the seed of a day, so that each day tries other lines and files than the last."""
    return int(datetime.date.today().strftime("%Y%m%d"))


@dataclass(frozen=True)
class Attack:
    """Chooses tries by ``--attack-seed`` and ``--attack-share``."""

    seed: int
    share: str

    def tries(self, whole: int) -> list[int]:
        """Return numbers below ``whole``, spread evenly over it; at a share of 100%, all of them.

        ``whole`` is the number of lines, bits or sizes that there are. For random files or
        programs, of which there is no end, it is how many ``make test-attacks`` tries.
        """
        if self.share.endswith("%"):
            count = round(whole * float(self.share[:-1]) / 100)
        else:
            count = int(self.share)
        count = max(1, min(count, whole))
        chosen = random.Random(self.seed)
        bounds = [whole * part // count for part in range(count + 1)]
        return [chosen.randrange(*bounds[part : part + 2]) for part in range(count)]

    def random(self, number: int) -> random.Random:
        """Return the random numbers of one try: the same whatever else is tried."""
        return random.Random(f"{self.seed} {number}")
