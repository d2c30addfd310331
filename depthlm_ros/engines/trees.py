"""What a model could have said in place of a number: alternatives fed as a tree behind the question's own keys.

Nodes of one number share its question, its image and the digits before them. Each is fed once, sees the
question, its ancestors and itself, and leaves its keys where later nodes find them (tree attention;
Miao et al., "SpecInfer", arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from depthlm_ros.engines.answering import Answering, Group, consecutive, filled
from depthlm_ros.engines.keys import Places
from depthlm_ros.engines.planner import attempt


def number_starts(tokens: Sequence[int], digits: Sequence[int], point: int) -> list[int]:
    """Where the numbers of an answer begin; one that only repeats the number before it isn't another.

    Args:
        tokens: the answer.
        digits: ids of the digits.
        point: id of the decimal point, which also ends sentences.
    """
    starts, before, at = [], None, 0
    while at < len(tokens):
        end = at
        while end < len(tokens) and (tokens[end] in digits or tokens[end] == point):
            end += 1
        stop = end
        while stop > at and tokens[stop - 1] == point:
            stop -= 1
        number = tokens[at:stop]
        if number and number != before:
            starts.append(at)
            before = number
        at = end + 1
    return starts


class NumberTrees:
    """Alternatives to one number in each of some answers. What the answers' rows held from there on is overwritten.

    Args:
        answering: runs the decoder.
        group: the finished rows; their keys are still there.
        rows: numbers of the rows, one tree each.
        starts: where in each answer its number begins.
        ids: the tokens whose log-probabilities are wanted.
    """

    def __init__(
        self, answering: Answering, group: Group, rows: Sequence[int], starts: Sequence[int], ids: Sequence[int]
    ) -> None:
        self._ids = list(ids)
        self._answering = answering
        self._group = group
        self._rows = list(rows)
        self._held = [len(group.rows[row].suffix) + start for row, start in zip(rows, starts, strict=True)]
        self._before = [
            [*group.rows[row].suffix, *group.rows[row].said[:start]][-1]
            for row, start in zip(rows, starts, strict=True)
        ]
        self._slots: list[dict[tuple[int, ...], int]] = [{} for _ in self._rows]
        self._used = list(self._held)

    def start(self) -> torch.Tensor:
        """(N, len(ids)) float32 log-probabilities of the first token of each number."""
        return self._run(range(len(self._rows)), [()] * len(self._rows))

    def forward(self, trees: Sequence[int], paths: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """(n, len(ids)) float32 log-probabilities of what follows `paths[i]` in place of tree `trees[i]`'s number."""
        return self._run(trees, paths)

    def _run(self, trees: Sequence[int], paths: Sequence[tuple[int, ...]]) -> torch.Tensor:
        asked: dict[int, list[int]] = {}
        for at, tree in enumerate(trees):
            asked.setdefault(tree, []).append(at)
        order, planner = sorted(asked), self._answering.planner
        found: dict[int, torch.Tensor] = {}
        at = 0
        while at < len(order):
            widest = 2 * max(len(asked[tree]) for tree in order[at:])
            some = order[at : at + planner.rows(widest, widest)]
            done = attempt(
                lambda some=some: self._feed(some, asked, paths, found) or True,
                lambda widest=widest, some=some: planner.halve(widest, len(some)),
            )
            at += len(some) if done else 0
        return torch.stack([found[i] for i in range(len(paths))])

    def _feed(
        self,
        trees: Sequence[int],
        asked: dict[int, list[int]],
        paths: Sequence[tuple[int, ...]],
        found: dict[int, torch.Tensor],
    ) -> None:
        device = self._answering.decoder.device
        asked_paths = [[paths[i] for i in asked[tree]] for tree in trees]
        nodes = [self._nodes(*some) for some in zip(trees, asked_paths, strict=True)]
        width = max(map(len, nodes))
        span = max(self._used[tree] for tree in trees) + width
        ids = np.zeros((len(trees), width), np.int64)
        slots = np.zeros((len(trees), width), np.int64)
        turned = np.zeros((len(trees), width), np.int64)
        seen = np.zeros((len(trees), width, span), bool)
        read = np.zeros((len(trees), max(len(asked[tree]) for tree in trees)), np.int64)
        # Kept aside until the keys are there: memory may run out, and then the same is fed again in smaller passes.
        slots_of, used_of = [dict(self._slots[tree]) for tree in trees], [self._used[tree] for tree in trees]
        for i, (tree, new) in enumerate(zip(trees, nodes, strict=True)):
            held, known, place = self._held[tree], slots_of[i], {}
            for at, path in enumerate(new):
                slot = held - 1 if not path else used_of[i]
                used_of[i] += bool(path)
                known[path], place[path] = slot, at
                ids[i, at] = path[-1] if path else self._before[tree]
                slots[i, at], turned[i, at] = slot, held - 1 + len(path)
                seen[i, at, :held] = True
                seen[i, at, [known[path[:n]] for n in range(1, len(path) + 1)]] = True
            # What fills up the row goes where nothing is kept yet, and sees itself.
            slots[i, len(new) :] = used_of[i] + np.arange(width - len(new))
            seen[i, np.arange(len(new), width), slots[i, len(new) :]] = True
            read[i, : len(asked[tree])] = [place[paths[j]] for j in asked[tree]]
        where = consecutive([self._rows[tree] for tree in trees], device)
        places = Places(*(torch.from_numpy(x).to(device) for x in (slots, turned, seen)))
        hidden = self._answering.decoder.extend(
            torch.from_numpy(ids).to(device),
            self._group.prefix.select(where),
            self._group.own,
            where,
            places,
            torch.from_numpy(read).to(device),
        )
        log_probs = self._log_probs(hidden, self._ids_before(trees, asked_paths))
        self._answering.work.passes += 1
        self._answering.work.fed += sum(map(len, nodes))
        for tree, known, used, of_tree in zip(trees, slots_of, used_of, log_probs, strict=True):
            self._slots[tree], self._used[tree] = known, used
            found.update(zip(asked[tree], of_tree, strict=False))

    def _ids_before(self, trees: Sequence[int], paths: Sequence[Sequence[tuple[int, ...]]]) -> torch.Tensor | None:
        """(B, k, m) ids that a repetition penalty looks at after each of some paths of each tree."""
        if not self._answering.penalised:
            return None
        most, before = max(map(len, paths)), []
        for tree, of_tree in zip(trees, paths, strict=True):
            row = self._group.rows[self._rows[tree]]
            ids = self._group.ids_before(row.suffix, row.said[: self._held[tree] - len(row.suffix)])
            before += [[*ids, *path] for path in [*of_tree, *[()] * (most - len(of_tree))]]
        return filled(before).view(len(trees), most, -1).to(self._answering.decoder.device)

    def _log_probs(self, hidden: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """(B, k, len(ids)) on the host, of the token after each of (B, k, C) states; `before` as in `scored`."""
        wanted = torch.tensor(self._ids, device=hidden.device)
        parts = []
        for part in self._answering.parts(hidden):
            scores = self._answering.scored(hidden[part], None if before is None else before[part])
            parts.append(scores[..., wanted] - scores.logsumexp(-1, keepdim=True))
        return torch.cat(parts).cpu()

    def _nodes(self, tree: int, paths: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """What has to be fed: the paths, and those of their beginnings that haven't been; short ones first."""
        known = self._slots[tree]
        missing = {path[:n] for path in paths for n in range(1, len(path)) if path[:n] not in known}
        return sorted(missing.union(paths), key=len)
