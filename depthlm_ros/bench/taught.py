"""Random weights that answer like a trained model: the published sentence, with a number that hangs on the pixel.

A random model says the same word for ever, or noise. Neither ends where a trained model's answer ends, nor agrees with
the template that speculation drafts. Training one takes hours. But what the answers need is little: to know the last
two tokens, whether the sentence is in its first or second half, which question was asked, and some number made of the
pixel. A few attention heads of the first three layers are set by hand to write that into channels of their own in the
residual stream; every other weight stays random, and nothing else writes there. Then the language head is fitted in
closed form up to a convex problem (softmax regression on these channels), and the digits read the pixel's number.

    layer 0   what the last token and the one before were; whether "\\n\\n" was said; whether the question says <think>
    layer 1   at the answer's header: an average over the digits asked about, weighted by place (or over the image)
    layer 2   that average, turned to ten scores, for each place of the number by a head of its own

So both numbers of a sentence are equal, hundreds of points have different ones, and some have two digits before the
point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.prompts import answer_text, compact_question, coordinates_question, marker_question

SHARPNESS = 60.0  # attention score of a head that has found what it looks for
ROLE, CONSTANT = 6.0, 3.0  # of a token's own channels in the residual stream
WRITTEN = 4.0  # of what the set heads write
RIPPLE = 0.2  # share of a key that makes the weight of a digit hang on its place
KEPT = 10  # directions of the averages that the digits read
DIGIT_SPREAD = 3.0  # standard deviation of the digits' logits
MARGIN = 12.0  # least logit between the right word and any other
RIGHT = 6.0  # least logit of the right word, and not much more: bfloat16 can't tell 100 from 100.4
NO_NOUGHT = 4.0  # standard deviations that a nought in front is behind
LONG_NUMBERS = 1 / 3
PLACES = ("first", "second", "tenths", "hundredths")
IMAGE_FEATURES = 10
CALIBRATION = 160  # questions


@dataclass
class Channels:
    """Places in the residual stream that only the set heads write; the last ones of the stream."""

    width: int
    used: int = 0
    at: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, count: int) -> list[int]:
        """Takes `count` channels for a purpose."""
        self.at[name] = list(range(self.width - self.used - count, self.width - self.used))
        self.used += count
        return self.at[name]

    def all(self) -> list[int]:
        """Every channel that was taken."""
        return list(range(self.width - self.used, self.width))


@dataclass(frozen=True)
class Words:
    """What the answers are made of, by the tokenizer at hand.

    Attributes:
        digits: ids of "0" to "9".
        roles: for each token that matters its role, the same for all digits.
        before: roles that have to be remembered for a step or two, since what follows later hangs on them.
        count: number of roles.
    """

    digits: list[int]
    roles: dict[int, int]
    before: list[int]
    count: int


def teach(
    model: PreTrainedModel,
    processor: PromptProcessor,
    *,
    stop: int,
    landmark: int,
    sink: int,
    padding: int,
    seed: int = 0,
    marked: Sequence[np.ndarray] | None = None,
) -> None:
    """Sets weights of a random model in place, so that it answers the published questions.

    Args:
        model: with random weights, at least three layers and two query heads for each of at least two key heads.
        processor: its own.
        stop: end-of-sequence token.
        landmark: a token that every prompt has once, after the pixel.
        sink: a token that every prompt has once, before it.
        padding: a token that no text has.
        seed: of what is drawn.
        marked: images of one size with markers, so that answers to the marker question differ among them.
    """
    _Teacher(model, processor, stop, landmark, sink, padding, seed).teach(marked)


class _Teacher:
    def __init__(self, model, processor, stop, landmark, sink, padding, seed) -> None:
        self.model, self.processor = model, processor
        self.stop, self.landmark, self.sink, self.padding = stop, landmark, sink, padding
        self.language = model.model.language_model
        self.layers = self.language.layers
        self.device = model.lm_head.weight.device
        self.random = torch.Generator().manual_seed(seed)
        config = model.config.get_text_config()
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head = self.layers[0].self_attn.head_dim
        self._normalises = model.config.model_type == "qwen3_vl"
        self.rates = self.language.rotary_emb.inv_freq.float().cpu()
        tail = self._prompts([coordinates_question(1, 1)])[0][-1]
        self.words = _words(processor, stop, [tail, landmark, sink])
        self.tail = tail
        self._take_channels(config.hidden_size)

    @torch.no_grad()
    def teach(self, marked: Sequence[np.ndarray] | None) -> None:
        self._clear()
        self._embed()
        self._remember()
        self._gather()
        self._gate(marked)
        self._fit(marked)

    def _take_channels(self, width: int) -> None:
        c = self.channels = Channels(width)
        known = len(self.words.before)
        self.constant = c.add("constant", 1)[0]
        self.role = c.add("role", self.words.count)
        self.value = c.add("value", 10)
        self.last, self.earlier = c.add("last", known), c.add("earlier", known)
        self.half, self.asked = c.add("half", 1)[0], c.add("asked", 1)[0]
        self.image, self.is_image = c.add("image", IMAGE_FEATURES), c.add("is image", 1)[0]
        self.text_sums, self.image_sums = c.add("text sums", 20), c.add("image sums", IMAGE_FEATURES + 1)
        self.score, self.two = c.add("score", 10), c.add("two digits", 1)[0]
        if width < c.used + 64:
            raise ValueError(f"a hidden size of {width} has no room for {c.used} channels of the taught answers")

    def _clear(self) -> None:
        own = self.channels.all()
        for layer in self.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight[own] = 0
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[own] = 1
        self.language.norm.weight[own] = 1
        for number, module in enumerate(_image_outputs(self.model)):
            module.weight[own] = 0
            module.bias[own] = 0
            if number == 0:
                drawn = torch.randn(IMAGE_FEATURES, module.in_features, generator=self.random)
                module.weight[self.image] = (2 * drawn / math.sqrt(module.in_features)).to(module.weight)
                module.bias[self.is_image] = ROLE

    def _embed(self) -> None:
        table = self.language.embed_tokens.weight
        own = self.channels.all()
        table[:, own] = 0
        table[:, self.constant] = CONSTANT
        for token, role in self.words.roles.items():
            table[token, self.role[role]] = ROLE
        for value, token in enumerate(self.words.digits):
            table[token, self.value[value]] = ROLE

    # ------------------------------------------------------------ heads

    def _remember(self) -> None:
        """Layer 0: the last two tokens' roles, and whether two tokens have been said."""
        unit = self._unit(0)
        pairs = self._sharp_pairs()
        here = sum(self._pair(i) for i in pairs) / math.sqrt(len(pairs))
        back = [
            sum(self._pair(i, -steps * float(self.rates[i])) for i in pairs) / math.sqrt(len(pairs)) for steps in (1, 2)
        ]
        read = {self.role[role]: self._slot(j) for j, role in enumerate(self.words.before)}
        self._set_keys(0, 0, unit, {self.constant: here}, read)
        for query, at in ((0, self.last), (1, self.earlier)):
            self._set_query(0, 0, query, unit, {self.constant: back[query]})
            self._set_output(0, 0, query, {channel: self._slot(j) for j, channel in enumerate(at)})
        roles = self.words.roles
        break_id, think_id = self._token("\n\n"), self._token("<think>")
        said, asked = self.role[roles[break_id]], self.role[roles[think_id]]
        keys = {
            self.constant: self._slow(3),
            said: 6 * self._slow(0),
            asked: 6 * self._slow(1),
            self.role[roles[self.sink]]: 6 * self._slow(2),
        }
        self._set_keys(0, 1, unit, keys, {said: self._slot(0), asked: self._slot(1)})
        for query, (sought, at) in enumerate(((0, self.half), (1, self.asked))):
            self._set_query(0, 1, query, unit, {self.constant: _unit_vector(self._slow(sought) + 0.5 * self._slow(2))})
            self._set_output(0, 1, query, {at: self._slot(query)})

    def _gather(self) -> None:
        """Layer 1: averages over the digits before, weighted by place; over the image where there are none."""
        unit = self._unit(1)
        pairs = range(8)
        ripple = sum(self._pair(i) for i in pairs) / math.sqrt(8)
        digit = self.role[self.words.roles[self.words.digits[0]]]
        keys = {self.constant: self._slow(3) + RIPPLE * ripple, digit: 6 * (self._slow(0) + RIPPLE * ripple)}
        self._set_keys(1, 0, unit, keys, {at: self._slot(j) for j, at in enumerate(self.value)})
        for query in (0, 1):
            phases = (2 * math.pi * torch.rand(8, generator=self.random)).tolist()
            weighted = sum(self._pair(i, phase) for i, phase in zip(pairs, phases, strict=True)) / math.sqrt(8)
            self._set_query(1, 0, query, unit, {self.constant: _unit_vector(self._slow(0) + RIPPLE * weighted)})
            at = self.text_sums[10 * query : 10 * query + 10]
            self._set_output(1, 0, query, {channel: self._slot(j) for j, channel in enumerate(at)})
        keys = {self.constant: self._slow(3), digit: 6 * self._slow(0), self.is_image: 6 * self._slow(1)}
        features = [*self.image, self.is_image]
        self._set_keys(1, 1, unit, keys, {at: self._slot(j) for j, at in enumerate(features)})
        self._set_query(1, 1, 0, unit, {self.constant: _unit_vector(self._slow(0) + 0.5 * self._slow(1))})
        self._set_output(1, 1, 0, {channel: self._slot(j) for j, channel in enumerate(self.image_sums)})
        self._set_query(1, 1, 1, unit, {self.constant: self._slow(3)})

    def _gate(self, marked: Sequence[np.ndarray] | None) -> None:
        """Layer 2: ten scores for the digit to be said, of a head for each place of the number."""
        means, directions = self._text_directions()
        image_mean, image_directions = self._image_directions(marked)
        unit = self._unit(2)
        roles = self.words.roles
        keys = {
            self.constant: self._slow(3),
            self.role[roles[self.landmark]]: 6 * self._slow(0),
            self.role[roles[self.sink]]: 6 * self._slow(1),
        }
        slots = {at: self._slot(j) for j, at in enumerate([*self.text_sums, *self.image_sums])}
        remembered = {role: self.last[j] for j, role in enumerate(self.words.before)}
        space, point = roles[self._token(" ")], roles[self._token(".")]
        tail = roles[self.tail]
        places = {
            "first": [self.role[space], self.role[tail]],
            "second": [remembered[space], remembered[tail]],
            "tenths": [self.role[point]],
            "hundredths": [remembered[point]],
        }
        for number, place in enumerate(PLACES):
            group, query = divmod(number, 2)
            if query == 0:
                self._set_keys(2, group, unit, keys, slots)
            asks = {self.constant: self._slow(1)} | {at: 2 * self._slow(0) for at in places[place]}
            self._set_query(2, group, query, unit, asks)
            rows = torch.cat([self._turned(directions, 10), self._turned(directions, 1)])
            image_rows = torch.cat([self._turned(image_directions, 10), self._turned(image_directions, 1)])
            outputs = {}
            for j, at in enumerate([*self.score, self.two]):
                if at == self.two and place != "second":
                    continue
                # The means are taken off by what was averaged at all: digits, of which each has one value, or image.
                vector = torch.zeros(self.head)
                vector[:20] = rows[j]
                vector[:10] -= float(rows[j] @ means)
                vector[20 : 20 + IMAGE_FEATURES] = image_rows[j]
                vector[20 + IMAGE_FEATURES] = -float(image_rows[j] @ image_mean)
                if place == "first" and j == 0:  # numbers don't begin with a nought
                    vector[:10] -= NO_NOUGHT
                    vector[20 + IMAGE_FEATURES] -= NO_NOUGHT
                outputs[at] = vector / WRITTEN  # of unit size, lest they outweigh all else in the norms
            self._set_output(2, group, query, outputs)

    def _text_directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (20,) of the sums over questions, and (KEPT, 20) directions in which they differ with unit variance."""
        drawn = np.random.default_rng(1)
        published = [coordinates_question(*map(int, p)) for p in drawn.integers(0, 2000, (CALIBRATION, 2))]
        compact = [compact_question(*map(int, p)) for p in drawn.integers(0, 1000, (CALIBRATION, 2))]
        sums = [self._sums(questions, self.text_sums) for questions in (published, compact)]
        centred = torch.cat([s - s.mean(0) for s in sums])
        directions = _whitening(centred, KEPT)
        apart = directions @ (sums[0].mean(0) - sums[1].mean(0))
        apart = apart / apart.norm()
        # Between the two questions the scores mustn't jump: both are to use all numbers.
        keep = torch.eye(KEPT, dtype=apart.dtype) - torch.outer(apart, apart)
        return sums[0].mean(0).float(), (keep @ directions).float()

    def _image_directions(self, marked: Sequence[np.ndarray] | None) -> tuple[torch.Tensor, torch.Tensor]:
        if not marked:
            return torch.zeros(IMAGE_FEATURES), torch.zeros(1, IMAGE_FEATURES)
        read = torch.cat([self._sums([marker_question()], self.image_sums, image) for image in marked])
        share = read[:, -1:].mean(0)
        sums = read[:, :-1] / share
        directions = _whitening(sums - sums.mean(0), min(8, len(marked) // 4))
        return sums.mean(0).float(), directions.float()

    def _turned(self, directions: torch.Tensor, count: int) -> torch.Tensor:
        """`count` random mixtures, of unit variance each, of directions with unit variance."""
        mixed = torch.randn(count, len(directions), generator=self.random)
        return mixed @ directions / math.sqrt(len(directions))

    def _sums(self, questions: Sequence[str], at: list[int], image: np.ndarray | None = None) -> torch.Tensor:
        """(N, len(at)) float64, what layer 1 has gathered at the landmark, in units of what was written."""
        rows = self._prompts(questions, image)
        found = []

        def read(_, __, output):
            found.append((output[0] if isinstance(output, tuple) else output).double().cpu())

        hook = self.layers[1].register_forward_hook(read)
        try:
            with self._only_layers(2):
                for start in range(0, len(rows), 32):
                    self._states(rows[start : start + 32], image)
        finally:
            hook.remove()
        states = [row for batch in found for row in batch]
        places = [max(i for i, token in enumerate(ids) if token == self.landmark) for ids in rows]
        return torch.stack([state[place, at] for state, place in zip(states, places, strict=True)]) / WRITTEN

    # ------------------------------------------------------------ language head

    def _fit(self, marked: Sequence[np.ndarray] | None) -> None:
        """Softmax regression from the channels to the next word; the digits read the scores."""
        classes = [self._token("0")] + [t for t in self.words.roles if t not in self.words.digits] + [self.stop]
        states, chances = self._examples(classes, marked)
        sums = {*self.score, self.two, *self.text_sums, *self.image_sums}
        own = [at for at in self.channels.all() if at not in sums]
        weight = _softmax_regression(states[:, own], chances)
        head = self.model.lm_head.weight
        head.mul_(0.1)
        head[[*self.words.digits, *classes[1:]]] = 0
        rows = torch.zeros(len(classes), head.shape[1])
        rows[:, own] = weight.float()
        for token, row in zip(classes[1:], rows[1:], strict=True):
            head[token] = row.to(head)
        score = states[:, self.score]
        gain = DIGIT_SPREAD / float(score[score.abs().amax(1) > 1e-3].std())
        for value, token in enumerate(self.words.digits):
            row = rows[0].clone()
            row[self.score[value]] = gain
            # Where a second digit may stand before the point, this decides; it is silent elsewhere.
            row[self.two] = gain
            head[token] = row.to(head)
        self._balance(states, chances, rows[[0, classes.index(self._token("."))]], gain)

    def _balance(self, states: torch.Tensor, chances: torch.Tensor, rows: torch.Tensor, gain: float) -> None:
        """Shifts what decides on a second digit before the point, so that one number in three has it."""
        open_ = states[chances.amax(1) < 1]
        digit, point = (open_ @ rows.T).unbind(1)
        lead = digit - point + gain * (open_[:, self.score].amax(1) + open_[:, self.two])
        shift = -float(lead.quantile(1 - LONG_NUMBERS)) / gain * CONSTANT / float(open_[:, self.constant].mean())
        group, query = divmod(PLACES.index("second"), 2)
        start = (group * (self.heads // self.key_heads) + query) * self.head
        self.layers[2].self_attn.o_proj.weight[self.two, start : start + 10] += shift

    def _examples(
        self, classes: Sequence[int], marked: Sequence[np.ndarray] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (N, C) at which a word is to be said, and the chances (N, classes) of each; digits are one class."""
        drawn = np.random.default_rng(2)
        depths = np.concatenate([drawn.uniform(0.1, 9.9, 16), drawn.uniform(10, 99, 16)])
        drawn.shuffle(depths)
        pixels = drawn.integers(0, 1000, (len(depths), 2))
        published = [coordinates_question(*map(int, p)) for p in 2 * pixels]
        compact = [compact_question(*map(int, p)) for p in pixels]
        groups = [(published, answer_text, None), (compact, "{:.2f}".format, None)]
        groups += [([marker_question()] * 4, answer_text, image) for image in list(marked or [None])[:4]]
        tokenizer, digits = self.processor.tokenizer, self.words.digits
        number = {token: at for at, token in enumerate(classes)} | dict.fromkeys(digits, 0)
        opening = {self._token(" "), self.tail}
        point = number[self._token(".")]
        states, chances = [], []
        for questions, text, image in groups:
            said = [text(depth) for depth in depths[: len(questions)]]
            answers = [tokenizer(words, add_special_tokens=False)["input_ids"] for words in said]
            rows = [p + a for p, a in zip(self._prompts(questions, image), answers, strict=True)]
            for start in range(0, len(rows), 16):
                hidden = self._states(rows[start : start + 16], image).float().cpu()
                for state, row, answer in zip(hidden, rows[start:], answers[start:], strict=False):
                    for at in range(len(row) - len(answer) - 1, len(row)):
                        chance = torch.zeros(len(classes))
                        chance[number[row[at + 1] if at + 1 < len(row) else self.stop]] = 1
                        if row[at] in digits and row[at - 1] in opening:
                            chance[:] = 0
                            chance[[0, point]] = 0.5
                        states.append(state[at])
                        chances.append(chance)
        return torch.stack(states), torch.stack(chances)

    # ------------------------------------------------------------ running the model

    def _prompts(self, questions: Sequence[str], image: np.ndarray | None = None) -> list[list[int]]:
        return self.processor.prompts(questions, self._images(image).grid_hw)

    def _images(self, image: np.ndarray | None, count: int = 1):
        if image is None:  # the smallest one: what the text says doesn't hang on it
            grid = self.processor.grid
            side = -(-math.isqrt(grid.min_pixels) // grid.multiple) * grid.multiple
            image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        return self.processor.images([image] * count)

    def _states(self, rows: Sequence[list[int]], image: np.ndarray | None = None) -> torch.Tensor:
        """(N, L, C) last states; rows are padded on the right, which a causal model doesn't see."""
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.padding] * (length - len(row))] for row in rows], device=self.device)
        inputs = self._images(image, len(rows)).tensors
        tensors = {name: value.to(self.device) for name, value in inputs.items()}
        if self.model.config.model_type != "llava":
            tensors["mm_token_type_ids"] = (ids == self.processor.image_token_id).int()
        return self.model.model(input_ids=ids, use_cache=False, **tensors).last_hidden_state

    @contextmanager
    def _only_layers(self, count: int):
        self.language.layers = self.layers[:count]
        try:
            yield
        finally:
            self.language.layers = self.layers

    def _unit(self, layer: int) -> float:
        """What a constant of CONSTANT has become when a layer reads it: it divides by the root mean square."""
        found = []
        norm = self.layers[layer].input_layernorm
        hook = norm.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            with self._only_layers(layer + 1):
                self._states(self._prompts([coordinates_question(1, 1)]))
        finally:
            hook.remove()
        read = found[0][0, :, self.constant].float()
        return float(read[read > 0].mean())

    def _token(self, text: str) -> int:
        (token,) = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token

    # ------------------------------------------------------------ vectors of a head

    def _pair(self, index: int, angle: float = 0.0) -> torch.Tensor:
        """A unit vector in the plane that rotates with position at rate `index`; plane i is channels i, i + d / 2."""
        vector = torch.zeros(self.head)
        vector[index], vector[index + self.head // 2] = math.cos(angle), math.sin(angle)
        return vector

    def _slow(self, index: int) -> torch.Tensor:
        """A unit vector that hardly rotates within a prompt."""
        return self._pair(self.head // 2 - 1 - index)

    def _slot(self, index: int) -> torch.Tensor:
        return _one_hot(self.head, index)

    def _sharp_pairs(self) -> range:
        """The planes whose sum of cosines falls off fastest within a prompt, so that a head finds one distance."""
        steps = torch.arange(-1, 400).float()
        steps = steps[steps != 0]

        def peak(count: int) -> float:
            return float(torch.cos(steps[:, None] * self.rates[:count]).mean(1).max())

        return range(min(range(3, 13), key=peak))

    def _set_keys(self, layer: int, group: int, unit: float, keys: dict, values: dict) -> None:
        attention = self.layers[layer].self_attn
        rows = slice(group * self.head, (group + 1) * self.head)
        scale = math.sqrt(SHARPNESS * math.sqrt(self.head))
        # Where keys are normalised, a role outweighs the constant beside it; elsewhere all are of one length.
        self._write(attention.k_proj, rows, unit, keys, scale, normalise=not self._normalises)
        self._write(attention.v_proj, rows, unit, values, 1.0)
        self._set_norms(attention)

    def _set_query(self, layer: int, group: int, query: int, unit: float, asks: dict) -> None:
        attention = self.layers[layer].self_attn
        start = (group * (self.heads // self.key_heads) + query) * self.head
        scale = math.sqrt(SHARPNESS * math.sqrt(self.head))
        self._write(attention.q_proj, slice(start, start + self.head), unit, asks, scale)

    def _set_output(self, layer: int, group: int, query: int, outputs: dict) -> None:
        weight = self.layers[layer].self_attn.o_proj.weight
        start = (group * (self.heads // self.key_heads) + query) * self.head
        weight[:, start : start + self.head] = 0
        for channel, vector in outputs.items():
            weight[channel, start : start + self.head] = (WRITTEN * vector).to(weight)

    def _write(self, module, rows: slice, unit: float, vectors: dict, scale: float, normalise: bool = False) -> None:
        weight = torch.zeros(self.head, module.in_features)
        for channel, vector in vectors.items():
            size = self._size(channel) / CONSTANT * unit
            length = float(vector.norm()) if normalise else 1.0
            weight[:, channel] = scale * vector / (length * size)
        module.weight[rows] = weight.to(module.weight)
        if module.bias is not None:
            module.bias[rows] = 0

    def _size(self, channel: int) -> float:
        """What stands in a channel in the residual stream where it is on."""
        if channel == self.constant:
            return CONSTANT
        own = {*self.role, *self.value, self.is_image, *self.image}
        return ROLE if channel in own else WRITTEN

    def _set_norms(self, attention) -> None:
        """Qwen3 divides queries and keys by their own size; the weights of that norm set how sharp heads can be."""
        if self._normalises:
            for norm in (attention.q_norm, attention.k_norm):
                norm.weight.fill_(math.sqrt(SHARPNESS / math.sqrt(self.head)))


def _words(processor: PromptProcessor, stop: int, others: Sequence[int]) -> Words:
    tokenizer = processor.tokenizer
    digits = [tokenizer(str(d), add_special_tokens=False)["input_ids"][0] for d in range(10)]
    tail = others[0]
    texts = [answer_text(1.11), answer_text(11.11), "1.11", "11.11"]
    said = [[tail, *tokenizer(text, add_special_tokens=False)["input_ids"], stop] for text in texts]
    roles: dict[int, int] = dict.fromkeys(digits, 0)
    for token in [t for ids in said for t in ids if t != stop] + list(others):
        roles.setdefault(token, len(set(roles.values())))
    follow: dict[int, set[int]] = {}
    for ids in said:
        for token, after in zip(ids, ids[1:], strict=False):
            follow.setdefault(roles[token], set()).add(roles.get(after, -1))
    ambiguous = {role for role, after in follow.items() if len(after) > 1}
    before = set()
    for ids in said:
        named = [roles.get(token, -1) for token in ids]
        for at, role in enumerate(named):
            if role in ambiguous:
                before.update(named[max(0, at - 2) : at])
    return Words(digits, roles, sorted(before), len(set(roles.values())))


def _image_outputs(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """The layers that write image tokens into the language model's residual stream, the input's first."""
    kind = model.config.model_type
    if kind == "llava":
        return [model.model.multi_modal_projector.linear_2]
    visual = model.model.visual
    if kind == "qwen2_5_vl":
        return [visual.merger.mlp[2]]
    return [merger.linear_fc2 for merger in (visual.merger, *visual.deepstack_merger_list)]


def _whitening(centred: torch.Tensor, count: int) -> torch.Tensor:
    """(count, D) directions in which the rows differ most, scaled to unit variance."""
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    return (vectors[:, -count:] / values[-count:].clamp(min=1e-24).sqrt()).T


def _softmax_regression(states: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """(classes, features) weights under which each state says its word by about MARGIN, with a logit about RIGHT."""
    states, chances = states.double(), chances.double()
    behind = MARGIN * (chances == 0)
    weight = torch.zeros(chances.shape[1], states.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=600, history_size=30, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")  # fmt: skip
    others = torch.full((len(states), 1), RIGHT, dtype=torch.float64)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logits = states @ weight.T
        ahead = torch.log_softmax(torch.cat([logits + behind, others], 1), -1)[:, :-1]
        missed = -(chances * ahead).sum(-1).mean()
        off = ((chances * logits).sum(-1) - RIGHT).square().mean()
        value = missed + 0.02 * off + 1e-6 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    logits = states @ weight.detach().T
    right = torch.where(chances > 0, logits, torch.inf).amin(-1)
    wrong = torch.where(chances > 0, -torch.inf, logits).amax(-1)
    margin, least = float((right - wrong).min()), float(right.min())
    if margin < MARGIN / 4 or least < 1:
        raise ValueError(f"the taught answers can't be told apart (margin {margin:.3g}, least logit {least:.3g})")
    return weight.detach()


def _unit_vector(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def _one_hot(width: int, index: int, value: float = 1.0) -> torch.Tensor:
    vector = torch.zeros(width)
    vector[index] = value
    return vector
