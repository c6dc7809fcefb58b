"""What the public lattice estimator says of the parameter sets.

    git clone https://github.com/malb/lattice-estimator && git -C lattice-estimator checkout 27a581b
    python -m benchmarks.security.lattice_estimator lattice-estimator

It is written for Sage, of which it uses numbers and functions only. Those are given here by mpmath, SciPy and
Python, which suffices for what is asked: uSVP and BDD, with gates and in the core-SVP model, and the dual
hybrid attack. Whether they suffice shows at ML-KEM-512, whose figures are in the estimator's documentation;
the exit code is 1 if those here differ.

The last column is no estimate of the estimator's. Where noise and secret take few values, each sample is an
equation without noise, of degree 2 eta + 1 (Arora, Ge 2011). With samples enough the system is linear; with
fewer, a Groebner basis is computed in the degree at which the Hilbert series of random equations turns
negative, at binomial(n + degree, degree)^2 operations (Albrecht, Cid, Faugere, Fitzpatrick, Perret 2014). One
secret gives 256 samples for each feature of an operand, and `MOST_SAMPLES` at most. A small eta rests on
that bound: with samples without end, eta = 2 would fall to linear algebra, at 2^89.
"""

import argparse
import functools
import math
import sys
import types
from pathlib import Path
from typing import Any

import mpmath
from scipy import optimize, special, stats

from blindtune.protocol.lattice.parameters import DEGREE, LATTICE_PARAMETER_SETS
from blindtune.protocol.products import MAX_CONTRACTION

MOST_SAMPLES = MAX_CONTRACTION * DEGREE
YARDSTICK = {
    "uSVP": 143.8,
    "BDD": 140.3,
    "core-SVP": 118.6,
}  # of ML-KEM-512, from the estimator's documentation
LARGEST = 1e300
ENOUGH = 1000.0  # bits


def _number(x: Any) -> Any:
    """A float where it fits, which is much faster."""
    real = mpmath.re(x)
    return float(real) if abs(real) < LARGEST else real


def _log(x: Any, base: Any = None) -> Any:
    if x == math.inf:
        return math.inf
    return _number(mpmath.log(x) / (1 if base is None else mpmath.log(base)))


def _rounded(function: Any) -> Any:
    return lambda x: x if x == math.inf else int(function(x))


class _Reals:
    """A field of real numbers."""

    def __call__(self, x: Any) -> Any:
        return mpmath.mpf(x)

    def pi(self) -> float:
        return math.pi


class _Distribution:
    def __init__(self, kind: str, parameters: Any) -> None:
        self._of = {
            "beta": lambda x: special.betainc(*map(float, parameters), min(max(x, 0.0), 1.0)),
            "chisquared": lambda x: stats.chi2.cdf(x, float(parameters)),
        }[kind]

    def cum_distribution_function(self, x: Any) -> float:
        return float(self._of(float(x)))


def _missing(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"Sage's {name} is not given here: run the estimator in Sage for this attack"
        )

    return refuse


def sage_names() -> types.ModuleType:
    """What stands for ``sage.all``."""
    names = types.ModuleType("sage.all")
    reals = _Reals()
    mpmath.mpf.n = lambda self, *_, **__: self
    mpmath.mpf.is_NaN = lambda self: bool(mpmath.isnan(self))
    vars(names).update(
        oo=math.inf,
        pi=math.pi,
        e=math.e,
        euler_gamma=float(mpmath.euler),
        RR=reals,
        RDF=reals,
        RealField=lambda precision=53: reals,
        ZZ=int,
        QQ=lambda x: x,
        log=_log,
        exp=mpmath.exp,
        sqrt=lambda x: x if x == math.inf else _number(mpmath.sqrt(x)),
        ceil=_rounded(mpmath.ceil),
        floor=_rounded(mpmath.floor),
        round=lambda x, digits=0: round(float(x), digits),
        binomial=lambda n, k: mpmath.binomial(n, k),
        gamma=mpmath.gamma,
        zeta=mpmath.zeta,
        erf=mpmath.erf,
        coth=mpmath.coth,
        tanh=mpmath.tanh,
        prod=math.prod,
        gcd=math.gcd,
        lcm=math.lcm,
        cached_function=functools.cache,
        find_root=lambda f, a, b, **_: optimize.brentq(lambda x: float(f(x)), float(a), float(b)),
        RealDistribution=_Distribution,
        parent=lambda x: None,
    )
    for name in ("PowerSeriesRing", "line", "is_prime"):
        setattr(names, name, _missing(name))
    return names


