"""The settings of a run, section by section; LLaVA's own names wherever LLaVA has one."""

import re
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llava_ray.config.geometry import GeometrySettings
from llava_ray.config.grpo import GrpoConfig, check_grpo
from llava_ray.config.lora import LoraConfig
from llava_ray.config.mixtures import SourceConfig, check_run_sources, check_sources, held_out_paths
from llava_ray.config.preference import PairObjectiveName, RecordKind, WithPreferences
from llava_ray.config.schema import ConfigSection
from llava_ray.config.selection import check_selection

Fraction = Annotated[float, Field(ge=0, le=1)]
MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own bomb limit
# Settings that may be "auto" and are decided as a run begins.
AUTOMATIC_SETTINGS = ("train.bf16", "train.tokens_per_micro_batch")
# Settings that name a model or a part of one: a folder, a file or a hub id.
MODEL_PATHS = ("model.model_name_or_path", "model.model_base", "model.vision_tower", "model.pretrain_mm_mlp_adapter")


class _ModelSources(ConfigSection):
    """Where a model's parts are from."""

    model_name_or_path: str
    """The language model (hub id or folder), or a LLaVA to start from: a llava_ray bundle or any published layout."""
    model_base: str | None = None
    """Language model under an adapter or a projector-only folder that does not name it, or that has moved."""
    vision_tower: str | None = None
    """CLIP, SigLIP, SigLIP 2 or DINOv2 (hub id or folder). A bundle includes its own."""
    version: str = "v1"
    """Conversation template by LLaVA's name, or "chat_template" for the tokenizer's own."""


class ModelConfig(GeometrySettings, _ModelSources):
    """Which parts make the model, and which of them learn."""

    unfreeze_mm_vision_tower: bool = False
    """Train the tower too."""
    pretrain_mm_mlp_adapter: str | None = None
    """Projector to start from: a bundle, or LLaVA's mm_projector.bin."""
    tune_mm_mlp_adapter: bool = False
    """Train the projector only (alignment, stage 1)."""
    freeze_backbone: bool = False
    """Freeze the language model, its head included."""
    freeze_mm_mlp_adapter: bool = False
    """Freeze the projector."""
    freeze_embeddings: bool = False
    """Freeze the token embeddings (and the head where it is tied to them)."""
    attn_implementation: Literal["sdpa", "masked_sdpa", "eager"] = "sdpa"
    """Attention of the language model in training: "sdpa" computes each sample of a packed row by itself (on recent
    GPUs in bf16 with Flash Attention), "masked_sdpa" the whole row under a mask, "eager" so too, without SDPA."""

    @field_validator("attn_implementation", mode="before")
    @classmethod
    def attention_exists(cls, value: object) -> object:
        """Reject former values with what to set for them."""
        if value in ("flash_attention_2", "flex_attention"):
            raise ValueError(
                'no longer supported; set attn_implementation = "sdpa", which attends within each sample of a row and '
                "uses Flash Attention on GPUs that have it"
            )
        return value

    @model_validator(mode="after")
    def something_learns(self) -> Self:
        """Reject freezing switches that leave nothing to train or contradict each other."""
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ValueError("tune_mm_mlp_adapter and freeze_mm_mlp_adapter contradict each other: drop one")
        if self.tune_mm_mlp_adapter and self.unfreeze_mm_vision_tower:
            raise ValueError(
                "tune_mm_mlp_adapter (the projector only) and unfreeze_mm_vision_tower contradict each other: drop "
                "one; freeze_backbone = true learns tower and projector"
            )
        if self.freeze_backbone and self.freeze_mm_mlp_adapter and not self.unfreeze_mm_vision_tower:
            raise ValueError("freeze_backbone with freeze_mm_mlp_adapter leaves nothing to learn: drop one")
        return self


