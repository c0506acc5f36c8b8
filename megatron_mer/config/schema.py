"""Every key of a run's configuration: its name, type, range, default and meaning.

Those of the model stand in `model_schema.py`.
The classes are plain frozen dataclasses. Constructing one by hand checks nothing; `load_config`
checks everything. The text below each field is what `--help` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_mer.config.field_types import (
    Alpha,
    Count,
    CountOrZero,
    Flag,
    Note,
    NotNegative,
    Positive,
    Share,
    ShareBelowOne,
    Text,
)
from megatron_mer.config.model_schema import ModelConfig
from megatron_mer.config.preflight_schema import PreflightConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model lies on the ranks; dp_size = ranks / (tp_size * pp_size) follows."""

    tp_size: Count = 1
    """Tensor-parallel ranks: each layer's weights are split over them."""
    pp_size: Count = 1
    """Pipeline stages: the layers are split over them."""
    zero_stage: Annotated[CountOrZero, Note("1")] = 1
    """1: fp32 masters and moments sharded over the data-parallel ranks; the only one today."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """full: recompute each block in the backward pass; less memory, about a third more compute."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """What the arithmetic of a step is computed with; the loss is the same but for rounding."""

    loss: Literal["chunked", "whole"] = "chunked"
    """chunked: the logits of some tokens at a time, their gradient at once; whole: all logits of a
    micro batch, as large as its tokens times the vocabulary."""
    loss_chunk_tokens: Count | None = None
    """Tokens of a chunk; default: what fits the processor's caches, or 512 MiB of a GPU."""
    compile: Flag = False
    """Compile each block (torch.compile): a minute at the start, then fewer and larger kernels."""
    fused: Literal["auto", "off"] = "auto"
    """auto: on a GPU RMSNorm and SwiGLU of the package liger-kernel, where it is there and the
    blocks are not compiled; off: PyTorch's own."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Rows of an optimizer step."""

    global_batch_size: Count
    """N, rows of one optimizer step over all ranks; a multiple of micro_batch_size * dp_size."""
    micro_batch_size: Count
    """Rows that a rank computes at once; changes memory and speed, never the result's meaning."""
    eod_mask_loss: Flag = False
    """Leave the first token of each document out of the training loss: nothing foretells it.
    Held-out losses count every token."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    lr: Positive
    """Peak learning rate."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: Positive = 1e-8
    """Adam's eps, which is not Reptile's epsilon."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of the matrices; norm weights are not decayed."""
    clip: NotNegative = 1.0
    """Largest norm of the global gradient; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSegmentConfig:
    """A segment of the schedule, behind what stands before it. The last one's end rate stays."""

    kind: Literal["cosine", "constant"]
    """cosine: warm up, then one cosine to min_lr at its end; constant: warm up, then stay."""
    steps: Count | None = None
    """Length in steps; a constant that is the last may leave it out and then has no end."""
    lr: Positive
    """Learning rate after its warm-up; optimizer.lr is the first schedule's alone."""
    warmup_steps: CountOrZero = 0
    """Steps on a straight line to lr, up or down, from the rate at which what stands before ended;
    0 jumps to lr."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of a cosine."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the optimizer steps of the whole stream, or of each task."""

    kind: Literal["cosine", "wsd", "infinite", "constant"] = "cosine"
    """cosine: warm up, then one cosine to min_lr at total_steps; wsd: warm up, stay, decay to
    min_lr over the last decay_steps; infinite: warm up, cool down along a cosine to constant_lr,
    stay there, decay as wsd does; constant: warm up, then stay."""
    per_task: Flag = False
    """Begin anew with each entry of the stream, whose batches are then the schedule's length: the
    rate warms up from where it ended. Not for constant, which ends where it would begin."""
    warmup_steps: CountOrZero = 0
    """Steps of the linear warm-up from 0 to optimizer.lr."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end; not for constant."""
    decay_steps: Count | None = None
    """wsd and infinite: steps of the decay to min_lr; default: 10 % of the schedule for wsd, 25 %
    for infinite."""
    decay: Literal["linear", "cosine", "sqrt", "exponential"] | None = None
    """wsd and infinite: form of that decay. sqrt falls as 1 - sqrt(x), the default of wsd;
    exponential, the default of infinite, needs min_lr > 0."""
    cooldown_steps: Count | None = None
    """infinite: steps of the cosine from optimizer.lr to constant_lr; default: 60 % of the
    schedule."""
    constant_lr: Positive | None = None
    """infinite: learning rate between cooldown and decay; default: 0.55 of optimizer.lr."""
    total_steps: Count | None = None
    """Where the schedule ends, in steps; default: the end of the stream. Also where `then` begins,
    which needs it with any kind."""
    then: tuple[ScheduleSegmentConfig, ...] = ()
    """What follows after total_steps; without it a longer stream stays at the last rate."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A tokenized dataset; in a list a bare prefix stands for {prefix: ...}."""

    prefix: Text
    """Path of PREFIX.bin and PREFIX.idx; a relative one starts at the working directory."""
    weight: Positive | None = None
    """Share among the datasets of its task, relative to the others; for all of them or for none
    (none: in proportion to their sizes)."""
    max_epochs: Positive | None = None
    """How often this dataset may be read; default: its task's max_epochs."""
    name: Text = ""
    """Keys the order of its samples and its place in the ledger; default: the prefix's last part.
    A dataset that moves to another path keeps its name."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.prefix.rpartition("/")[2])


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """An entry of the stream: a task trained for a while. A task may return later in the stream."""

    task: Text
    """Name of the task."""
    train: tuple[DatasetConfig, ...]
    """Datasets that it is trained on."""
    valid: (
        Annotated[
            Text | dict[Text, Text], Note("a prefix, or a section of prefixes by name {name: P}")
        ]
        | None
    ) = None
    """Held-out data: one prefix, named after the task, or several by name {en: P, fr: P}."""
    steps: Count | None = None
    """Length in global batches: fixed total, so replay takes the place of fresh rows."""
    fresh_tokens: Count | None = None
    """Length in fresh tokens, instead of steps: fixed fresh, so replay makes the task longer."""
    max_epochs: Positive = 1.0
    """How often each of its datasets may be read; asking for more samples is an error."""
    trained_before: Flag = False
    """Trained before this run: takes no step here. Wherever it stands in the stream, it may be
    replayed from the first batch that is drawn with it on: of the run, or of the resume that adds
    it with `--accept stream`, which puts it behind what was begun."""

    @property
    def valid_sets(self) -> dict[str, str]:
        """Held-out sets, name -> prefix."""
        if isinstance(self.valid, str):
            return {self.task: self.valid}
        return dict(self.valid or {})


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Experience replay: a share of each global batch was trained on before."""

    alpha: Alpha
    """Share of replayed rows: after t batches of a task exactly floor(alpha * N * t) of them."""
    source: Literal["stream", "buffer"] = "stream"
    """stream: rows are read again from the datasets, which therefore stay in place. buffer: a
    sample of all fresh rows is kept on disk, so that datasets may go once their task has ended."""
    capacity_samples: (
        Annotated[
            Count | dict[Text, Count], Note("one number, or one of each task {en: 1000, fr: 500}")
        ]
        | None
    ) = None
    """Source buffer: rows that it holds, of all tasks together or of each task. Whatever the
    moment, each row that was fresh so far (of the task) is in it with the same probability. A run
    keeps its capacity for good; tasks that are added later add theirs."""
    dir: Text | None = None
    """Source buffer: its folder, which all ranks share; default: output_dir/buffer. It takes up to
    twice the capacity, at 2 bytes a token (4 above 65,536 ids), and what kept checkpoints need."""
    prefetch: Count = 2
    """Source buffer: batches whose rows are read ahead."""
    policy: Literal["uniform", "equal", "weights"] = "uniform"
    """uniform: each fresh sample that was consumed before is equally likely. equal: each task in
    the pool gets the same share of the replayed rows; weights: the share that `weights` gives it.
    Both are exact to within two rows, and inside a task each sample is equally likely. From a
    buffer both need a capacity for each task."""
    weights: dict[Text, NotNegative] | None = None
    """Share of each task of the stream among the replayed rows, {task: number}, with policy weights
    only. It is relative to the tasks in the pool at that moment; 0: never replayed."""
    include_current_task: Flag = False
    """Replay earlier samples of the current task too, as the paper does; else past tasks only."""


