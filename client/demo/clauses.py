"""Contract clauses for the demo, written by this file rather than collected from anywhere.

A clause is a main sentence of its class, perhaps behind an opening, and up to three follow-up
sentences. Square brackets hold alternatives, braces a word drawn once per clause. Openings and
follow-ups deliberately touch on the subjects of other classes, so one keyword is not enough.
"""

import random
import re
from itertools import cycle
from typing import NamedTuple

__all__ = ["Clause", "split_clauses", "write_clauses"]

_PER_CLASS = 40
_MAX_OVERLAP = 0.6  # of all the words of two clauses, the part that may occur in both

# Each pair names the side that delivers and is paid, {A}, and the side that pays, {B}.
_PARTIES = "Supplier/Customer Contractor/Client Licensor/Licensee Seller/Buyer".split()
_WORDS = {
    "period": ["ten days", "14 days", "30 days", "45 days", "60 days", "90 days", "three months"],
    "place": ["England and Wales", "Ireland", "the State of New York", "Ontario", "Singapore"],
    "money": ["EUR 50,000", "EUR 250,000", "GBP 100,000", "USD 75,000", "USD 1,000,000"],
    "schedule": ["Schedule 1", "Schedule 2", "Annex A", "the Order Form"],
    "n": [str(number) for number in range(3, 25)],
}

# An opening is not used for the class that it mentions.
_OPENINGS = {
    "Confidentiality": "despite any duty of confidence under clause {n},",
    "Termination": "[whether or not|even after] this Agreement has been terminated,",
    "Governing Law": "without prejudice to the choice of law in clause {n},",
    "Limitation of Liability": "subject to the limits on liability in clause {n},",
    "Payment": "without affecting any duty to pay [the Fees|sums already invoiced],",
    "Assignment": "even if this Agreement has been assigned under clause {n},",
    "": "[except as set out in {schedule}|unless otherwise agreed|to the extent permitted by law],",
}
_SHARED = """This clause survives the [expiry|termination] of this Agreement. Any notice under this
    clause must be in writing and takes effect {period} after receipt. A failure to enforce this
    clause is not a waiver of it. If any part of this clause is unenforceable, the rest of it stays
    in force. Terms defined in {schedule} have the same meaning here."""

# The main sentences of each class, an empty line, and its follow-up sentences.
_CLASSES = {
    "Confidentiality": """Each party shall keep [confidential|secret|in strict confidence] all
    [business|technical] information it [receives from|learns about] the other. {P} shall not
    disclose [the terms of this Agreement|any pricing or know-how of {Q}] to a third party without
    prior written consent. Neither party may use the other's confidential information except to
    [perform|exercise rights under] this Agreement. Confidential information remains the property of
    {Q}, and {P} shall [protect it with reasonable care|store it securely]. {P} may disclose
    protected information only to [employees|advisers and auditors] who need to know it and are
    bound by equal duties. The duty of secrecy does not cover information that is [public through no
    fault of {P}|already lawfully known to {P}|required to be disclosed by a court]. Within {period}
    of a request, {P} shall [return|destroy] all documents containing trade secrets of {Q}. {P}
    shall tell {Q} promptly if confidential information is [leaked|disclosed].

    This duty of secrecy continues for [two|three|five] years after this Agreement ends. Damages
    alone may be no adequate remedy for a disclosure, so {Q} may seek an injunction. {P} is liable
    for any leak by its advisers. Price lists and payment terms are also confidential.""",
    "Termination": """Either party may terminate this Agreement [for convenience|at any time] by
    giving {period}' notice. {P} may terminate this Agreement with immediate effect if {Q} commits a
    material breach and [fails to cure it within {period}|the breach cannot be remedied]. This
    Agreement ends automatically if {Q} [becomes insolvent|enters into liquidation|ceases to carry
    on business]. {P} may [terminate|cancel] this Agreement if {Q} [breaks its duty of
    confidence|assigns it without consent]. If an undisputed invoice stays unpaid for {period}, {A}
    may terminate this Agreement. This Agreement starts on the Effective Date and [expires after two
    years|runs for successive terms of 12 months] unless terminated earlier. If an event beyond a
    party's control lasts more than {period}, the other may terminate this Agreement. When this
    Agreement [expires|is terminated], {P} shall [stop using|return] the materials of {Q}.

    On termination, {B} shall pay the Fees for work done so far. Work in progress shall be handed
    over within {period} of termination. No compensation is owed merely because this Agreement has
    ended. Clauses on liability and governing law survive termination.""",
    "Governing Law": """This Agreement is [governed by|construed under|governed by and interpreted
    in line with] the laws of {place}. The courts of {place} have [exclusive|non-exclusive]
    jurisdiction over any [claim|dispute] connected with this Agreement. Any dispute about [its
    validity|the duty to pay|a breach of confidence] shall be finally settled by arbitration seated
    in {place}. Each party irrevocably submits to the courts of {place} and waives any objection [to
    venue|based on an inconvenient forum]. Questions of [interpretation|performance|liability] are
    decided under the law of {place}, without its conflict of laws rules. {P} may bring proceedings
    against {Q} only in the [courts|tribunals] of {place}. Claims in tort are also [governed
    by|decided under] the laws of {place}.

    Either party may ask any competent court to protect its confidential information. A judgment of
    that court for unpaid Fees may be enforced in any country. The parties shall first try to settle
    the dispute by negotiation for {period}. The choice of law binds any successor.""",
    "Limitation of Liability": """Neither party is liable for [indirect|consequential|special] loss,
    such as lost [profits|data] or goodwill. {A}'s total liability under this Agreement is capped at
    [the Fees paid in the previous 12 months|{money}]. Nothing in this Agreement limits liability
    for [fraud|death or personal injury caused by negligence|wilful default]. {A} is not liable for
    damage caused by [delay|the acts of third parties|materials that {B} supplied]. The aggregate
    liability of {P} for all claims, in contract or in tort, shall not exceed {money}. All implied
    warranties are excluded, and {A} accepts no liability for [loss of business|interruption of
    service]. The cap on liability does not apply to [a breach of confidentiality|the duty to pay
    the Fees]. {Q} may recover damages only for [direct|foreseeable] losses that it has proved.

    This applies even if {P} was told that such loss was possible. The Fees reflect this allocation
    of risk between the parties. Damages already paid count towards the cap. Losses not notified
    within {period} may not be claimed.""",
    "Payment": """{B} shall pay each [undisputed|valid] invoice within {period} of [receipt|its
    date]. {A} shall invoice the Fees [monthly in arrears|in advance|on completion of each
    milestone]. Overdue invoices bear interest at [two|four|eight] per cent above the base rate
    until paid. All [prices|Fees] exclude value added tax, which {B} shall pay at the applicable
    rate. {B} shall reimburse [travel costs|reasonable expenses] within {period} of an invoice. {B}
    may not set off or withhold payment of any amount [due to {A}|because of a pending claim]. A
    deposit of {money} is payable on signature and [is non-refundable|counts towards the final
    invoice]. If {B} disputes an invoice, it shall give reasons within {period} and pay [the
    balance|the undisputed part].

    Payments shall be made to the bank account named in {schedule}. {A} may suspend the services
    until every overdue invoice is paid. Bank details are confidential information. Repeated late
    payment entitles {A} to terminate this Agreement.""",
    "Assignment": """Neither party may assign [this Agreement|its rights under this Agreement]
    without the prior written consent of the other. {P} may transfer its [rights|obligations] to an
    affiliate [by giving {period}' notice|without approval]. {A} may subcontract [any part of the
    services|its duties], but may not assign this Agreement as a whole. This Agreement binds the
    parties and their [permitted successors|lawful assigns]. Any attempt by {P} to [assign its
    duties|transfer this Agreement to a third party] against this clause is void. Consent to an
    assignment to [a purchaser of the business|a group company] shall not be unreasonably withheld.
    {A} may assign its claims for unpaid Fees to [a bank|a financing company]. A change of control
    of {P} [is treated as|does not amount to] an assignment. The assignee shall [accept every
    term|take over all debts and duties] of this Agreement in writing.

    {P} may disclose confidential information to a proposed assignee. The assignor stays liable for
    sums due before the transfer. An assignment without consent allows {Q} to terminate. The
    governing law does not change on assignment. After assignment, Fees are paid to the
    assignee.""",
}