class DataConfig(ConfigSection):
    """The samples, and how they reach the model."""

    data_path: str = ""
    """LLaVA JSON or JSONL, Parquet, WebDataset tars, or a prepared folder; local or any fsspec URL. Required without
    data.sources."""
    sources: tuple[SourceConfig, ...] = ()
    """Instead of data_path, several sources with their shares of an epoch: [[data.sources]] tables of a recipe (keys
    below), or a JSON list of them."""
    epoch_samples: PositiveInt | None = None
    """Samples of an epoch of data.sources with weights; default: the most with which none of these is drawn more than
    once."""
    image_folder: str | None = None
    """Folder of relative image paths; default: the folder of the data."""
    kind: RecordKind = "auto"
    """What the records are: conversations to learn, or preferences (a question with a chosen and a rejected answer).
    "auto" follows train.objective."""
    cache_dir: str = "runs/cache"
    """Folder of prepared shards and token lengths, keyed by content: written once, shared by all runs."""
    image_aspect_ratio: Literal["square", "pad", "anyres"] = "square"
    """"square" is the tower's own resize and centre crop, "pad" first makes the image square, "anyres" cuts it into
    several views (model.image_grid_pinpoints, model.mm_patch_merge_type)."""
    on_too_long: Literal["truncate", "split", "reject"] = "truncate"
    """A sample over train.model_max_length is truncated (never inside an image), split at a turn, or rejected. One
    with an image that alone is longer is always rejected."""
    max_rejected: Fraction = 0.01
    """Share of rows that may be rejected before the run stops."""
    max_image_pixels: PositiveInt = MAX_IMAGE_PIXELS
    """Larger images are rejected by their header, before decoding (default: Pillow's own bomb limit)."""
    max_samples: PositiveInt | None = None
    """Use only the first so many records: for trying things out."""
    samples_per_shard: PositiveInt = 2048
    """Maximum samples in a shard."""
    shard_size_mb: PositiveInt = 64
    """Maximum MB of images in a shard."""
    shuffle_window: NonNegativeInt = 4
    """Shards whose samples are shuffled together; each shard is read once an epoch. 0 keeps the order of the file, for
    a curriculum."""
    vision_features: Literal["inline", "streamed", "cached"] = "inline"
    """Run the frozen tower in the train worker, stream its features from an actor pool, or compute them once and store
    them in data.cache_dir for every run with the same data and tower."""
    num_vision_actors: PositiveInt = 1
    """Size of that pool; each actor uses a GPU where the cluster has them."""
    feature_cache_gb: PositiveFloat = 100.0
    """Maximum GB of all cached features: more is rejected before anything is written, and the least recently
    used entries are deleted to make room."""
    num_decode_cpus: PositiveFloat = 0.5
    """CPUs that one image decoder reserves."""
    num_decoders: PositiveInt | None = None
    """Maximum decoders, started on demand. Default: as many as fit on half of the CPUs available
    for decoding when the run starts."""
    lazy_preprocess: bool | None = None
    """LLaVA's flag; not needed: nothing is preprocessed ahead."""

    @property
    def kind_of_records(self) -> Literal["instruction", "preferences"]:
        """Return what the records are; "auto" has been decided where a run's objective is known."""
        return "instruction" if self.kind == "auto" else self.kind

    @model_validator(mode="after")
    def data_are_named(self) -> Self:
        """Reject no data, and sources that contradict each other."""
        if not self.data_path and not self.sources:
            raise PydanticCustomError("missing", "Field required", {"key": "data_path"})
        if self.sources:
            check_sources(self)
        elif self.epoch_samples is not None:
            raise ValueError("epoch_samples has no effect without data.sources: leave it out")
        return self


