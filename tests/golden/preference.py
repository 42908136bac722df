"""Records what the losses of preferences are, and their slopes, in preference.json beside this file.

    python tests/golden/preference.py

Written from the papers' formulas alone, in decimal arithmetic of 300 digits, so that nothing here needs care for
overflow; slopes are central differences in the same arithmetic.

DPO   Rafailov et al. 2023, equation 7; label smoothing as in Mitchell 2023 (cDPO), equation 3
ORPO  Hong et al. 2024, equations 4 to 7: odds of the geometric mean of the tokens' probabilities
KTO   Ethayarajh et al. 2024, equation 8, with the KL term given
"""

import json
import pathlib
from decimal import Decimal, getcontext

getcontext().prec = 300
STEP = Decimal("1e-60")


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def dpo(policy, reference, beta, smoothing):
    chosen, rejected = (p - r for p, r in zip(policy, reference))
    h = beta * (chosen - rejected)
    return -(1 - smoothing) * sigmoid(h).ln() - smoothing * sigmoid(-h).ln()


def orpo(means, weight):
    odds = [m.exp() / (1 - m.exp()) for m in means]
    return -means[0] - weight * sigmoid((odds[0] / odds[1]).ln()).ln()


def kto(policy, reference, kl, good, beta, desirable, undesirable):
    ratio = policy[0] - reference
    if good:
        return desirable - desirable * sigmoid(beta * (ratio - kl))
    return undesirable - undesirable * sigmoid(beta * (kl - ratio))


def record(loss, at):
    """The value and the slope by each number."""
    slopes = []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i] += STEP
        down[i] -= STEP
        slopes.append((loss(up) - loss(down)) / (2 * STEP))
    return {"value": float(loss(at)), "slope": [float(s) for s in slopes]}


def numbers(*values):
    return [Decimal(repr(v)) for v in values]


def main():
    pairs = [(-12.5, -14.25), (-3.0, -3.0), (-80.0, -20.0), (-20.0, -80.0), (-400.5, -1.25), (-0.5, -900.0)]
    cases = []
    for chosen, rejected in pairs:
        for reference in [(-13.0, -13.5), (-3.0, -3.0), (-100.0, -90.0)]:
            for beta, smoothing in [(0.1, 0.0), (0.5, 0.1), (2.0, 0.45)]:
                at, ref = numbers(chosen, rejected), numbers(*reference)
                b, e = numbers(beta, smoothing)
                found = record(lambda p: dpo(p, ref, b, e), at)
                cases.append({"loss": "dpo", "policy": [chosen, rejected], "reference": list(reference), "beta": beta,
                              "label_smoothing": smoothing, **found})
    for means in [(-1.5, -2.5), (-2.0, -2.0), (-0.001, -4.0), (-4.0, -0.001), (-0.25, -0.5), (-12.0, -0.7), (-1e-06, -1e-05),
                  (-30.0, -40.0)]:
        for weight in (0.1, 1.0):
            (w,) = numbers(weight)
            cases.append({"loss": "orpo", "policy": list(means), "beta": weight, **record(lambda m: orpo(m, w), numbers(*means))})
    for policy, reference in [(-10.0, -12.0), (-12.0, -10.0), (-5.0, -5.0), (-300.0, -20.0), (-20.0, -300.0)]:
        for kl in (0.0, 0.75, 40.0):
            for good in (True, False):
                beta, desirable, undesirable = 0.2, 1.0, 1.33
                args = numbers(reference, kl), numbers(beta, desirable, undesirable)
                found = record(lambda p: kto(p, args[0][0], args[0][1], good, *args[1]), numbers(policy))
                cases.append({"loss": "kto", "policy": [policy], "reference": [reference], "kl": kl, "good": good, "beta": beta,
                              "desirable_weight": desirable, "undesirable_weight": undesirable, **found})
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
    print(len(cases), "cases")


if __name__ == "__main__":
    main()
