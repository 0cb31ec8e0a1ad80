"""Models of the student and of the base teacher (``actor_rollout_ref.model``, ``ref.model``), and their sharding."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from verl.config.schema import Count, IsListed, Options, Texts, TextsOrNull, UserPath, changed, section

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@section("actor_rollout_ref.model")
class HFModelConfig:
    """A causal language model in Hugging Face format."""

    path: UserPath | None = None
    """Folder (or hub name) of the weights, the config and the tokenizer. Required."""
    tokenizer_path: UserPath | None = None
    """Folder of the tokenizer where it is not ``path``."""
    trust_remote_code: bool = False
    """Run model code that ships with the weights."""
    use_remove_padding: bool = True
    """Compute no padding: rows are packed where the attention implementation can keep them apart,
    else cut to the longest of each micro-batch."""
    enable_gradient_checkpointing: bool = True
    """Recompute each block in backward instead of keeping its activations."""
    enable_activation_offload: bool = False
    """Keep the activations that backward needs in host memory (CUDA only); needs the setting above."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of an adapter (LoRA) that is trained in place of the weights, which stay as they are; 0: none, all weights
    are trained."""
    lora_alpha: Count = 16
    """What the adapter adds counts ``lora_alpha / lora_rank`` times."""
    target_modules: Texts = field(default_factory=lambda: ["all-linear"])
    """Linear layers with an adapter, by the ends of their names, such as ``[q_proj,v_proj]``; ``all-linear``: all but
    the head."""
    lora_extended_rows: bool = False
    """Train the rows of extended ids in embedding and head beside the adapter; else no row is trained."""
    override_config: Options = field(default_factory=dict)
    """Entries laid over the model's own config, such as ``attn_implementation``."""
    external_lib: Annotated[list[str], IsListed] | None = None
    """Modules or Python files of the user's own, imported by the driver before it checks the settings and by every
    process of the run: what they register (estimators, agent loops, models of transformers) can then be named."""

    def __post_init__(self) -> None:
        for name, (value, default) in changed(self, "lora_alpha", "target_modules", "lora_extended_rows").items():
            if not self.lora_rank:
                what = f"actor_rollout_ref.model.{name}={value} has no effect with lora_rank=0: all weights are trained"
                raise ValueError(f"{what}; set a rank, or leave it at {default}")
        if self.enable_activation_offload and not self.enable_gradient_checkpointing:
            what = "actor_rollout_ref.model.enable_activation_offload=True"
            raise ValueError(f"{what} needs actor_rollout_ref.model.enable_gradient_checkpointing=True")

    @property
    def config_entries(self) -> dict[str, Any]:
        """``override_config`` without the attention, which is that of training alone: engines choose their own."""
        return {name: value for name, value in self.override_config.items() if name != "attn_implementation"}


@section(kw_only=True)
class AnyTeacherConfig:
    """Where any teacher is, and what it reads of a prompt."""

    url: TextsOrNull = field(default_factory=list)
    """vLLM servers of it, which share its rows; empty: it is a model of this run."""
    api_key_env: str | None = None
    """Environment variable that holds the servers' key; null: they want none."""
    engine: Literal["vllm"] | None = None
    """``vllm``: the run serves its model itself, in place of ``url``."""
    engine_kwargs: Options = field(default_factory=dict)
    """Options of these servers, as vLLM names them: ``engine_kwargs.tensor_parallel_size=4``."""
    system_prompt: str | None = None
    """System message that it reads in place of the prompt's own, if any, and the student does not; null: it reads what
    the student reads."""
    system_prompt_column: str | None = None
    """Column of the data with such a message for each row; a row without one it reads as the student does."""
    item_text: str | None = None
    """Catalogue (parquet, columns ``sid``, a list of codes, and ``text``): of items in a prompt it reads these texts;
    null: it reads what the student reads."""

    @property
    def own_prompt(self) -> list[str]:
        """The settings by which it reads another prompt than the student."""
        return list(changed(self, "system_prompt", "system_prompt_column", "item_text"))


@section("actor_rollout_ref.ref.model")
class RefModelConfig:
    """The teacher's model; everything but these keys is taken from ``actor_rollout_ref.model``."""

    path: UserPath | None = None
    """Folder (or hub name) of the teacher; null: the student's own starting weights."""
    tokenizer_path: UserPath | None = None
    """Folder of the teacher's tokenizer where it is not ``path``."""


@section()
class MixedPrecisionConfig:
    """Precision of FSDP2 compute and gradient reduction."""

    param_dtype: Precision = "auto"
    """Precision of the forward and backward pass; ``auto``: the actor's, and for that bf16 on CUDA, fp32 on CPU. The
    actor's decides for teachers and engine too, as far as theirs are ``auto``."""
    reduce_dtype: Precision = "fp32"
    """Precision in which gradients are reduced over ranks."""


@section()
class FSDPConfig:
    """Sharding of one model over the training ranks with FSDP2."""

    param_offload: bool = False
    """Keep the parameters in host memory while the model is idle (CUDA only)."""
    optimizer_offload: bool = False
    """Keep the optimizer state in host memory between updates (CUDA only)."""
    reshard_after_forward: bool = True
    """Free gathered parameters after each block's forward pass: less memory, one more gather in backward."""
    fsdp_size: int = -1
    """Ranks that share a copy of the model, such as those of a node; copies exchange gradients alone. -1: all ranks."""
    model_dtype: Precision = "auto"
    """Precision of the stored parameters; ``auto``: fp32 for a trained model, that of compute for a frozen one."""
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