class Clause(NamedTuple):
    """One contract clause and the name of its class."""

    text: str
    label: str


def write_clauses(seed: int = 0) -> list[Clause]:
    """Write 40 clauses of each of the six classes, shuffled; a seed always gives the same ones."""
    rng = random.Random(seed)
    clauses: list[Clause] = []
    for label, grammar in _CLASSES.items():
        mains, follow_ups = map(_sentences, grammar.split("\n\n"))
        accepted: list[set[str]] = []
        for main in cycle(mains):
            text = _compose(label, main, follow_ups, rng)
            new = _content_words(text)
            if all(len(new & old) <= _MAX_OVERLAP * len(new | old) for old in accepted):
                accepted.append(new)
                clauses.append(Clause(text, label))
            if len(accepted) == _PER_CLASS:
                break
    rng.shuffle(clauses)
    return clauses


def split_clauses(
    clauses: list[Clause], held_out: float = 0.25, seed: int = 0
) -> tuple[list[Clause], list[Clause]]:
    """Split into training and test clauses, shuffled; held_out is the part of each class tested."""
    rng = random.Random(seed)
    train: list[Clause] = []
    test: list[Clause] = []
    for label in sorted({clause.label for clause in clauses}):
        group = [clause for clause in clauses if clause.label == label]
        rng.shuffle(group)
        cut = round(held_out * len(group))
        test += group[:cut]
        train += group[cut:]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _compose(label: str, main: str, follow_ups: list[str], rng: random.Random) -> str:
    words = {name: rng.choice(options) for name, options in _WORDS.items()}
    payee, payer = (f"the {name}" for name in rng.choice(_PARTIES).split("/"))
    one, other = rng.sample([payee, payer], 2)
    words.update(A=payee, B=payer, P=one, Q=other)
    if rng.random() < 0.2:
        opening = rng.choice([text for mentioned, text in _OPENINGS.items() if mentioned != label])
        main = f"{opening} {main if main[0] == '{' else main[0].lower() + main[1:]}"
    own = rng.sample(follow_ups, rng.choice([0, 1, 1, 2]))
    shared = rng.sample(_sentences(_SHARED), rng.choice([0, 0, 1]))
    written = []
    for sentence in [main, *own, *shared]:
        chosen = re.sub(r"\[(.*?)\]", lambda match: rng.choice(match[1].split("|")), sentence)
        filled = chosen.format(**words)
        written.append(filled[0].upper() + filled[1:])
    return " ".join(written)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", " ".join(text.split()))


def _content_words(text: str) -> set[str]:
    """The words of a clause without numbers and party names, which alone make no new clause."""
    names = "|".join(_PARTIES).replace("/", "|")
    return set(re.findall(r"[a-z]+", re.sub(names, "", text).lower()))