class TrainConfig(ConfigSection):
    """Optimisation of the parameters."""

    objective: Literal["cross_entropy", "grpo"] | PairObjectiveName = "cross_entropy"
    """The loss: "cross_entropy" of the records' answers; from pairs of answers ([preference], docs/preferences.md)
    "dpo", "ipo", "hinge", "robust", "dpo_norm" (averages over tokens), "simpo", "orpo"; or "grpo" ([grpo]), which
    samples answers and learns from their rewards."""
    num_train_epochs: PositiveInt = 1
    """Passes over the data."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps; the learning-rate schedule ends there too."""
    global_batch_size: PositiveInt = 128
    """Samples in a step over all workers (LLaVA: per-device batch x devices x accumulation)."""
    model_max_length: PositiveInt = 2048
    """Longest sample in tokens, image tokens included."""
    tokens_per_micro_batch: PositiveInt | Literal["auto"] | None = None
    """Tokens in a packed row; default model_max_length. "auto" is the longest, up to 16,384, that the workers' GPUs are
    estimated to have memory for: long rows save GPUs from waiting for one another."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate."""
    mm_projector_lr: PositiveFloat | None = None
    """Peak learning rate of the projector; default learning_rate."""
    mm_vision_tower_lr: PositiveFloat | None = None
    """Peak learning rate of the tower (model.unfreeze_mm_vision_tower); default learning_rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay, of matrices only: biases and norms never decay."""
    adam_beta1: Fraction = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps with linear warm-up of the learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    """Shape of the learning-rate schedule after the warm-up; "warmup_stable_decay" holds the rate, and lets it fall to
    zero over the last three tenths of the steps."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    bf16: bool | Literal["auto"] = True
    """Compute in bfloat16 with fp32 master weights; "auto" does so where the workers' GPUs have it or their processor
    multiplies it faster, which is measured."""
    tf32: bool = True
    """Allow TensorFloat-32 on NVIDIA GPUs."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    use_liger_kernel: bool | Literal["auto"] = "auto"
    """Compute norms, rotary embeddings and gated MLPs of the language model with Liger's kernels; "auto" does so on
    NVIDIA GPUs where liger-kernel is installed (extra gpu). May be changed when a run is resumed."""
    torch_compile: bool = False
    """Compile the language model's blocks (torch.compile). It takes minutes at every start, so measure whether it pays;
    not with gradient_checkpointing or zero_stage = 3. May be changed when a run is resumed."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: partitions 1 optimiser states, 2 + gradients, 3 + parameters."""
    offload_optimizer: bool = False
    """Offload the optimiser states to CPU memory (ZeRO 1-3 on GPUs)."""
    seed: NonNegativeInt = 42
    """Seed of the sample order, of new parameters and of dropout."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss is not finite stops the run, or is skipped: weights and optimiser stay as they are. Ten such
    steps in a row stop the run all the same. May be changed when a run is resumed."""
    fetch_loss_steps: PositiveInt | Literal["auto"] = "auto"
    """Steps between two looks at the losses, for which the host of a GPU waits until all steps are computed: so much
    later a loss that is not finite, or Ctrl-C, ends the run. "auto" is 10 on GPUs, 1 on CPUs; 1 with
    on_nonfinite = "skip". A checkpoint looks first."""
    save_steps: PositiveInt = 500
    """Steps between resumable checkpoints; one is also saved at the end."""
    save_total_limit: PositiveInt = 1
    """Number of checkpoints to keep."""
    group_by_modality_length: bool | None = None
    """LLaVA's flag; not needed: packing leaves no padding to save."""

    @property
    def uses_bf16(self) -> bool:
        """Return whether to compute in bfloat16; "auto" has been decided before anything asks."""
        return self.bf16 is True

    @property
    def row_length(self) -> int:
        """Return the tokens in a packed row."""
        length = self.tokens_per_micro_batch
        return length if isinstance(length, int) else self.model_max_length

    @model_validator(mode="after")
    def whole_blocks_are_compiled(self) -> Self:
        """Reject compiling where torch cannot: within checkpoints, and weights that ZeRO 3 gathers."""
        if self.torch_compile and self.gradient_checkpointing:
            raise ValueError(
                "torch_compile = true with gradient_checkpointing = true: torch compiles nothing inside a checkpoint; "
                "set one of them to false"
            )
        if self.torch_compile and self.zero_stage == 3:
            raise ValueError(
                "torch_compile = true with zero_stage = 3: the compiler cannot look through weights that are gathered "
                "layer by layer; set zero_stage = 2 or torch_compile = false"
            )
        return self

    @model_validator(mode="after")
    def rows_hold_samples(self) -> Self:
        """Reject rows shorter than the longest sample."""
        if self.row_length < self.model_max_length:
            raise ValueError(
                f"tokens_per_micro_batch = {self.row_length} is below model_max_length = {self.model_max_length}: "
                "a sample must fit into one row; raise the first or lower the second"
            )
        return self


