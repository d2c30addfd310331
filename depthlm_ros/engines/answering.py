"""Greedy answers to many questions that continue one prefix: what is fed, verified and decoded when.

    question + expected sentence ─┐ one pass, chunk by chunk
                                  ├─> verified against the model's own argmax ─> first digit
    digit, point ─> digit ─> digit + rest of the sentence, verified again ─> end

Each round feeds every unfinished answer its last token and what probably follows it (`speculation`),
keeps what the model would have said itself and takes its next token from the first place where it
differs. Nothing that isn't the model's own argmax is ever kept. Answers of equal need go together;
finished ones leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from depthlm_ros.engines.decoder import Decoder
from depthlm_ros.engines.keys import Continuations, Places, Prefix
from depthlm_ros.engines.planner import Planner, attempt
from depthlm_ros.engines.speculation import Sentence

# Scores that are there at the same time.
SCORED_BYTES = 256 << 20


@dataclass
class Row:
    """One answer while it is made.

    Attributes:
        suffix: the rest of its prompt.
        said: the answer's tokens so far; the last one hasn't been fed yet.
        chances: the probability that the model gave each of them.
        held: tokens whose keys are stored, the suffix included.
        done: whether it has ended.
    """

    suffix: Sequence[int]
    said: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    held: int = 0
    done: bool = False


@dataclass
class Work:
    """What was done for a frame's questions; published in the diagnostics and checked by tests.

    Attributes:
        fed: tokens that went through the layers after the prefix.
        proposed: tokens of them that were drafts.
        accepted: drafts that the model would have said itself.
        passes: calls of the decoder.
        kept_bytes: largest memory of the continuations' keys and values.
    """

    fed: int = 0
    proposed: int = 0
    accepted: int = 0
    passes: int = 0
    kept_bytes: int = 0


class Answering:
    """Answers questions with one decoder.

    Args:
        decoder: the language model.
        planner: how many go at once.
        stop_ids: tokens that end an answer.
        penalty: repetition penalty of the checkpoint's own generation settings; 1 for none.

    Attributes:
        work: what was done since it was last set anew.
    """

    def __init__(self, decoder: Decoder, planner: Planner, stop_ids: frozenset[int], penalty: float = 1.0) -> None:
        self.decoder = decoder
        self.planner = planner
        self._stop_ids = stop_ids
        self._penalty = penalty
        self._kept: Continuations | None = None
        self.work = Work()

    def answer(
        self,
        prefix: Prefix,
        suffixes: Sequence[Sequence[int]],
        max_new_tokens: int,
        sentence: Sentence | None = None,
        guesses: Sequence[Sequence[int]] | None = None,
        finished: Callable[[list[int], Group], None] | None = None,
    ) -> list[Row]:
        """Answers each suffix.

        Args:
            prefix: of one image for all, or with a row for each suffix.
            suffixes: the rest of each prompt, at least one token.
            max_new_tokens: longest answer.
            sentence: what the model was trained to say.
            guesses: number tokens that each answer probably holds, such as those of the frame before.
            finished: called with the numbers of each group's rows and the group, while its keys are still there.
        """
        rows = [Row(suffix) for suffix in suffixes]
        if max_new_tokens < 1:
            return rows
        # Rows of one length need no padding.
        order = sorted(range(len(rows)), key=lambda at: len(suffixes[at]))
        longest = max(map(len, suffixes)) + max_new_tokens
        start, size = 0, self.planner.group(longest)
        while start < len(order):
            numbers = order[start : start + size]
            group = attempt(
                lambda numbers=numbers: Group(
                    self, prefix, numbers, [rows[at] for at in numbers], max_new_tokens, sentence
                ),
                lambda numbers=numbers: self.planner.halve_group(longest, len(numbers)),
            )
            if group is None:
                size = self.planner.group(longest)
                continue
            group.run(None if guesses is None else [guesses[at] for at in numbers])
            if finished is not None:
                finished(numbers, group)
            start += len(numbers)
        return rows

    def room(self, rows: int, capacity: int) -> Continuations:
        """Room for keys and values; that of the group before where it is large enough, since fresh memory is slow."""
        kept = self._kept
        if kept is None or kept.rows < rows or kept.capacity < capacity:
            self._kept = None
            self._kept = kept = Continuations(self.decoder, rows, capacity)
        return kept

    def scored(self, hidden: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """(B, k, V) float32 scores of the token after each of (B, k, C) states.

        Args:
            hidden: normed last states.
            before: (B, k, m) ids that stand before that token, some of them several times, for the repetition
                penalty; None for none.
        """
        scores = self.decoder.lm_head(hidden).float()
        if before is None:
            return scores
        values = scores.gather(-1, before)
        return scores.scatter(-1, before, torch.where(values < 0, values * self._penalty, values / self._penalty))

    def parts(self, hidden: torch.Tensor) -> list[slice]:
        """Rows of (B, k, C) states that are scored together: scores of a large vocabulary are larger than all else."""
        size = max(1, SCORED_BYTES // (4 * hidden.shape[1] * len(self.decoder.lm_head.weight)))
        return [slice(at, at + size) for at in range(0, len(hidden), size)]

    @property
    def penalised(self) -> bool:
        """Whether the checkpoint has a repetition penalty."""
        return self._penalty != 1.0


class Group:
    """Rows whose keys are kept at the same time."""

    def __init__(
        self,
        answering: Answering,
        prefix: Prefix,
        numbers: Sequence[int],
        rows: list[Row],
        max_new_tokens: int,
        sentence: Sentence | None,
    ) -> None:
        self.rows = rows
        self.prefix = prefix
        self._answering = answering
        self._decoder = answering.decoder
        self._planner = answering.planner
        self._device = self._decoder.device
        if prefix.rows > 1 and list(numbers) != list(range(prefix.rows)):
            self.prefix = prefix.select(torch.tensor(numbers, device=self._device))
        self._max_new_tokens = max_new_tokens
        self._sentence = sentence
        longest = max(len(row.suffix) for row in rows)
        ahead = len(sentence.head) + 32 if sentence is not None else 8
        self.own = answering.room(len(rows), longest + min(ahead, max_new_tokens))
        self._prefix_ids = frozenset(prefix.token_ids)

    def run(self, guesses: Sequence[Sequence[int]] | None = None) -> None:
        """Answers all rows."""
        drafts = [self._draft(row, guesses[at] if guesses else ()) for at, row in enumerate(self.rows)]
        everyone = list(range(len(self.rows)))
        self._feed_all(everyone, [[*row.suffix, *draft] for row, draft in zip(self.rows, drafts, strict=True)], drafts)
        while waiting := [at for at in everyone if not self.rows[at].done]:
            drafts = {at: self._draft(self.rows[at]) for at in waiting}
            # The narrow go first, until all have come to where much can be verified at once.
            narrow = min(len(draft) for draft in drafts.values())
            chosen = [at for at in waiting if len(drafts[at]) <= narrow + 1]
            feeds = [[self.rows[at].said[-1], *drafts[at]] for at in chosen]
            self._feed_all(chosen, feeds, [drafts[at] for at in chosen])
        if self._sentence is not None:
            for row in self.rows:
                self._sentence.learn(row.said)
        work = self._answering.work
        work.kept_bytes = max(work.kept_bytes, self.own.bytes)

    def _draft(self, row: Row, guess: Sequence[int] = ()) -> list[int]:
        if self._sentence is None:
            return []
        draft = self._sentence.propose(row.said)
        if guess and not row.said:
            draft = draft + list(guess)
            draft += self._sentence.propose(draft)
        # The place after the last token that may be said isn't asked for.
        return draft[: max(0, self._max_new_tokens - len(row.said) - 1)]

    def _feed_all(self, chosen: list[int], feeds: list[list[int]], drafts: list[list[int]]) -> None:
        at, read = 0, 1 + max(map(len, drafts))
        while at < len(chosen):
            width = len(feeds[at])
            count = self._planner.rows(width, read)
            # The rows after the first may be longer.
            width = max(map(len, feeds[at : at + count]))
            count = min(count, self._planner.rows(width, read), len(chosen) - at)
            part = slice(at, at + count)
            done = attempt(
                lambda part=part: self._feed(chosen[part], feeds[part], drafts[part]) or True,
                lambda width=width, count=count: self._planner.halve(width, count),
            )
            at += count if done else 0

    def _feed(self, chosen: list[int], feeds: list[list[int]], drafts: list[list[int]]) -> None:
        """Feeds tokens to some rows and keeps of each draft what the model says itself."""
        device, rows = self._device, [self.rows[at] for at in chosen]
        width, read = max(map(len, feeds)), 1 + max(map(len, drafts))
        ids = torch.tensor([[*feed, *[0] * (width - len(feed))] for feed in feeds], device=device)
        ends = [[len(feed) - len(draft) - 1] for feed, draft in zip(feeds, drafts, strict=True)]
        keep = (torch.tensor(ends, device=device) + torch.arange(read, device=device)).clamp(max=width - 1)
        held = [row.held for row in rows]
        where = consecutive(chosen, device)
        hidden = self._decoder.extend(
            ids,
            self.prefix.select(where),
            self.own,
            where,
            Places.following(held, width, device) if held[0] else None,
            keep if read < width or min(map(len, feeds)) < width else None,
        )
        tokens, chances = self._read(hidden, self._before(rows, ids.gather(1, keep)))
        work = self._answering.work
        work.passes += 1
        work.fed += ids.numel()
        for row, feed, draft, token, chance in zip(rows, feeds, drafts, tokens, chances, strict=True):
            taken = next((i for i, (a, b) in enumerate(zip(draft, token, strict=False)) if a != b), len(draft))
            row.held += len(feed) - len(draft) + taken
            work.proposed += len(draft)
            work.accepted += taken
            for at in range(taken + 1):
                row.said.append(token[at])
                row.chances.append(chance[at])
                if token[at] in self._answering._stop_ids or len(row.said) == self._max_new_tokens:
                    row.done = True
                    break

    def _read(self, hidden: torch.Tensor, before: torch.Tensor | None) -> tuple[list[list[int]], list[list[float]]]:
        """Greedy tokens and their probabilities after each state, a part of the rows at a time."""
        tokens, chances = [], []
        for part in self._answering.parts(hidden):
            scores = self._answering.scored(hidden[part], None if before is None else before[part])
            best, token = scores.max(-1)
            tokens.append(token)
            chances.append((best - scores.logsumexp(-1)).exp_())
        return torch.cat(tokens).tolist(), torch.cat(chances).tolist()

    def ids_before(self, suffix: Sequence[int], said: Sequence[int]) -> list[int]:
        """What a repetition penalty looks at: ids of a prompt and of what was said, each once."""
        return sorted({*self._prefix_ids, *suffix, *said})

    def _before(self, rows: list[Row], fed: torch.Tensor) -> torch.Tensor | None:
        """(B, k, m) ids before each place that is read: prompt, answer so far, and (B, k) what was fed up to there."""
        if not self._answering.penalised:
            return None
        seen = filled([self.ids_before(row.suffix, row.said) for row in rows]).to(self._device)
        places = fed.shape[1]
        up_to = torch.ones(places, places, dtype=torch.bool, device=self._device).tril()
        fed = torch.where(up_to, fed[:, None], fed[:, :1, None])
        return torch.cat([seen[:, None].expand(-1, places, -1), fed], dim=-1)


def filled(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """(B, longest) ids; shorter ones are filled up with their own first one."""
    width = max(map(len, ids))
    return torch.tensor([[*some, *some[:1] * (width - len(some))] for some in ids])


def consecutive(rows: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Rows as a slice where they follow one another, which copies nothing."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