@dataclass(frozen=True, kw_only=True)
class ReptileConfig:
    """Reptile: every k steps the weights become anchor + epsilon * (weights - anchor)."""

    k: Count
    """Optimizer steps between two Reptile updates (paper: 500)."""
    epsilon: Share
    """Share of the way from the anchor that is kept: 1 changes nothing, 0 undoes the window."""
    momentum: ShareBelowOne = 0.0
    """Momentum of the outer step; 0 is plain Reptile."""
    nesterov: Flag = False
    """Nesterov's form of the momentum; needs momentum > 0."""
    anchor: Literal["device", "host"] = "device"
    """Where the anchor and what else Reptile keeps lie: on the GPU, or in the host's memory
    (page-locked), from where each update reads them and writes them back."""
    track_cosine: Flag = True
    """Log the cosine between consecutive deltas; without momentum it keeps one more bf16 copy."""


@dataclass(frozen=True, kw_only=True)
class BoundsConfig:
    """A bound on forgetting, looked at after each evaluation."""

    max_forgetting: NotNegative
    """Nats a token by which a held-out set of a task that is not in training may be above its best
    loss at the ends of entries since its task was first trained."""
    action: Literal["warn", "stop"] = "warn"
    """warn: a line in the log; stop: save a checkpoint and end the run with status stopped. A
    stopped run that is started again goes on to the next evaluation."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation of all held-out sets: always before the first step and at the end of each task."""

    every_steps: Count | None = None
    """Evaluate every so many steps as well; such results draw curves and enter no summary."""
    max_batches: Count | None = None
    """Read at most so many global batches of each set; default: all of it, once."""
    max_samples: Count | None = None
    """Read at most so many samples of each set, too: unlike max_batches the same ones for runs with
    other global batch sizes."""
    bounds: BoundsConfig | None = None
    """Leave out: forgetting is measured, and nothing follows from it."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What a line of metrics.jsonl holds beside what is always there."""

    by_dataset_every_steps: Count | None = 10
    """Loss by dataset every so many steps; null: never. With a thousand datasets it is most of a
    line."""
    peak_tflops: Positive | None = None
    """Dense peak of one device in TFLOP/s, for the utilisation (mfu); default: that of a GPU whose
    name is known, in bf16, else no mfu."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: always at the end of each task."""

    every_steps: Count | None = None
    """Save every so many steps as well."""
    keep_last: Count = 2
    """How many of the newest checkpoints stay; those at ends of tasks stay besides, always."""
    keep_every: Count | None = None
    """Those at every so many steps stay too, of the ones that are written."""
    copy_to: Text | None = None
    """A directory outside of output_dir, or a URL for fsspec (s3://bucket/run): each checkpoint is
    copied there in the background, verified; what failed is tried again. The same ones stay there
    as here (keep_last, keep_every, ends of tasks); there, as here, one more needs room meanwhile. A
    start that finds a newer checkpoint there than in output_dir brings it back. One run a place."""
    init_from: Text | None = None
    """RUN@STEP, a checkpoint of another run whose weights this one starts from; its step, learning
    rate and stream begin anew."""
    init_weights: Literal["fast", "anchor", "fast_and_moments"] = "fast"
    """What is taken of it: the weights, Reptile's anchor, or the weights with Adam's moments."""
    init_stream: Literal["ledger", "none"] = "ledger"
    """ledger: what that run was trained on stands before the stream as trained_before entries,
    unless the stream has such entries; none: it does not."""
    export_hf: Flag = False
    """At each task's end write the fast weights for Hugging Face as well, into output_dir/hf, in
    the background."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases: gets metrics, name and configuration, nothing of machine or environment."""

    project: Text
    """Project there."""
    entity: Text | None = None
    """User or team; default: the account's own."""
    group: Text | None = None
    """Group of runs, such as the seeds of one setting."""
    tags: tuple[Text, ...] = ()
    """Tags of the run."""
    mode: Literal["online", "offline"] = "online"
    """offline: into output_dir/wandb without a network, for `wandb sync` later."""


