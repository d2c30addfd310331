"""The language model of a checkpoint, run without what continuations of one prefix don't need.

The weights are those of the loaded transformers model (projections that read the same input are
laid side by side once, and the model's own parameters become views of them), so nothing is stored
twice. What differs from the model's own forward:

- a prefix is run once and its keys are kept once (`prefill`), continuations attend to it by cascade
  attention (`extend`);
- in the last layer only those tokens get an output that somebody reads: of a prefix none, of a
  continuation the ones that are verified;
- no masks, caches or position tables are made that causality gives for nothing.

Text after an image has equal temporal, height and width positions in M-RoPE, so that continuations
turn by one position each, in every architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from depthlm_ros.engines.cascade import Attention, matmul_attention, merge, plain_attention
from depthlm_ros.engines.keys import Continuations, Places, Prefix
from depthlm_ros.engines.linear import ACTIVATIONS, Linear, activated, packable
from depthlm_ros.errors import EngineError

# Packed weights are a copy: only of models that are small beside a machine's memory.
PACKED_BYTES = 256 << 20


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        norm: (C,) scale before the attention; None where it is part of what follows.
        qkv: query, key and value of one state, side by side.
        query: query alone, in the last layer, where few tokens ask.
        key_value: key and value alone, likewise.
        qk_norm: (H + K, D) scales of the query heads, then of the key heads; None where there are none.
        output: attention's output, added to the stream.
        mlp_norm: (C,) scale before the MLP; None where it is part of what follows.
        gate_up: both of the MLP's inputs side by side; None where they are packed one by one.
        gate: with its activation.
        up: multiplied with the gate.
        down: added to the stream.
        window: tokens that a sliding window lets a token see, itself included; None for all.
    """

    norm: torch.Tensor | None
    qkv: Linear
    query: Linear | None
    key_value: Linear | None
    qk_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor | None
    gate_up: Linear | None
    gate: Linear | None
    up: Linear | None
    down: Linear
    window: int | None


