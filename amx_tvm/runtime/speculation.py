"""Speculation without a draft model: what a text repeats is proposed, and verified in one step.

An answer often copies: from its prompt, from itself, from an earlier answer. Where the last tokens
occurred before, those that followed them are the draft of what comes next. The model computes the
draft's tokens as further rows of one step, which costs much less than a step each, and the sampler
takes token after token as always, for as long as what it takes is what was drafted. So the result
is that of plain decoding, greedy or drawn, with penalties, masks and log-probabilities.

Whether a draft is worth its rows follows from two measurements. *Acceptance*: every step's token is
compared with what would have been drafted, whether or not it was, by the length of the match.
*Cost*: seconds of a step over its rows. Drafts are as long as the tokens that they are expected to
give per second say, and none is made where plain steps are faster.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from amx_tvm.runtime.lookup import LONGEST, Lookup
from amx_tvm.runtime.request import Handle

ROWS = 15  # most rows of a step with drafts: `forward_some` takes no more
_PRIOR = (0.0, 0.1, 0.15, 0.3, 0.5, 0.8, 0.95)  # acceptance by the match's length in bits
_OWN, _ALL = 0.2, 0.02  # weight of the newest observation for its request, and for those to come
_GAIN = 1.1  # times of plain decoding's speed that a draft has to promise
_NEW = 0.2  # weight of the newest time of a step
_FRESH = 50  # steps in which a time loses half of its weight
_OWNERS, _REMEMBERED = 64, 1 << 15  # owners of past answers, and tokens of each: 12 bytes a token
_BEFORE = 16  # tokens of a prompt that are remembered with its answer
_NOTHING = -1  # between remembered answers: no token


@dataclass
class Draft:
    """What is proposed for one request, and how proposals for it fared.

    Attributes
    ----------
    own : Lookup
        The request's tokens, prompt and answer.
    rates : list of float
        Estimated acceptance by the match's length in bits.
    tokens : list of int
        The proposal.
    match : int
        Length of the match that it follows.
    start : int
        Length of the request's tokens when it was made.
    """

    own: Lookup
    rates: list[float]
    tokens: list[int] = field(default_factory=list)
    match: int = 0
    start: int = 0


class Cost:
    """Seconds of a step by its rows, from what steps took lately.

    Steps of few rows have kernels of their own, so the curve has a bend behind one row. Sizes that
    were not seen, or not for long, follow their neighbours along the usual curve.
    """

    def __init__(self) -> None:
        self._now = 0
        self._seen: dict[int, tuple[float, int]] = {}  # rows -> times the usual curve, when

    def observe(self, rows: int, seconds: float) -> None:
        """Take note of a step."""
        self._now += 1
        found, known = seconds / _usual(rows), self._seen.get(rows)
        if known is not None:  # the system may have been busy
            found = known[0] + _NEW * (min(found, 4 * known[0]) - known[0])
        elif self._seen:  # the first step of a size is slow
            found = min(found, self.seconds(rows) / _usual(rows))
        self._seen[rows] = found, self._now

    def seconds(self, rows: int) -> float:
        """Return what a step of so many rows takes; 1 along the usual curve if none was seen."""
        total = weights = 0.0
        for seen, (times, when) in self._seen.items():
            weight = 1.0 / ((1 + 4 * abs(rows - seen)) * (_FRESH + self._now - when))
            total, weights = total + weight * times, weights + weight
        return _usual(rows) * (total / weights if weights else 1.0)


def _usual(rows: int) -> float:
    return 1.0 if rows == 1 else 1.3 + 0.12 * (rows - 2)


class Speculation:
    """Drafts for the requests of one scheduler. Everything runs on the engine's thread.

    Attributes
    ----------
    drafted, accepted : int
        Tokens that steps verified, and those of them that were right.
    steps : int
        Steps that verified any.
    """

    def __init__(self) -> None:
        self.drafted = self.accepted = self.steps = 0
        self.cost = Cost()
        self._rates = list(_PRIOR)
        self._past: OrderedDict[str, list[Lookup]] = OrderedDict()

    def drafts(self, handles: list[Handle]) -> list[list[int]] | None:
        """Return a draft for each request, empty ones too; None where plain decoding is faster.

        Parameters
        ----------
        handles : list of Handle
            Requests that lack their last token only.
        """
        room = ROWS - len(handles)
        if room < 1:
            return None
        found = [self._propose(handle, room) for handle in handles]
        gains = []
        for index, draft in enumerate(found):
            likely = 1.0
            for place in range(len(draft.tokens)):
                likely *= draft.rates[_bits(draft.match + place)]
                if likely < 0.1:
                    break
                gains.append((likely, index))
        if not gains:
            return None
        gains.sort(key=lambda gain: -gain[0])
        tokens = float(len(handles))
        best = _GAIN * tokens / self.cost.seconds(len(handles))
        most = 0
        for count, (likely, _) in enumerate(gains[:room], 1):
            tokens += likely
            speed = tokens / self.cost.seconds(len(handles) + count)
            if speed > best:
                best, most = speed, count
        if not most:
            return None
        counts = Counter(index for _, index in gains[:most])
        return [draft.tokens[: counts[index]] for index, draft in enumerate(found)]

    def verified(self, drafted: int, accepted: int) -> None:
        """Count what a step verified."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted

    def remember(self, handle: Handle) -> None:
        """Keep an ended request's answer for drafts of the same owner's next ones."""
        answer = handle.tokens[max(0, len(handle.request.prompt) - _BEFORE) :]
        salt = handle.request.owner
        if len(answer) >= _REMEMBERED // 2 or not handle.result.token_ids:
            return
        kept = self._past.setdefault(salt, [])
        self._past.move_to_end(salt)
        if len(self._past) > _OWNERS:
            self._past.popitem(last=False)
        half = _REMEMBERED // 2  # older ones go by halves
        if not kept or len(kept[-1].tokens) + len(answer) >= half:
            kept.append(Lookup(array("i"), half))
            del kept[:-2]
        kept[-1].tokens.extend([*answer, _NOTHING])
        kept[-1].update()

    def forget(self) -> None:
        """Forget all answers."""
        self._past.clear()

    def _propose(self, handle: Handle, most: int) -> Draft:
        """Return a request's next draft, with what became of the one before taken into account."""
        tokens, draft = handle.tokens, handle.draft
        if draft is None:
            draft = handle.draft = Draft(Lookup(tokens), list(self._rates))
        else:
            self._compare(draft, tokens)
        draft.own.update()
        match, behind = draft.own.repeated()
        source = draft.own
        for past in self._past.get(handle.request.owner, ()):
            length, place = past.match(tokens)
            if length > match:
                match, behind, source = length, place, past
        count = min(most, handle.run.left - 1)
        found = source.following(behind, count) if match and count > 0 else []
        if source is not draft.own and _NOTHING in found:
            del found[found.index(_NOTHING) :]
        draft.tokens, draft.match, draft.start = found, match, len(tokens)
        return draft

    def _compare(self, draft: Draft, tokens: list[int]) -> None:
        """See how much of a proposal came true, verified or not."""
        for place, guess in enumerate(draft.tokens):
            if draft.start + place >= len(tokens):
                break
            bits, right = _bits(draft.match + place), tokens[draft.start + place] == guess
            for rates, weight in ((draft.rates, _OWN), (self._rates, _ALL)):
                rates[bits] += weight * (right - rates[bits])
            if not right:
                break


def _bits(length: int) -> int:
    return min(length, LONGEST).bit_length()