@dataclass(frozen=True, kw_only=True)
class TensorboardConfig:
    """TensorBoard's event files, from rank 0."""

    dir: Text | None = None
    """Folder of the event files; default: output_dir/tensorboard."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How long a start waits for its ranks, and how it ends before a cluster ends it."""

    setup_timeout_seconds: Positive = 1800.0
    """Seconds that a rank waits for the others, until the first step has ended: at the start, while
    loading, in the evaluation before the first step. At the end of the run it holds again."""
    step_timeout_seconds: Positive = 600.0
    """Seconds that a rank waits for the others in each collective of training after that; the
    slowest rank's part of a checkpoint counts too."""
    watchdog_seconds: Positive | None = 900.0
    """After so many seconds without a step, a held-out micro batch or a piece of a checkpoint each
    rank prints its stacks and the run ends, failed. Before the first step has ended the time is at
    least setup_timeout_seconds. null: never."""
    end_margin_seconds: NotNegative = 30.0
    """The end of the job (SLURM_JOB_END_TIME) is met with a checkpoint so many seconds earlier than
    that takes, by what steps, evaluations and checkpoints of this start took."""
    max_restarts_without_step: CountOrZero = 3
    """A job whose start failed or was killed is queued again at most so often in a row if no step
    was gained."""
    preflight: PreflightConfig | None = None
    """Leave out: nodes are not checked."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run."""

    name: Text
    """Name of the run, for people and for metric services."""
    seed: CountOrZero
    """Key of everything random: initial weights, order of the data, replay."""
    precision: Literal["bf16", "fp32"]
    """bf16: computes in bfloat16 with fp32 master weights and gradient sums; fp32: throughout."""
    model: ModelConfig
    tokenizer: Text
    """KIND:PATH, the tokenizer that the datasets were written with; KIND: sentencepiece, hf (a
    tokenizer.json; hf:PATH#TOKEN names the token that ends documents) or tiktoken (a file of ranks
    such as Llama-3's tokenizer.model; tiktoken:PATH#SCHEME says how text is split)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stream: tuple[TaskConfig, ...]
    """The tasks, in their order."""
    replay: ReplayConfig | None = None
    """Leave out: no replay."""
    reptile: ReptileConfig | None = None
    """Leave out: no Reptile."""
    evaluate: EvaluateConfig | None = None
    """Leave out: the held-out sets are read whole, before the first step and at each task's end."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    wandb: WandbConfig | None = None
    """Leave out: nothing goes to Weights & Biases."""
    tensorboard: TensorboardConfig | None = None
    """Leave out: no event files."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    output_dir: Text
    """Folder of all that the run leaves behind; a relative one starts at the working directory."""