def load_estimator(folder: Path) -> types.ModuleType:
    """The estimator's package, in place of Sage's names of which it gets ours."""
    names, package = sage_names(), types.ModuleType("sage")
    package.all = names  # type: ignore[attr-defined]
    sys.modules |= {"sage": package, "sage.all": names}
    sys.path.insert(0, str(folder))
    import estimator  # not installed: only now can it be found

    return estimator


def algebraic(n: int, eta: int, samples: int) -> float:
    """log2 of the cost of a Groebner basis, or `ENOUGH` if it is more.

    Args:
        n: dimension of the secret, whose coefficients are of the same distribution as the noise, so that each
            gives one more equation.
        eta: of the noise.
        samples: equations of degree 2 eta + 1.
    """
    equation, equations = 2 * eta + 1, samples + n
    monomials, signed, upto = (
        [1],
        [1],
        1,
    )  # of each degree; coefficients of (1 - z^equation)^equations; in all
    while True:
        degree = len(monomials)
        monomials.append(monomials[-1] * (n + degree - 1) // degree)
        upto += monomials[-1]
        if degree % equation == 0:
            j = degree // equation
            signed.append(-signed[-1] * (equations - j + 1) // j)
        if 2 * math.log2(upto) >= ENOUGH:
            return ENOUGH
        if sum(x * monomials[degree - equation * j] for j, x in enumerate(signed)) < 0:
            return 2 * math.log2(upto)


def estimate(estimator: Any, n: int, q: int, eta: int) -> dict[str, float]:
    """log2 of the cost of each attack."""
    noise = estimator.ND.CenteredBinomial(eta)
    lwe = estimator.LWE.Parameters(n=n, q=q, Xs=noise, Xe=noise, m=math.inf)
    usvp = estimator.LWE.primal_usvp
    quantum = estimator.reduction.ADPS16(mode="quantum")
    costs = {
        "uSVP": usvp(lwe),
        "BDD": estimator.LWE.primal_bdd(lwe),
        "dual hybrid": estimator.LWE.dual_hybrid(lwe),
        "core-SVP": usvp(lwe, red_cost_model=estimator.RC.ADPS16),
        "quantum": usvp(lwe, red_cost_model=quantum),
    }
    return {name: float(_log(cost["rop"], 2)) for name, cost in costs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("estimator", type=Path, help="folder of malb/lattice-estimator")
    estimator = load_estimator(parser.parse_args().estimator)
    sets = [
        (x.name, x.dimension, x.residues.modulus, x.eta)
        for x in sorted(LATTICE_PARAMETER_SETS.values(), key=lambda x: (x.residues.name, x.rank))
    ]
    sets.append(("ML-KEM-512", 512, 3329, 3))
    found: dict[str, float] = {}
    print(
        f"log2 of the cost{'n':>13}{'eta':>5}{'uSVP':>8}{'BDD':>8}{'dual h.':>9}"
        f"{'core-SVP':>10}{'quantum':>9}{'algebraic':>11}"
    )
    for name, n, q, eta in sets:
        found = estimate(estimator, n, q, eta)
        cost = algebraic(n, eta, MOST_SAMPLES)
        print(
            f"{name:24}{n:5}{eta:5}{found['uSVP']:8.1f}{found['BDD']:8.1f}{found['dual hybrid']:9.1f}"
            f"{found['core-SVP']:10.1f}{found['quantum']:9.1f}"
            f"{'> ' if cost >= ENOUGH else '':>6}{min(cost, ENOUGH):4.0f}",
            flush=True,
        )
    wrong = [name for name, figure in YARDSTICK.items() if abs(found[name] - figure) > 0.15]
    print(
        f"ML-KEM-512 {'differs from' if wrong else 'agrees with'} the estimator's documentation{wrong or ''}"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
