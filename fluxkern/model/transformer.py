"""The FLUX.1 transformer, built on `fluxkern.ops`; parameters carry BFL's names."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import ops
from .._modules import autocast_dtype, hooked
from .layers import (
    Part,
    Places,
    by_op,
    column_parts,
    compute_dtype,
    execution_device,
    linear,
    mlp,
    modulation,
    product,
    row_parts,
    why_called,
)

TIME_DIM = 256  # sinusoids of timestep and guidance


@dataclass(frozen=True)
class FluxConfig:
    """The sizes of a FLUX.1 transformer.

    Args:
        in_channels: channels of an image token as the model takes it; more than out_channels where
            a condition is concatenated (Fill 384, Control 128).
        out_channels: channels of the predicted velocity.
        vec_in_dim: width of the pooled CLIP vector.
        context_in_dim: width of a T5 token.
        hidden_size: num_heads times the head dim.
        mlp_ratio: MLP width over hidden_size.
        num_heads: attention heads.
        depth: double-stream blocks.
        depth_single_blocks: single-stream blocks.
        axes_dim: head dims given to each position axis; they sum to the head dim.
        theta: base of the rotation frequencies.
        qkv_bias: bias in the double blocks' QKV projections.
        guidance_embed: guidance is an input (guidance-distilled models).

    Raises:
        ValueError: sizes that do not fit together; names both.

    Source: black-forest-labs/flux, model.py, FluxParams.
    """

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, "
                f"got {self.hidden_size} and {self.num_heads}"
            )
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(
                f"axes_dim must be even and sum to the head dim, {self.head_dim}, "
                f"got {list(self.axes_dim)}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


_DEV = FluxConfig()
CONFIGS = {
    "dev": _DEV,
    "schnell": replace(_DEV, guidance_embed=False),
    "fill": replace(_DEV, in_channels=384),
    "control": replace(_DEV, in_channels=128),
    "kontext": _DEV,
    "compact": FluxConfig(
        vec_in_dim=128,
        context_in_dim=128,
        hidden_size=192,
        num_heads=3,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(16, 24, 24),
        guidance_embed=False,
    ),
}


def rope_tables(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's rotation.

    angle = position * theta^(-2k / d), k = 0 .. d/2 - 1, axis after axis

    Args:
        ids: [L, axes], positions of the tokens.
        axes_dim: head dims of each axis.
        theta: base of the frequencies.

    Returns:
        (cos, sin), fp32 [L, D/2], computed in fp64.

    Source: Su et al., RoFormer; black-forest-labs/flux, math.py, rope.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        k = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device)
        angles.append(ids[:, axis, None].double() * theta ** (-k / dim))
    angle = torch.cat(angles, -1)  # [L, D/2]
    return angle.cos().float(), angle.sin().float()


class MLPEmbedder(nn.Module):
    """Linear, SiLU, linear: timestep, guidance and pooled text to the width of the model."""

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return linear(torch.nn.functional.silu(linear(x, self.in_layer)), self.out_layer)

    def places(self) -> Places:
        return {name: ("linear", layer) for name, layer in self.named_children()}


class RMSScale(nn.Module):
    """The weight of an RMSNorm over the head dim; the norm itself is part of the fused ops."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self) -> Tensor:
        """[D]; a view, that stays when a hook takes the weight away again."""
        return self.scale.view_as(self.scale)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSScale(head_dim)
        self.key_norm = RMSScale(head_dim)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of q and of k, [D], in the dtype of q, which may be autocast's."""
        norms = self.query_norm, self.key_norm
        return tuple((norm() if hooked(norm) else norm.scale).to(dtype) for norm in norms)


class Modulation(nn.Module):
    """(shift, scale, gate) once or twice, from vec."""

    def __init__(self, hidden_size: int, chunks: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec: Tensor) -> Tensor:
        """[..., B, C] to the vectors in a row, [..., B, 1, chunks * C]."""
        return modulation(vec, self.lin)

    def places(self) -> Places:
        return {"lin": ("modulation", self.lin)}