class HeldOutConfig(ConfigSection):
    """Held-out data, evaluated whenever a run saves and never trained on."""

    path: str | None = None
    """Held-out samples, in any form that data.data_path accepts; None evaluates nothing."""
    kind: RecordKind = "auto"
    """What they are (see data.kind); "auto": as data.kind. A run over pairs may be evaluated on conversations."""
    images: str | None = None
    """Folder of their relative image paths; default: data.image_folder."""
    num_samples: PositiveInt = 512
    """Use only the first so many records for the loss; all of a prepared folder."""
    num_answers: NonNegativeInt = 128
    """Generate answers to the first so many of them; one is correct if it equals the record's, ignoring case."""
    max_new_tokens: PositiveInt = 16
    """Maximum length of an answer in tokens."""
    metric: str = "held_out_loss"
    """Score of an evaluation for early_stopping_patience and keep_best: held_out_loss, held_out_accuracy, one of a
    source (held_out_loss/NAME) or of the objective. Lower is better for a loss or kl, higher for an accuracy, margin or
    reward."""
    early_stopping_patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a better score; None never does."""
    early_stopping_min_delta: NonNegativeFloat = 0.0
    """A score counts as better for early stopping only if it is by more than this."""
    keep_best: bool = False
    """Write the final model from the checkpoint with the best score, not from the last one."""

    @property
    def selects(self) -> bool:
        """Return whether scores decide where the run ends, or which checkpoint becomes its model."""
        return self.keep_best or self.early_stopping_patience is not None


class RunConfig(ConfigSection):
    """A run's name and storage, and its tolerance of failures."""

    name: str | None = None
    """Default: <recipe>-<8 hex digits of the settings, the models' fingerprints and the data>. The same name resumes
    where the run stopped."""
    storage_path: str = "runs"
    """Folder or URL shared by all nodes; the run's folder is created in it."""
    restart: bool = False
    """Start over under a name that is already used with other settings; the old folder is renamed."""
    max_failures: int = Field(default=3, ge=-1)
    """Worker failures tolerated before the run fails; -1 for any number."""
    hang_minutes: NonNegativeFloat = 3.0
    """Minutes without progress of any worker after which their stacks are printed and they are replaced, which counts
    as a failure; half as long where one does not answer, eight times as long while loading and saving, and never less
    than ten steps. 0 waits for ever."""

    @field_validator("name")
    @classmethod
    def plain_name(cls, value: str | None) -> str | None:
        """Reject names that cannot be one folder."""
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("a run name is one folder: letters, digits, dot, dash and underscore")
        return value


class TrackingConfig(ConfigSection):
    """Tracking of a run."""

    report_to: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = ("mlflow",)
    """Where a training run's metrics go: MLflow always, and beside it wandb (experiment_name is its project; extra
    wandb) and tensorboard (event files in the run's folder; extra tensorboard)."""
    tracking_uri: str | None = None
    """Any MLflow tracking URI; default: SQLite in run.storage_path."""
    experiment_name: str = "llava_ray"
    """MLflow experiment."""
    log_model: bool = True
    """Log the final bundle as an MLflow artifact."""
    logging_steps: PositiveInt = 1
    """Steps between logged metrics."""
    parent_run_id: str | None = None
    """MLflow run under which this one is shown, such as a sweep's."""


def check_mlflow_alone(tracking: TrackingConfig) -> None:
    """Reject trackers that only training runs write to."""
    others = [name for name in tracking.report_to if name != "mlflow"]
    if others:
        raise ValueError(
            f"tracking.report_to names {others[0]!r}, which only training runs write to; leave it out: results are in "
            "MLflow"
        )


