"""Which attack must succeed on which mask, and that none may on ours."""

from blindtune.client.audit.lab import COLLUDING, PRIVATE, LabResult
from blindtune.client.audit.statistics import FAMILY_ERROR, Judged, judge

__all__ = ["MUST_SUCCEED", "judged_private", "rate"]

TOKENS = {
    "token by cosine",
    "token by sorted values",
    "token by Gram matrix",
    "token by regression",
    "token by difference",
    "token by span",
}
LABELS = {"label by negative entry", "label by direction"}
WORDS = {"uniformity of words", "correlation of words", "small differences"}
GAMES = {"game: all zeros", "game: one outlier", "game: a repeated batch"}
EVERYTHING = TOKENS | LABELS | WORDS | GAMES | {"features by separation"}

# As the literature says; each mask falls to one attack at least, and each attack has a mask that it breaks.
MUST_SUCCEED = {
    "none": EVERYTHING,
    COLLUDING: EVERYTHING,
    "permutation": WORDS
    | GAMES
    | {
        "token by sorted values",
        "token by Gram matrix",
        "token by regression",
        "features by separation",
        "label by direction",
    },
    "rotation": WORDS
    | GAMES
    | {"token by Gram matrix", "token by regression", "features by separation", "label by direction"},
    "noise": WORDS | GAMES | {"token by cosine", "token by regression"} | LABELS,
    "reused mask": {
        "token by difference",
        "correlation of words",
        "small differences",
        "game: a repeated batch",
    },
    "small basis": {"token by span", "game: all zeros"},
}


def rate(result: LabResult, mask: str, attack: str) -> float:
    """How often an attack on a mask was right."""
    (cell,) = [x for x in result.cells if x.mask == mask and x.judged.score.attack == attack]
    return cell.judged.score.rate


def judged_private(result: LabResult) -> dict[tuple[str, str], Judged]:
    """The scores of all attacks on our masks; half of the error is left for another run."""
    cells = [x for x in result.cells if x.mask in PRIVATE]
    judged = judge([x.judged.score for x in cells], FAMILY_ERROR / 2)
    return {(x.mask, x.judged.score.attack): y for x, y in zip(cells, judged, strict=True)}