class SelfAttention(nn.Module):
    """The projections of one stream of a double block."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # 3 views [B, L, H, D]


def _mlp(config: FluxConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.mlp_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_size, config.hidden_size),
    )


Vectors = tuple[Tensor, ...]  # of a modulation, [B, S, C], S = 2: text, image; or one, vec [B, C]


@dataclass(frozen=True)
class Workspace:
    """What a step needs beside its tokens, computed ahead by `Flux.workspaces`.

    Args:
        cos, sin: fp32 [L, D/2], the rotations of the joint sequence, text first.
        modulation: the vectors of every block and of the last layer, in their order; vec alone
            where its layers are not to be used ahead of the block.
    """

    cos: Tensor
    sin: Tensor
    modulation: tuple[Vectors, ...]


class Stream:
    """The joint residual stream of one call, text first.

    A branch is added to it by the norm that opens the next one, in the same pass. Without gradients
    the products of all blocks write into the same two buffers, text and image rows of one tensor:
    "wide" is that of q, k, v until they have attended, then the MLP's; "branch" is what is added.
    Blocks with a layer that must be called take no buffer: a hook may keep what it is shown.

    Args:
        x: [B, Lt + Li, C].
        txt_len: text tokens.
    """

    def __init__(self, x: Tensor, txt_len: int):
        self.x, self.txt_len = x, txt_len
        self.pending: tuple[Tensor, Tensor] | None = None  # y and its gate
        self.buffers: dict[str, Tensor] = {}

    def add(self, y: Tensor, gate: Tensor) -> None:
        """x + gate * y, [B, L, C], from the next norm on."""
        self.pending = y, gate

    def txt_len_of(self, vec: Tensor) -> int:
        """As the ops take it beside these vectors."""
        return self.txt_len if vec.shape[1] == 2 else 0

    def norm(self, shift: Tensor, scale: Tensor) -> Tensor:
        """The normed and modulated stream [B, L, C]."""
        if self.pending is None:
            return ops.norm_modulate(self.x, scale, shift, self.txt_len_of(scale))
        y, gate = self.pending
        if gate.shape[1] != scale.shape[1]:  # the first single block behind the last double one
            scale, shift = (vec.expand_as(gate) for vec in (scale, shift))
        txt_len = self.txt_len_of(gate)
        self.x, h = ops.gated_residual_norm_modulate(self.x, y, gate, scale, shift, txt_len)
        self.pending = None
        return h

    def norm_img(self, shift: Tensor, scale: Tensor) -> Tensor:
        """The normed and modulated image tokens, [B, Li, C]; the last norm of a call."""
        x = self.x[:, self.txt_len :]
        if self.pending is None:
            return ops.norm_modulate(x, scale, shift)
        y, gate = self.pending
        y, gate = y[:, self.txt_len :], gate[:, -1:]
        return ops.gated_residual_norm_modulate(x, y, gate, scale, shift)[1]

    def sum(self) -> Tensor:
        """The stream with every branch added, [B, L, C]."""
        if self.pending is None:
            return self.x
        y, gate = self.pending
        return ops.gated_residual(self.x, y, gate, self.txt_len_of(gate))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Text and image rows of a joint tensor, views."""
        return x.split((self.txt_len, x.shape[1] - self.txt_len), 1)

    def end_of_block(self) -> None:
        """An fp16 stream stays finite, as in diffusers."""
        if self.x.dtype == torch.float16:
            self.x, self.pending = self.sum().clip(-65504, 65504), None

    def buffer(self, name: str, channels: int) -> Tensor:
        """[B, L, channels], the same memory each time; not to be used with gradients."""
        shape = (*self.x.shape[:2], channels)
        if name not in self.buffers or self.buffers[name].numel() < math.prod(shape):
            self.buffers.pop(name, None)  # its memory may be taken at once
            self.buffers[name] = self.x.new_empty(math.prod(shape))
        return self.buffers[name][: math.prod(shape)].view(shape)

    def product(self, name: str, x: Tensor, layer: Part, activation: str | None = None) -> Tensor:
        """A product of all tokens, [B, L, Cout], into the buffer of that name."""
        return product(x, layer, activation, self.buffer(name, layer.weight.shape[0]))

    def products(
        self,
        name: str,
        x: Tensor,
        layers: tuple[nn.Linear, nn.Linear],
        activation: str | None = None,
    ) -> Tensor:
        """Of text and image rows, [B, L, Cout], into the buffer of that name."""
        out = self.buffer(name, layers[0].out_features)
        for rows, layer, into in zip(self.split(x), layers, self.split(out), strict=True):
            product(rows, layer, activation, into)
        return out


