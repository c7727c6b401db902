"""`DecoderLM`: a complete Llama, with the same weights and logits as Hugging Face's LlamaForCausalLM.

B batch, T sequence, D model, H query heads, G key and value heads, K head size, F hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_trainer.config.schema import ModelConfig
from dist_trainer.huggingface.llama_config import HFModel, TokenIds, hf_config, read_hf_config
from dist_trainer.huggingface.model_files import find_valid_model
from dist_trainer.huggingface.weights import check_tied_head, matched_weights, materialize, meta_init, write_hf
from dist_trainer.models.attention import DocumentMask, attention, document_mask, rotary_tables, rotate
from dist_trainer.models.loss import LogitLoss, linear_cross_entropy_sum

INIT_STD = 0.02


class KeyValueCache:
    """Keys and values of the tokens seen so far, one pair [B, G, T, K] per block."""

    def __init__(self, num_blocks: int) -> None:
        self.pairs: list[tuple[Tensor, Tensor] | None] = [None] * num_blocks

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        first = self.pairs[0]
        return 0 if first is None else first[0].shape[2]

    def extend(self, block: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of `block`, with the new ones appended."""
        before = self.pairs[block]
        if before is not None:
            k_BGTK = torch.cat([before[0], k_BGTK], dim=2)
            v_BGTK = torch.cat([before[1], v_BGTK], dim=2)
        self.pairs[block] = (k_BGTK, v_BGTK)
        return k_BGTK, v_BGTK


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.head_size = config.head_size
        self.dropout = config.dropout
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_groups * self.head_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_groups * self.head_size, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_size, config.hidden_size, bias=bias)
        self.attention_fn = attention

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        cache: KeyValueCache | None,
        block: int,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; `cache` has the keys and values of earlier tokens. Causal, or as `mask` says."""
        B, T, _ = x_BTD.shape
        q_BHTK = rotate(self.q_proj(x_BTD).view(B, T, -1, self.head_size).transpose(1, 2), cos_TK, sin_TK)
        k_BGTK = rotate(self.k_proj(x_BTD).view(B, T, -1, self.head_size).transpose(1, 2), cos_TK, sin_TK)
        v_BGTK = self.v_proj(x_BTD).view(B, T, -1, self.head_size).transpose(1, 2)
        causal = mask is None
        if cache is not None:
            k_BGTK, v_BGTK = cache.extend(block, k_BGTK, v_BGTK)
            causal = T > 1  # a single new token sees everything before it
        dropout = self.dropout if self.training else 0.0
        y_BHTK = self.attention_fn(q_BHTK, k_BGTK, v_BGTK, mask, causal=causal, dropout=dropout)
        return self.o_proj(y_BHTK.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D], via [B, T, F]."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        cache: KeyValueCache | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        attended = self.self_attn(self.input_layernorm(x_BTD), cos_TK, sin_TK, cache, self.index, mask)
        x_BTD = x_BTD + self.dropout(attended)
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))


class DecoderLM(nn.Module):
    """Token ids to logits of the next token. Parameters have Hugging Face Llama's names without their "model." prefix."""

    uses_all_parameters = True
    """Every loss depends on every parameter, so data parallelism need not look for unused ones."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_size: int,
        max_position_embeddings: int,
        *,
        bos_token_id: TokenIds = None,
        eos_token_id: TokenIds = None,
        pad_token_id: TokenIds = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """With torch's default weights; call init_weights or load_weights next. `generation`: contents of a pretrained model's
        generation_config.json, which checkpoints keep.

        Inside `meta_init`, followed by `materialize`, this saves memory and time.
        """
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.max_position_embeddings = max_position_embeddings
        self.token_ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        self.generation = generation
        self.embed_tokens = nn.Embedding(vocabulary_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, vocabulary_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.logit_loss = LogitLoss()
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def compile_units(self) -> Iterable[nn.Module]:
        """The modules to compile, each by itself; equal blocks share one compilation."""
        return [*self.layers, self.logit_loss]

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output head's matrix; the embedding's if they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of `input_ids` [B, T]; with `targets` [B, T] the float32 sum of the token losses instead.

        `document_ids` [B, T], the number of each token's document in its sequence, restricts attention to documents; None: each
        sequence is one. `cache` has the keys and values of earlier tokens of one document, and gets those of these; once it is
        not empty, T must be 1. Raises ValueError if both are given.
        """
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids: a cache holds tokens of one document; give document_ids or cache, not both")
        mask = None if document_ids is None else self._document_mask(document_ids)
        start = 0 if cache is None else cache.length
        cos_TK, sin_TK = self._rotary_tables(start + input_ids.shape[1], input_ids.device)
        x_BTD = self.dropout(self.embed_tokens(input_ids))
        for block in self.layers:
            # With a cache, shapes differ for each token: a compiled block would be recompiled for each.
            forward = block if cache is None else block.forward
            x_BTD = forward(x_BTD, cos_TK[start:], sin_TK[start:], cache, mask)
        x_BTD = self.norm(x_BTD)
        if targets is None:
            return F.linear(x_BTD, self.head_weight)
        return linear_cross_entropy_sum(x_BTD.flatten(0, 1), self.head_weight, targets.flatten(), logit_loss=self.logit_loss)

    def _document_mask(self, document_ids: Tensor) -> DocumentMask:
        drops_out, kind = self.training and self.config.dropout > 0, document_ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.head_weight.dtype
        return document_mask(document_ids, head_size=self.config.head_size, drops_out=drops_out, dtype=dtype)

    def _rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rotary is None or self._rotary[0].shape[0] < length or self._rotary[0].device != device:
            # Twice as many as needed now, but not a full context, which may have 131072.
            spare = min(2 * length, self.max_position_embeddings)
            self._rotary = rotary_tables(self.config, max(length, spare), device)
        cos, sin = self._rotary
        return cos[:length], sin[:length]

    def init_weights(self, seed: int) -> None:
        """Draw every parameter on the CPU from a separate generator: the same weights on every device and rank.

        ===========================================  =============================================
        embed_tokens, lm_head                        normal(0, 0.02)
        q_proj, k_proj, v_proj, gate_proj, up_proj   normal(0, 0.02)
        o_proj, down_proj (write to the residual)    normal(0, 0.02 / sqrt(2 * num_hidden_layers))
        norms                                        1
        biases (attention_bias, mlp_bias)            0
        ===========================================  =============================================

        The smaller residual projections keep the residual stream's variance independent of depth (Radford et al. 2019, GPT-2,
        section 2.3). Raises ValueError for a parameter that is not in the table.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            owner = name.split(".")[-2]
            if name.endswith("_proj.bias"):
                value = torch.zeros(parameter.shape)
            elif owner.endswith("norm"):
                value = torch.ones(parameter.shape)
            elif owner in ("o_proj", "down_proj"):
                value = torch.empty(parameter.shape).normal_(0.0, residual_std, generator=generator)
            elif owner in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                value = torch.empty(parameter.shape).normal_(0.0, INIT_STD, generator=generator)
            else:
                raise ValueError(f"init_weights: no distribution is defined for {name}")
            with torch.no_grad():
                parameter.copy_(value)

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of the forward and backward pass, per token.

        A product with a matrix of P entries costs 2P per token in the forward pass and 4P in the backward pass. P counts every
        matrix product (also the output head, tied or not) but not the embedding look-up. Attention's two products QKᵀ and PV
        cost 2 * 2 * H * K * T in the forward pass for a query that attends to T tokens, on average T/2 with the causal mask,
        and twice that in the backward pass: 6 * H * K * T per layer. What a document mask saves is not subtracted; norms,
        rotations, softmax and biases are not counted. (Chowdhery et al. 2022, PaLM, appendix B, with half for causality.)
        """
        config = self.config
        head_size = config.head_size
        attention_matrices = config.hidden_size * head_size * 2 * (config.num_attention_heads + config.num_key_value_heads)
        matrices = config.num_hidden_layers * (attention_matrices + 3 * config.hidden_size * config.intermediate_size)
        matrices += config.hidden_size * self.vocabulary_size
        attention = config.num_hidden_layers * 6 * config.num_attention_heads * head_size * sequence_length
        return float(6 * matrices + attention)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: torch.device | str = "cpu") -> DecoderLM:
        """The model in a run folder (its best checkpoint), a checkpoint, or any folder in Hugging Face Llama format.

        In float32 whatever the files' format, read tensor by tensor onto `device`. Raises ConfigError naming the field if
        DecoderLM cannot represent the folder's model, CheckpointError if files are missing or damaged.
        """
        folder = find_valid_model(Path(path))
        return cls.from_hf_model(read_hf_config(folder), weights=folder, device=device).eval()

    @classmethod
    def from_hf_model(cls, hf_model: HFModel, *, weights: Path | None, device: torch.device | str = "cpu") -> DecoderLM:
        """A model of the shape `hf_model` with the weights in the folder `weights` (None: uninitialised)."""
        with meta_init():
            model = cls(
                hf_model.config,
                hf_model.vocabulary_size,
                hf_model.max_position_embeddings,
                **hf_model.token_ids,
                generation=hf_model.generation,
            )
        if weights is not None:
            for _ in matched_weights(weights, dict(model.named_parameters())):
                pass  # raises if names or shapes differ, before memory is allocated
        materialize(model, torch.device(device))
        if weights is not None:
            model.load_weights(weights)
        return model

    def load_weights(self, folder: Path) -> None:
        """Copy the weights in `folder` into this model, tensor by tensor. Raises CheckpointError if one is missing, has another
        shape, or has no parameter.
        """
        tied_head = None
        with torch.no_grad():
            for parameter, tensor in matched_weights(folder, dict(self.named_parameters())):
                if parameter is None:
                    tied_head = tensor
                else:
                    parameter.copy_(tensor)
        if tied_head is not None:
            check_tied_head(folder, tied_head, self.embed_tokens.weight)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the model into a folder that LlamaForCausalLM.from_pretrained opens."""
        write_hf(Path(path), state=self.state_dict(), config=self.hf_config(), generation=self.generation)

    def hf_config(self) -> dict[str, object]:
        """The contents of config.json."""
        return hf_config(HFModel(self.config, self.vocabulary_size, self.max_position_embeddings, self.token_ids))