class ClusterConfig(ConfigSection):
    """The resources that a run takes of the cluster."""

    address: str | None = None
    """Ray address, "auto" for the one on this machine; default: the job's own, RAY_ADDRESS, or a new local one."""
    num_workers: PositiveInt = 2
    """Train workers (data-parallel ranks)."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; "auto" uses GPUs when the cluster has enough."""
    cpus_per_worker: PositiveFloat | Literal["auto"] = "auto"
    """CPUs a worker reserves and computes with; "auto" is one, or less on a cluster too small to leave the data stream
    any. On a cluster that the run starts itself, workers without a GPU then compute with all cores, shared out."""
    gpus_per_worker: PositiveFloat = 1.0
    """GPUs a worker reserves; less than one lets the single workers of several runs share a GPU."""
    accelerator_type: str | None = None
    """Ray's name of the GPU to use, e.g. "A100-80G"."""

    @model_validator(mode="after")
    def shares_are_of_one_worker(self) -> Self:
        """Reject two ranks of one run on one GPU, which NCCL cannot do, and several GPUs per worker."""
        if self.gpus_per_worker > 1 or (self.gpus_per_worker < 1 and self.num_workers > 1):
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g} with num_workers = {self.num_workers}: a worker drives "
                "one GPU, and only a run of one worker can share it; set gpus_per_worker = 1 or num_workers = 1"
            )
        return self