def _in_place(block: nn.Module, x: Tensor) -> bool:
    """Whether the products of a block may write into buffers."""
    if torch.is_grad_enabled() or autocast_dtype(x) is not None:
        return False
    return not any(why_called(layer, place) for place, layer in block.places().values())


def _mlp_places(name: str, layers: nn.Module) -> Places:
    if why_called(layers, "sequential"):
        return {name: ("sequential", layers)}
    kinds = ("linear", "gelu", "linear")
    children = zip(kinds, layers, strict=True)
    return {f"{name}.{n}": placed for n, placed in enumerate(children)}


class DoubleStreamBlock(nn.Module):
    """Text and image, each with its own weights, attend to each other; then each its own MLP."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.num_heads = config.num_heads
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(config.hidden_size, 6))
            self.add_module(f"{stream}_attn", SelfAttention(config))
            self.add_module(f"{stream}_mlp", _mlp(config))

    def vectors(self, vec: Tensor) -> Vectors:
        """(shift, scale, gate) of the attention and of the MLP, each [..., B, 2, C]."""
        return torch.cat((self.txt_mod(vec), self.img_mod(vec)), -2).chunk(6, -1)

    def forward(self, stream: Stream, mod: Vectors, cos: Tensor, sin: Tensor) -> None:
        """Adds its two branches to the stream."""
        mod = _vectors(self, mod)
        attend, mlp = (
            (self._attend_in_place, self._mlp_in_place)
            if _in_place(self, stream.x)
            else (self._attend, self._mlp)
        )
        h = stream.norm(*mod[:2])
        stream.add(attend(stream, h, cos, sin), mod[2])
        h = stream.norm(*mod[3:5])
        stream.add(mlp(stream, h), mod[5])
        stream.end_of_block()

    def _attend(self, stream: Stream, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What the two attention layers give, [B, L, C]."""
        parts = zip(stream.split(h), self._attentions(), strict=True)
        txt, img = (_split_heads(linear(x, attn.qkv), self.num_heads) for x, attn in parts)
        qkv = ops.joint_qk_norm_rope(*txt, *img, *self._norm_weights(txt[0].dtype), cos, sin)
        attn = stream.split(ops.attention(*qkv).flatten(2))
        layers = (attn.proj for attn in self._attentions())
        return torch.cat(tuple(map(linear, attn, layers)), 1)

    def _attend_in_place(self, stream: Stream, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        txt, img = self._attentions()
        qkv = stream.products("wide", h, (txt.qkv, img.qkv))
        q, k, v = _split_heads(qkv, self.num_heads)
        ops.qk_norm_rope_(q, k, *self._norm_weights(q.dtype), cos, sin, stream.txt_len)
        attn = ops.attention(q, k, v).flatten(2)
        return stream.products("branch", attn, (txt.proj, img.proj))

    def _attentions(self) -> tuple[SelfAttention, SelfAttention]:
        return self.txt_attn, self.img_attn

    def _norm_weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (*self.txt_attn.norm.weights(dtype), *self.img_attn.norm.weights(dtype))

    def _mlp(self, stream: Stream, h: Tensor) -> Tensor:
        """What the two MLPs give, [B, L, C]."""
        txt, img = stream.split(h)
        return torch.cat((mlp(txt, self.txt_mlp), mlp(img, self.img_mlp)), 1)

    def _mlp_in_place(self, stream: Stream, h: Tensor) -> Tensor:
        txt, img = self.txt_mlp, self.img_mlp
        h = stream.products("wide", h, (txt[0], img[0]), "gelu_tanh")
        return stream.products("branch", h, (txt[2], img[2]))

    def places(self) -> Places:
        found = {}
        for name in ("txt", "img"):
            attn, layers = getattr(self, f"{name}_attn"), getattr(self, f"{name}_mlp")
            found[f"{name}_attn.qkv"] = "linear", attn.qkv
            found[f"{name}_attn.proj"] = "linear", attn.proj
            found |= _mlp_places(f"{name}_mlp", layers)
        return found


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel on the joint sequence, one projection in and one out.

    linear1 and linear2 are held as in the checkpoint, and each is used as two products: nothing is
    concatenated, and GELU is the epilogue of its product.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        hidden, mlp = config.hidden_size, config.mlp_size
        self.num_heads = config.num_heads
        self.rows, self.columns = (3 * hidden, mlp), (hidden, mlp)
        self.linear1 = nn.Linear(hidden, 3 * hidden + mlp)
        self.linear2 = nn.Linear(hidden + mlp, hidden)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(hidden, 3)

    def vectors(self, vec: Tensor) -> Vectors:
        """(shift, scale, gate), each [..., B, 1, C]."""
        return self.modulation(vec).chunk(3, -1)

    def forward(self, stream: Stream, mod: Vectors, cos: Tensor, sin: Tensor) -> None:
        """Adds its branch to the stream."""
        mod = _vectors(self, mod)
        h = stream.norm(*mod[:2])
        if _in_place(self, h):
            y = self._in_parts_in_place(stream, h, cos, sin)
        elif by_op(self.linear1, h) and by_op(self.linear2, h):
            y = self._in_parts(h, cos, sin)
        else:
            y = self._whole(h, cos, sin)
        stream.add(y, mod[2])
        stream.end_of_block()

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = _split_heads(qkv, self.num_heads)
        return ops.rope_attention(q, k, v, *self.norm.weights(q.dtype), cos, sin).flatten(2)

    def _whole(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """With a layer that is called, as an adapter of linear1 or linear2 has to be."""
        qkv, mlp = linear(h, self.linear1).split(self.rows, -1)
        attn = self._attend(qkv, cos, sin)
        return linear(torch.cat((attn, ops.gelu_tanh(mlp)), -1), self.linear2)

    def _in_parts(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv_layer, mlp_layer = row_parts(self.linear1, self.rows)
        attn_layer, out_layer = column_parts(self.linear2, self.columns)
        attn = self._attend(product(h, qkv_layer), cos, sin)
        y = product(attn, attn_layer)
        return y + product(product(h, mlp_layer, "gelu_tanh"), out_layer)

    def _in_parts_in_place(self, stream: Stream, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv_layer, mlp_layer = row_parts(self.linear1, self.rows)
        attn_layer, out_layer = column_parts(self.linear2, self.columns)
        attn = self._attend(stream.product("wide", h, qkv_layer), cos, sin)
        y = stream.product("branch", attn, attn_layer)
        del attn  # its memory may be taken at once
        mlp = stream.product("wide", h, mlp_layer, "gelu_tanh")
        return product(mlp, out_layer, out=y, add=True)

    def places(self) -> Places:
        return {"linear1": ("linear", self.linear1), "linear2": ("linear", self.linear2)}


def _vectors(block: "DoubleStreamBlock | SingleStreamBlock | LastLayer", given: Vectors) -> Vectors:
    """What was computed ahead, or what the block's layers make of vec."""
    return block.vectors(*given) if len(given) == 1 else given


class LastLayer(nn.Module):
    """Norm, modulate, project to the velocity."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.out_channels)
        # BFL's name for the layer is adaLN_modulation.1: 0 is its SiLU
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size)
        )

    def vectors(self, vec: Tensor) -> Vectors:
        """(shift, scale), each [..., B, 1, C]."""
        places = tuple(self._modulation_places().values())
        if any(why_called(layer, place) for place, layer in places[:2]):
            return self.adaLN_modulation(vec).unsqueeze(-2).chunk(2, -1)
        return modulation(vec, places[2][1]).chunk(2, -1)

    def _modulation_places(self) -> Places:
        layers, name = self.adaLN_modulation, "adaLN_modulation"
        found = {name: ("sequential", layers)}
        if why_called(layers, "sequential"):
            return found
        return found | {f"{name}.0": ("silu", layers[0]), f"{name}.1": ("modulation", layers[1])}

    def forward(self, stream: Stream, mod: Vectors) -> Tensor:
        return linear(stream.norm_img(*_vectors(self, mod)), self.linear)

    def places(self) -> Places:
        return {"linear": ("linear", self.linear)} | self._modulation_places()


def _moved(t: Tensor, device: torch.device) -> Tensor:
    if t.is_cuda and device.type == "cpu":
        pinned = torch.empty(t.shape, dtype=t.dtype, device=device, pin_memory=True)
        return pinned.copy_(t, non_blocking=True)
    return t.to(device, non_blocking=device.type == "cuda" and t.is_pinned())


class Flux(nn.Module):
    """The FLUX.1 transformer: image tokens, text tokens and conditions to a velocity.

    Source: black-forest-labs/flux, model.py, Flux.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.txt_in = nn.Linear(config.context_in_dim, hidden)
        self.time_in = MLPEmbedder(TIME_DIM, hidden)
        self.vector_in = MLPEmbedder(config.vec_in_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_DIM, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(config)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """The velocity at a point of the straight path from noise (timestep 1) to picture (0).

        Args:
            img: [B, Li, in_channels], packed latents, dtype of the weights.
            img_ids: [Li, axes], their positions.
            txt: [B, Lt, context_in_dim], T5 tokens.
            txt_ids: [Lt, axes], zeros.
            timesteps: [B], 0 to 1.
            y: [B, vec_in_dim], pooled CLIP vector.
            guidance: [B], for a model with config.guidance_embed.
            workspace: what `workspaces` made of ids, timesteps, y and guidance, which then only
                have their shapes looked at; None makes it here.

        Returns:
            [B, Li, out_channels], dtype of img, or of autocast where that is on.

        Raises:
            ValueError: a shape or dtype disagrees with the config or another argument; a guidance
                that is missing, or that the model does not take.

        Gradients: all tensors but ids, and every parameter.
        Source: black-forest-labs/flux, model.py, Flux.forward.
        """
        self._check(img, img_ids, txt, txt_ids, timesteps, y, guidance)
        if workspace is None:
            timesteps = timesteps.to(img.dtype)[None]
            (workspace,) = self.workspaces(img_ids, txt_ids, timesteps, y, guidance)
        rotation, modulation = (workspace.cos, workspace.sin), iter(workspace.modulation)
        stream = self._stream(txt, img)
        for block in self.double_blocks:
            block(stream, next(modulation), *rotation)
        for block in self.single_blocks:
            block(stream, next(modulation), *rotation)
        return self.final_layer(stream, next(modulation))

    def workspaces(
        self,
        img_ids: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> list[Workspace]:
        """What the S steps of a schedule need beside their tokens, computed at once.

        The modulation layers, a quarter of a FLUX.1, depend on nothing else, and are read once.

        Args:
            img_ids, txt_ids, y, guidance: as in `forward`.
            timesteps: [S, B], dtype of the weights.

        Returns:
            S workspaces; one serves any number of calls of `forward` with these arguments.

        Gradients: y and guidance, and the parameters of embedders and modulations.
        """
        cos, sin = rope_tables(
            torch.cat((txt_ids, img_ids)), self.config.axes_dim, self.config.theta
        )
        vec = self._embed(timesteps, y, guidance)
        parts = (*self.double_blocks, *self.single_blocks, self.final_layer)
        ahead = (
            (vec,) if hooked(part) else part.vectors(vec) for part in parts
        )  # hooks bring weights
        steps = zip(*(zip(*(t.unbind() for t in of), strict=True) for of in ahead), strict=True)
        return [Workspace(cos, sin, modulation) for modulation in steps]

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return execution_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return compute_dtype(self, RMSScale)

    def modulation_to(self, device: torch.device | str) -> None:
        """Moves the modulation layers, which `forward` does not need beside a workspace.

        Those that hooks bring to where they run stay where they are. From a GPU they go to pinned
        memory, from which they come back at the speed of the bus.

        Args:
            device: where to.
        """
        device = torch.device(device)
        for block, layer in self._modulations():
            if not hooked(block) and not any(p.is_meta for p in layer.parameters()):
                layer._apply(lambda t: _moved(t, device))
        if device.type == "cpu" and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # before the host reads the copies

    def places(self) -> Places:
        return {name: ("linear", getattr(self, name)) for name in ("img_in", "txt_in")}

    def _modulations(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each block with each layer that makes the vectors of its modulation."""
        doubles = ((b, layer) for b in self.double_blocks for layer in (b.txt_mod, b.img_mod))
        singles = ((b, b.modulation) for b in self.single_blocks)
        return [*doubles, *singles, (self.final_layer, self.final_layer.adaLN_modulation)]

    def _embed(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """[S, B, C]; each step by itself, so that it has the bits it would have alone."""
        dtype = timesteps.dtype
        times = [self.time_in(ops.timestep_embedding(t, TIME_DIM)) for t in timesteps.unbind()]
        if guidance is not None:
            strength = self.guidance_in(ops.timestep_embedding(guidance.to(dtype), TIME_DIM))
            times = [time + strength for time in times]
        pooled = self.vector_in(y)
        return torch.stack([time + pooled for time in times])

    def _stream(self, txt: Tensor, img: Tensor) -> Stream:
        txt_len, layers = txt.shape[1], (self.txt_in, self.img_in)
        if not _in_place(self, img):
            return Stream(torch.cat(tuple(map(linear, (txt, img), layers)), 1), txt_len)
        x = img.new_empty(img.shape[0], txt_len + img.shape[1], self.config.hidden_size)
        stream = Stream(x, txt_len)
        for rows, layer, out in zip((txt, img), layers, stream.split(x), strict=True):
            product(rows, layer, out=out)
        return stream

    def _check(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None,
    ) -> None:
        config, axes = self.config, len(self.config.axes_dim)
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(
                f"img and txt must be [B, L, C], got {list(img.shape)} and {list(txt.shape)}"
            )
        batch = img.shape[0]
        expected = {
            "img": (img, (batch, img.shape[1], config.in_channels)),
            "img_ids": (img_ids, (img.shape[1], axes)),
            "txt": (txt, (batch, txt.shape[1], config.context_in_dim)),
            "txt_ids": (txt_ids, (txt.shape[1], axes)),
            "timesteps": (timesteps, (batch,)),
            "y": (y, (batch, config.vec_in_dim)),
        }
        if config.guidance_embed != (guidance is not None):
            wanted, found = ("[B]", None) if config.guidance_embed else (None, "a tensor")
            raise ValueError(f"guidance must be {wanted} for this model, got {found}")
        if guidance is not None:
            expected["guidance"] = (guidance, (batch,))
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