class Decoder:
    """The layers of Qwen3-VL's, Qwen2.5-VL's and Pixtral's (Mistral's) language models.

    Args:
        model: the loaded model; its projections become views of the stacked ones.
        architecture: "qwen3_vl", "qwen2_5_vl" or "llava".
        prefix_attention: for many queries to one shared prefix.
        own_attention: for the tokens of each continuation to themselves.

    Raises:
        EngineError: the model has something that isn't known here; nothing of it has been changed then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: str,
        prefix_attention: Attention = matmul_attention,
        own_attention: Attention = matmul_attention,
    ) -> None:
        text = model.model.language_model
        config = model.config.get_text_config()
        self.prefix_attention = prefix_attention
        self.own_attention = own_attention
        self.embed = model.get_input_embeddings()
        self.lm_head = model.lm_head
        self.heads = config.num_attention_heads
        self.groups = config.num_key_value_heads
        self.head_size = text.layers[0].self_attn.head_dim
        self.width = config.hidden_size
        self.mlp_width = config.intermediate_size
        self.activation = config.hidden_act
        if self.activation not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise EngineError(f"the language model's activation is {self.activation!r}; the lean decoder knows {known}")
        weight = text.layers[0].mlp.down_proj.weight
        self.dtype, self.device = weight.dtype, weight.device
        size = sum(x.numel() * x.element_size() for x in text.layers.parameters())
        self.packed = packable(weight) and size <= PACKED_BYTES
        last = len(text.layers) - 1
        self.layers = [self._layer(layer, architecture, config, n == last) for n, layer in enumerate(text.layers)]
        self._norm = text.norm.weight
        self._eps = config.rms_norm_eps
        self._rotary = text.rotary_emb
        self._text_only = architecture == "llava"
        self._sections = (getattr(config, "rope_parameters", None) or {}).get("mrope_section", [])

    def new_zeros(self, shape: Sequence[int]) -> torch.Tensor:
        """Zeros of the model's dtype on its device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def prefill(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        token_ids: Sequence[int],
        deepstack: Sequence[torch.Tensor] = (),
        image_places: torch.Tensor | None = None,
        next_position: int = 0,
        *,
        hidden: bool = False,
    ) -> tuple[Prefix, torch.Tensor | None]:
        """Runs what comes first: chat header, image tokens, the beginning of the questions.

        Args:
            embeds: (R, P, C) embeddings, image tokens in place.
            position_ids: (3, R, P) M-RoPE positions, or (R, P) where there is no M-RoPE.
            token_ids: the P ids.
            deepstack: (R, N, C) for each of the first layers, added at the image tokens after it.
            image_places: (N,) places of the image tokens.
            next_position: rotary position of what follows.
            hidden: also compute the last layer's output.

        Returns:
            The prefix; and (R, P, C) normed last states, None unless asked for.
        """
        rows, length, _ = embeds.shape
        cos, sin = self._turns(embeds, position_ids)
        x = embeds.reshape(rows * length, -1)
        keys, values = [], []
        for depth, layer in enumerate(self.layers):
            normed = self._normed(x, layer.norm)
            if depth + 1 == len(self.layers) and not hidden:
                _, key, value = self._project(layer, normed, None, rows, length, cos, sin)
                keys.append(key)
                values.append(value)
                break
            query, key, value = self._project(layer, normed, normed, rows, length, cos, sin)
            keys.append(key)
            values.append(value)
            if layer.window is not None and length > layer.window:
                seen = _within(torch.arange(length, device=x.device), length, layer.window)
                attended, _ = matmul_attention(query, key, value, seen[None], True)
            else:
                attended = plain_attention(query, key, value, True)
            x = self._finish(layer, x, attended.reshape(rows * length, -1))
            if depth < len(deepstack):
                x.view(rows, length, -1).index_add_(1, image_places, deepstack[depth].to(x.dtype))
        prefix = Prefix(tuple(keys), tuple(values), tuple(token_ids), next_position)
        return prefix, self._normed(x, self._norm).view(rows, length, -1) if hidden else None

    def extend(
        self,
        ids: torch.Tensor,
        prefix: Prefix,
        own: Continuations,
        rows: slice | torch.Tensor,
        places: Places | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs new tokens of some continuations and stores their keys.

        Args:
            ids: (B, T) tokens; what pads a row on the right is never seen by what stands left of it.
            prefix: shared, or with the B rows of these continuations.
            own: where keys are stored.
            rows: which rows of `own` these are; a slice where they follow one another.
            places: where the tokens go and what they see; None for the first ones of all rows.
            keep: (B, k) which of the T tokens are read; None reads all.

        Returns:
            (B, k, C) normed last states.
        """
        count, length = ids.shape
        steps = torch.arange(length, device=ids.device)
        turned = steps[None] if places is None else places.turned
        cos, sin = self._text_turns(prefix.next_position + turned)
        own.reserve(length if places is None else places.seen.shape[-1])
        x = self.embed(ids).reshape(count * length, -1)
        for number, layer in enumerate(self.layers):
            normed = self._normed(x, layer.norm)
            last = number + 1 == len(self.layers) and keep is not None
            if last:
                chosen = (torch.arange(count, device=ids.device)[:, None] * length + keep).flatten()
                x, turned = x[chosen], turned.expand(count, -1).gather(1, keep)
                kept_turns = self._text_turns(prefix.next_position + turned)
                query, key, value = self._project(layer, normed, normed[chosen], count, length, cos, sin, kept_turns)
            else:
                query, key, value = self._project(layer, normed, normed, count, length, cos, sin)
            if places is None:
                own.keys[number][rows, :length] = key
                own.values[number][rows, :length] = value
                seen = None
                if last or (layer.window is not None and layer.window < length):
                    seen = steps <= (keep[..., None] if last else steps[None, :, None])
            else:
                key, value = self._stored(own, number, rows, places, key, value)
                seen = places.seen.gather(1, keep[..., None].expand(-1, -1, len(key[0]))) if last else places.seen
            if layer.window is not None and layer.window < key.shape[1]:
                slots = torch.arange(key.shape[1], device=ids.device)
                seen = seen & (slots > turned[..., None] - layer.window)
            ours = self.own_attention(query, key, value, seen, seen is None)
            # Known without asking the device; more than it is among alternatives, whose slots lie beyond their places.
            furthest = length if places is None else places.seen.shape[-1]
            theirs = self._to_prefix(layer, query, prefix, number, turned, furthest)
            x = self._finish(layer, x, merge(ours, theirs).reshape(len(x), -1))
        return self._normed(x, self._norm).view(count, -1, x.shape[-1])

    def _layer(self, layer: nn.Module, architecture: str, config: object, last: bool) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, bias = _stack(attention.q_proj, attention.k_proj, attention.v_proj)
        split = self.heads * self.head_size
        new = architecture == "qwen3_vl"
        window = None
        if architecture == "qwen2_5_vl":
            window = attention.sliding_window
        elif architecture == "llava":
            window = config.sliding_window
        gate_up = gate = up = None
        norm, mlp_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        if self.packed:
            # What is copied anyway takes the norm's weights in; rounding apart, that is the same product.
            gate_weight, up_weight = mlp.gate_proj.weight, mlp.up_proj.weight
            if self.dtype == torch.float32:
                qkv, norm = qkv * norm, None
                gate_weight, up_weight, mlp_norm = gate_weight * mlp_norm, up_weight * mlp_norm, None
            gate = Linear(gate_weight, mlp.gate_proj.bias, self.activation)
            up = Linear(up_weight, mlp.up_proj.bias)
        else:
            gate_up = Linear(*_stack(mlp.gate_proj, mlp.up_proj), pack=False)

        def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
            return Linear(weight, bias, pack=self.packed)

        return Layer(
            norm=norm,
            qkv=linear(qkv, bias),
            query=linear(qkv[:split], None if bias is None else bias[:split]) if last else None,
            key_value=linear(qkv[split:], None if bias is None else bias[split:]) if last else None,
            qk_norm=self._head_norms(attention) if new else None,
            output=linear(attention.o_proj.weight, attention.o_proj.bias),
            mlp_norm=mlp_norm,
            gate_up=gate_up,
            gate=gate,
            up=up,
            down=linear(mlp.down_proj.weight, mlp.down_proj.bias),
            window=window,
        )

    def _head_norms(self, attention: nn.Module) -> torch.Tensor:
        each = (attention.q_norm.weight, self.heads), (attention.k_norm.weight, self.groups)
        return torch.cat([weight.detach().expand(heads, -1) for weight, heads in each])

    def _to_prefix(
        self, layer: Layer, query: torch.Tensor, prefix: Prefix, number: int, place: torch.Tensor, furthest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to the prefix; a shared one takes the queries of all rows as one long row.

        All of `place`, counted from the end of the prefix, are below `furthest`.
        """
        key, value = prefix.keys[number], prefix.values[number]
        count, length, heads, size = query.shape
        mask = None
        if layer.window is not None and len(prefix.token_ids) + furthest > layer.window:
            at = (len(prefix.token_ids) + place).expand(count, length)
            mask = _within(at.flatten(), len(prefix.token_ids), layer.window).view(count, length, -1)
        if prefix.rows > 1 or count == 1:
            return self.own_attention(query, key, value, mask, False)
        if mask is not None:
            mask = mask.view(1, count * length, -1)
        output, total = self.prefix_attention(query.reshape(1, count * length, heads, size), key, value, mask, False)
        return output.reshape(count, length, heads, size), total.reshape(count, length, heads, 1)

    @staticmethod
    def _stored(
        own: Continuations,
        number: int,
        rows: slice | torch.Tensor,
        places: Places,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values, and gives all that these rows hold."""
        span = places.seen.shape[-1]
        at = torch.arange(own.rows, device=key.device)[rows] if isinstance(rows, slice) else rows
        own.keys[number][at[:, None], places.slots] = key
        own.values[number][at[:, None], places.slots] = value
        return own.keys[number][rows, :span], own.values[number][rows, :span]

    def _project(
        self,
        layer: Layer,
        normed: torch.Tensor,
        asked: torch.Tensor | None,
        count: int,
        length: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (of `asked` tokens, None for none), key and value, normed and turned; (B, T, heads, D) each."""
        norms = layer.qk_norm
        if asked is normed:
            both = layer.qkv(normed).view(count, length, -1, self.head_size)
            # Queries and keys are turned as one tensor: half of the operations, and they lie side by side.
            turned = self._turned(both[:, :, : self.heads + self.groups], norms, cos, sin)
            query, key = turned.split((self.heads, self.groups), dim=2)
            return query, key, both[:, :, self.heads + self.groups :]
        query = None
        if asked is not None:
            query = layer.query(asked).view(count, -1, self.heads, self.head_size)
            query = self._turned(query, None if norms is None else norms[: self.heads], *(turns or (cos, sin)))
        key, value = layer.key_value(normed).view(count, length, -1, self.head_size).chunk(2, dim=2)
        return query, self._turned(key, None if norms is None else norms[self.heads :], cos, sin), value

    def _turned(
        self, x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Heads (B, T, heads, D) normed, where there are (heads, D) norms, and turned by (B or 1, T, 1, D) angles."""
        if weight is None or self.dtype != torch.float32:
            return _turn(x if weight is None else self._normed(x, weight), cos, sin)
        # A norm's factor is one number a head and commutes with turning; its weights go into the small tables.
        return _turn(x, cos * weight, sin * weight.roll(weight.shape[-1] // 2, -1)).mul_(self._scale(x))

    def _finish(self, layer: Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection and MLP, each added to the stream."""
        x = layer.output(attended, x)
        normed = self._normed(x, layer.mlp_norm)
        if layer.gate_up is None:
            return layer.down(layer.up(normed, factor=layer.gate(normed)), x)
        gate, up = layer.gate_up(normed).chunk(2, dim=-1)
        return layer.down(activated(gate, self.activation).mul_(up), x)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """RMSNorm; in float32 whatever the format, then rounded and scaled, as these models do it.

        Without weights where these are part of the weights that follow.
        """
        wide = x.float()
        normed = (wide * self._scale(wide)).to(x.dtype)
        return normed if weight is None else normed.mul_(weight)

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 1) one over the root of the mean square."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return length.square_().div_(x.shape[-1]).add_(self._eps).rsqrt_()

    def _turns(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines with the sign that the halves change places with, (R, P, 1, D) of rotary positions."""
        cos, sin = self._rotary(embeds, position_ids)
        if cos.ndim == 4:
            # transformers before 5.20 leaves putting Qwen2.5-VL's three sections together to the attention.
            sections = [*self._sections, *self._sections]
            cos, sin = (
                torch.cat([part[i % 3] for i, part in enumerate(t.split(sections, dim=-1))], dim=-1) for t in (cos, sin)
            )
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def _text_turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`_turns` of text, whose three positions are one: (B, T) positions."""
        ids = positions if self._text_only else positions.expand(3, *positions.shape)
        return self._turns(self._norm.new_empty((), dtype=self.dtype), ids)


def _stack(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases side by side; the modules keep views of them, so that nothing is stored twice."""
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.data for linear in linears])
    at = 0
    for linear in linears:
        rows = slice(at, at + len(linear.weight))
        linear.weight.data = weight[rows]
        if bias is not None:
            linear.bias.data = bias[rows]
        at = rows.stop
    return weight, bias


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (B, T, heads, D) by (B or 1, T, 1 or heads, D)."""
    half = x.shape[-1] // 2
    turned = x * cos
    # By halves: a tensor of the halves swapped would be written only to be read once.
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half])
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def _within(at: torch.Tensor, keys: int, window: int) -> torch.Tensor:
    """(len(at), keys) bool: keys that a sliding window lets a token at this place of the sequence see."""
    return torch.arange(keys, device=at.device) > at[:, None] - window
