"""What a training is told: nested dataclasses that the command line and YAML fill. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated.

    Args:
        name: an optimizer of timm, such as adamw, lamb, lion, sgd.
        lr: peak learning rate.
        weight_decay: biases, norms, tables, tokens and frequencies are exempt.
        betas: of Adam and its kin; two numbers.
        schedule: of timm, once for every update: cosine, tanh, step, poly.
        min_lr: where the schedule ends; default lr / 100.
        warmup_epochs: linear warm-up, from lr / 100.
        epochs: passes over the training data.
        batch_size: samples of an update, over all processes and parts.
        accumulate: parts that a batch is cut into where it does not fit in memory.
        clip_grad: largest gradient norm; 0: not clipped.
        layer_decay: learning rate of a block over that of the next; 1: all alike.
        ema: decay of the averaged weights that are evaluated and kept, such as 0.9998; 0: none.
        ema_warmup: let the decay grow from 0 to `ema` over the first updates.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    schedule: str = "cosine"
    min_lr: float | None = None
    warmup_epochs: float = 5
    epochs: int = 100
    batch_size: int = 128
    accumulate: int = 1
    clip_grad: float = 1.0
    layer_decay: float = 1.0
    ema: float = 0.0
    ema_warmup: bool = True


@dataclass(frozen=True)
class RunConfig:
    """Where and how a training runs.

    Args:
        out: folder of the run.
        seed: decides every random draw.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16.
        threads: CPU threads; default torch's own choice.
        compile: torch.compile the model.
        grad_checkpointing: compute blocks again in the backward pass instead of keeping their activations.
        parallel: under torchrun: ddp, or fsdp to shard weights and optimizer.
        save_minutes: save also this often within an epoch; 0: at the end of every epoch only.
        patience: stop after so many epochs without a better result; 0: never.
        bad_losses: give up after so many losses in a row that are not finite.
        tensorboard: write TensorBoard's events too.
        wandb: the name of a Weights & Biases project to log to.
    """

    out: str = "runs/train"
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    compile: bool = False
    grad_checkpointing: bool = False
    parallel: str = "ddp"
    save_minutes: float = 10
    patience: int = 0
    bad_losses: int = 3
    tensorboard: bool = False
    wandb: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Args:
        name: a model of timm, ours (vit2dpe_tiny_patch4_32, ...) or theirs; none: a ViT of the sizes below.
        position: the encoding, a word such as rope, sincos+alibi, rope(base=10).
        patch: patch side in pixels.
        width: channels of a token.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over width.
        pool: avg, token or map.
        class_token: whether there is one; default: with pool token.
        drop_path: stochastic depth rate of the last block.
        init: default (the model's own), xavier, trunc_normal or gpt2.
        options: further arguments of the model, such as '{"qk_norm": true}'.
    """

    name: str | None = None
    position: str | None = None
    patch: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    pool: str | None = None
    class_token: bool | None = None
    drop_path: float = 0.0
    init: str = "default"
    options: dict = field(default_factory=dict)