class FinetuneConfig(WithPreferences):
    """All settings of a fine-tuning run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    grpo: GrpoConfig = GrpoConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def sources_fit(self) -> Self:
        """Reject sources that do not fit the run, and scores of held-out samples that nobody evaluates."""
        check_run_sources(self)
        check_selection(self)
        return self

    @property
    def evaluates(self) -> bool:
        """Return whether there are held-out samples, of the run or of a source."""
        return bool(self.held_out.path or held_out_paths(self.data))

    @model_validator(mode="after")
    def answers_need_whole_weights(self) -> Self:
        """Reject held-out answers where no worker has the whole model."""
        if self.evaluates and self.held_out.num_answers and self.train.zero_stage == 3:
            raise ValueError(
                "held_out.num_answers needs the whole model in each worker, which train.zero_stage = 3 takes apart: "
                "set held_out.num_answers = 0 (the held-out loss stays), or train.zero_stage = 2"
            )
        return self

    @model_validator(mode="after")
    def rollouts_fit(self) -> Self:
        """Reject what does not fit an objective of sampled answers."""
        check_grpo(self)
        return self

    @model_validator(mode="after")
    def offload_needs_zero(self) -> Self:
        """Reject an offload that DeepSpeed would ignore."""
        if self.train.offload_optimizer and self.train.zero_stage == 0:
            raise ValueError("train.offload_optimizer needs train.zero_stage 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def adapter_fits(self) -> Self:
        """Reject an adapter of which nothing would be trained, and a quantised base that cannot be trained."""
        still = [key for key in ("tune_mm_mlp_adapter", "freeze_backbone") if getattr(self.model, key)]
        if self.lora.lora_enable and still:
            raise ValueError(
                f"lora.lora_enable with model.{still[0]} contradict each other: drop one (with an adapter the language "
                "model's own weights never learn)"
            )
        if self.lora.bits < 16 and not (self.lora.lora_enable or still):
            raise ValueError(
                f"lora.bits = {self.lora.bits}: quantised weights cannot learn; set lora.lora_enable = true (QLoRA) or "
                "lora.bits = 16"
            )
        if self.lora.bits < 16 and self.train.zero_stage == 3:
            raise ValueError(
                f"lora.bits = {self.lora.bits} with train.zero_stage = 3: ZeRO 3 cannot partition quantised weights; "
                "set train.zero_stage = 2 (each worker then holds the quantised base), or lora.bits = 16"
            )
        return self

    @model_validator(mode="after")
    def tower_learns_in_the_workers(self) -> Self:
        """Reject a trainable tower outside the train workers, and a learning rate for a frozen one."""
        if self.model.unfreeze_mm_vision_tower and self.data.vision_features != "inline":
            raise ValueError(
                f"data.vision_features = {self.data.vision_features!r} takes features from a frozen tower, but "
                "model.unfreeze_mm_vision_tower lets it learn: set 'inline'"
            )
        if self.train.mm_vision_tower_lr is not None and not self.model.unfreeze_mm_vision_tower:
            raise ValueError("train.mm_vision_tower_lr has no effect without model.unfreeze_mm_vision_tower = true")
        return self

    @model_validator(mode="after")
    def canvases_are_used(self) -> Self:
        """Reject canvases without anyres."""
        if self.model.image_grid_pinpoints is not None and self.data.image_aspect_ratio != "anyres":
            raise ValueError("model.image_grid_pinpoints has no effect without data.image_aspect_ratio = 'anyres'")
        return self


class PrepareConfig(ConfigSection):
    """All settings of a data preparation."""

    data: DataConfig
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()


class AskConfig(ConfigSection):
    """The model and the benchmarks of an evaluation, and how answers are generated."""

    model_path: str
    """A model of any layout: bundle, original, llava-hf, adapter."""
    model_base: str | None = None
    """Language model under an adapter that does not name it, or that has moved."""
    vision_tower: str | None = None
    """Folder of the vision tower, for layouts that only name it."""
    version: str | None = None
    """Conversation template by LLaVA's name, for layouts that do not record it."""
    benchmarks: tuple[str, ...]
    """Each NAME=FOLDER: a benchmark and its official files (evals/README.md). All are answered in one job."""
    max_questions: PositiveInt | None = None
    """Answer only the first so many questions of each benchmark, for a trial run."""
    max_new_tokens: PositiveInt | None = None
    """Maximum length of an answer in tokens; default: LLaVA's own for each benchmark (128 or 1024)."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy, as in all published tables."""
    batch_size: PositiveInt = 16
    """Questions that an actor answers in one batch."""
    ranking: Literal["letter", "text"] | None = None
    """Instead of generating, choose the option whose letter or text is likeliest (the mean over its tokens, the end
    token included): letters alone misjudge weak models. Questions without options are answered as usual."""

    @field_validator("benchmarks")
    @classmethod
    def names_and_folders(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Reject an empty list, a benchmark without a folder, and duplicates."""
        names = [entry.partition("=")[0] for entry in value]
        if not value or not all(name and folder for name, _, folder in (entry.partition("=") for entry in value)):
            raise ValueError("expected NAME=FOLDER for at least one benchmark, such as gqa=data/gqa")
        if len(set(names)) != len(names):
            raise ValueError("a benchmark is there twice; give each one folder")
        return value


class ScoreConfig(ConfigSection):
    """Scoring of answers; it may change between runs without answering again."""

    profile: Literal["llava", "official", "robust"] = "robust"
    """The matching rule: that of LLaVA's tables, the benchmark authors', or ours, which never guesses."""
    reviews: tuple[str, ...] = ()
    """Each NAME=FILE: a judge's replies, for benchmarks that need a judge; without them, they are only answered."""


class ActorsConfig(ConfigSection):
    """The actors that answer."""

    num_actors: PositiveInt | None = None
    """Copies of the model; default: one per GPU of the cluster, or as many as fit its CPUs."""
    cpus_per_actor: PositiveFloat | Literal["auto"] = "auto"
    """CPUs that each reserves and computes with; "auto" is one, or on one machine its share if num_actors is given."""


class EvaluateConfig(ConfigSection):
    """All settings of an evaluation."""

    evaluate: AskConfig
    score: ScoreConfig = ScoreConfig()
    actors: ActorsConfig = ActorsConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig(num_workers=1)

    @model_validator(mode="after")
    def results_go_to_mlflow(self) -> Self:
        """Reject trackers that nothing would be written to."""
        check_mlflow_alone(self.tracking)
        return self
