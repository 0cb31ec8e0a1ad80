"""What can be wrong with a run outside its configuration, found before Ray starts.

In: a ``PPOConfig``, whose sections have checked themselves. Out: errors, all at once, or notices. ``check_run`` looks
at folders, ``config.json`` and installed packages, ``check_ranks`` and ``prepare_folders`` at this machine. Not here:
the vocabularies (``vocabulary_check``), other machines (``single_controller.ray.node_check``), and files that are read
before Ray starts and name their key then: rows, rewards, tools, checkpoints.
"""

import configparser
import importlib.util
import json
import netrc
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from urllib.parse import urlsplit

from verl.config import BASE_TEACHER, PPOConfig, RolloutConfig, TrainerConfig
from verl.config.ppo import teacher_key
from verl.trainer.checkpoint.layout import UNMERGED, VERL_SHARDS
from verl.utils.broken_files import describe_damage, is_pointer
from verl.utils.loopback import joins_cluster
from verl.utils.tokenizer import local_model_folder, position_limit

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


def check_run(config: PPOConfig) -> list[str]:
    """Look for user errors; starts and makes nothing.

    Returns:
        Notices, a line each, for the caller to log.

    Raises:
        ValueError: what has to change before the run can start, a line each with key, value and fix.
    """
    errors = [
        *_model_errors(config),
        *_algorithm_errors(config),
        *_data_errors(config),
        *_package_errors(config),
        *_output_errors(config),
    ]
    if errors:
        raise ValueError("\n".join(errors))
    return [*_update_notices(config), *_notices(config)]


def check_ranks(config: PPOConfig, device_name: str) -> None:
    """Check that the GPUs can do what the run asks; where the run starts its own Ray, also that this machine holds all
    ranks and its GPUs hold the models. On a cluster Ray checks the ranks.

    Raises:
        ValueError: one of these checks fails.
    """
    # torch and Ray come with them, which --help has to do without.
    import torch

    from verl.single_controller.ray.resource_pool import check_capacity
    from verl.trainer.launch.plan import check_fits
    from verl.trainer.ppo.worker_groups import WorkerGroups

    check_device(config, device_name)
    ray_init = config.ray_kwargs.ray_init
    if joins_cluster(ray_init):
        return
    pools = list(WorkerGroups(config, ["actor", *config.algorithm.distill.roles]).pools.values())
    for pool in pools:
        pool.use_gpu = device_name == "cuda"
    cores = ray_init.get("num_cpus") or len(os.sched_getaffinity(0))
    resources = {"CPU": cores, "GPU": torch.cuda.device_count()}
    check_capacity(pools, [{"Alive": True, "NodeManagerAddress": "127.0.0.1, this machine", "Resources": resources}])
    if device_name == "cuda":
        check_fits(config)


def check_device(config: PPOConfig, device_name: str) -> None:
    """Raise ValueError for settings that need more GPUs on ``cuda``; ``device_name`` may be the cluster's, not ours."""
    if device_name == "cuda" and config.engine_roles and not config.trainer.teacher_ranks_on_nodes:
        key = f"{teacher_key(config.engine_roles[0])}.engine=vllm"
        gpus = "trainer.teacher_nnodes and trainer.teacher_n_gpus_per_node"
        raise ValueError(f"{key} serves a teacher on GPUs of its own; set {gpus}")
    run, frees = config.trainer, config.actor_rollout_ref.rollout.free_cache_engine
    if device_name == "cuda" and run.max_staleness and frees and not run.rollout_gpus_on_nodes:
        raise ValueError(
            f"trainer.max_staleness={run.max_staleness} generates while the update runs, and actor_rollout_ref.rollout."
            "free_cache_engine=True frees the engine's memory then; set it to False, or give engines GPUs of their own "
            "(trainer.rollout_nnodes, trainer.rollout_n_gpus_per_node)"
        )


def prepare_folders(trainer: TrainerConfig) -> None:
    """Create the folders that a run writes to.

    Raises:
        ValueError: one of them cannot be written.
    """
    for name in ("default_local_dir", "rollout_data_dir", "validation_data_dir", "ray_timeline_dir"):
        folder = getattr(trainer, name)
        if folder is None:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            with TemporaryFile(dir=folder):  # the one way to know: root passes every check of permissions
                pass
        except OSError as error:
            raise ValueError(
                f"trainer.{name}={folder} cannot be written: {error}; name a folder that can be"
            ) from error


def is_installed(package: str) -> bool:
    """Whether ``import package`` would find something; imports nothing."""
    return importlib.util.find_spec(package) is not None


def _model_errors(config: PPOConfig) -> Iterator[str]:
    """Every model must be found or have a name that the hub may know, and be long enough by its config.json."""
    from huggingface_hub import constants

    student, teacher = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.model
    if not student.path:
        yield "actor_rollout_ref.model.path is not set; give the student's folder or hub name"
    paths = {
        "actor_rollout_ref.model.path": student.path,
        # Beside a URL it names a tokenizer, which may come without weights.
        "actor_rollout_ref.ref.model.path": None if config.actor_rollout_ref.ref.url else teacher.path,
        **{f"algorithm.distill.teachers.{name}.path": t.path for name, t in config.algorithm.distill.teachers.items()},
        "actor_rollout_ref.model.tokenizer_path": student.tokenizer_path,
        "actor_rollout_ref.ref.model.tokenizer_path": teacher.tokenizer_path,
    }
    # vLLM checks the folders of models that it serves: it takes more, such as quantised weights.
    served = [f"{teacher_key(role)}.{'model.path' * (role == BASE_TEACHER) or 'path'}" for role in config.engine_roles]
    for key, path in paths.items():
        folder = local_model_folder(path)
        # If a folder here has the owner's name, the user much more likely means a path in it than a hub name.
        if (
            path
            and folder is None
            and (constants.HF_HUB_OFFLINE or not HUB_NAME.fullmatch(path) or Path(path).parts[0] in os.listdir())
        ):
            yield (
                f"{key}={path}: there is no such folder, and it is not in the hub's cache; correct the path, or give a "
                "hub name (owner/name) without HF_HUB_OFFLINE"
            )
        if folder is None or key.endswith("tokenizer_path") or key in served:
            continue
        # From the hub, the weights may not be downloaded yet.
        is_whole = constants.HF_HUB_OFFLINE or Path(str(path)).expanduser().is_dir()
        if fault := next(_folder_faults(folder, student.trust_remote_code, is_whole), None):
            yield f"{key}={path}: {fault}"
            continue
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if key == "actor_rollout_ref.model.path":
            described |= student.override_config
            if (
                coef := config.actor_rollout_ref.actor.router_aux_loss_coef
            ) and "router_aux_loss_coef" not in described:
                yield (
                    f"actor_rollout_ref.actor.router_aux_loss_coef={coef}: config.json in {path} has no such entry, so "
                    "it is no mixture of experts with this loss; set it to 0"
                )
        if cap := described.get("final_logit_softcapping"):
            yield f"{key}={path}: its head caps its logits (final_logit_softcapping={cap}); give another model"
        yield from _size_errors(key, path, described, config)
        yield from _split_errors(key, str(folder), config)


def _folder_faults(folder: Path, trusts_code: bool, is_whole: bool) -> Iterator[str]:
    """Why a folder is no language model that can be trained or scored here, the plainest reason first.

    Args:
        trusts_code: code in it may name its architecture as it likes.
        is_whole: its weights have to be there.
    """
    files = {path.name for name in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(name)}
    shards = [place / name for place in (folder, folder.parent, folder / "actor") for name in ("shards", VERL_SHARDS)]
    path = folder / "adapter_config.json"
    try:
        if path.is_file():
            base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
            yield f"adapter_config.json makes it an adapter (LoRA) of {base}; merge it into that, and give the result"
        if not files and any(any(path.parent.glob(path.name)) for path in shards):
            yield UNMERGED
        path = folder / "config.json"
        described, path = json.loads(path.read_text(encoding="utf-8")), folder / "model.safetensors.index.json"
        if path.is_file() and "model.safetensors" not in files:
            files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError) as error:
        reason = describe_damage(path, error, "give a model folder in Hugging Face format")
        yield f"no {path.name} can be read: {reason}"
        return
    kinds, packed = described.get("architectures") or [], described.get("quantization_config") or {}
    is_text = trusts_code or all(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
    if "text_config" in described or not is_text:
        yield f"architectures={kinds} in config.json: only models of text alone are taken; give a ...ForCausalLM"
    if packed or (folder / "hf_quant_config.json").is_file():
        method = packed.get("quant_method", "modelopt")
        yield f"quantised weights (quantization_config.quant_method={method}) are not taken; give the bf16 model"
    lost = [name for name in sorted(files) if not (folder / name).is_file() or is_pointer(folder / name)]
    if is_whole and (lost or not files):
        what = ", ".join(lost[:3]) or "model*.safetensors"
        yield f"{what} missing, or a Git LFS pointer; copy the model again, or run git lfs pull where it was cloned"


def _size_errors(key: str, path: str | None, described: dict[str, Any], config: PPOConfig) -> Iterator[str]:
    """What of a run is too large for a model, by its config.json."""
    rollout, limit = config.actor_rollout_ref.rollout, position_limit(described)
    longest = rollout.prompt_length + rollout.response_length
    if limit is not None and longest > limit:
        yield (
            f"data.max_prompt_length={rollout.prompt_length} + data.max_response_length={rollout.response_length} = "
            f"{longest} is above the {int(limit)} positions that {key}={path} has by its config.json (of a rope that "
            "changes with the longest row, the original ones); shorten one of them"
        )
    replacement, rows = config.actor_rollout_ref.ref.ref_replace_token_id, described.get("vocab_size")
    if key != "actor_rollout_ref.ref.model.path" or replacement is None or rows is None:
        return
    if not 0 <= replacement < rows:
        wanted = f"an id below vocab_size={rows} of {key}={path}"
        yield f"actor_rollout_ref.ref.ref_replace_token_id={replacement} must be {wanted}, or null for the pad id"


def _split_errors(key: str, folder: str, config: PPOConfig) -> Iterator[str]:
    """Why the rows of a model cannot be split over ranks, where they are to be."""
    models = config.actor_rollout_ref
    if (ranks := models.actor.ulysses_sequence_parallel_size) == 1 or not models.model.use_remove_padding:
        return
    # torch comes with it, which --help has to do without.
    from verl.workers.fsdp.build import require_split

    try:
        require_split(folder, models.model, ranks)
    except ValueError as error:
        yield f"{key}={folder}: {error}"


def _algorithm_errors(config: PPOConfig) -> Iterator[str]:
    """The estimator must be known, and what it learns from be given."""
    # torch comes with it, which --help has to do without.
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    algorithm, coef = config.algorithm, config.algorithm.distill.coef
    try:
        get_adv_estimator_fn(algorithm.adv_estimator)
    except ValueError as error:
        yield str(error)
    ref = config.actor_rollout_ref.ref
    if algorithm.distils and not ref.model.path and not ref.url:
        why = f"algorithm.distill.coef={coef}" if coef else f"algorithm.adv_estimator={algorithm.adv_estimator}"
        key, fix = "actor_rollout_ref.ref.model.path", "give its folder or name, or set actor_rollout_ref.ref.url"
        yield f"{key} is not set, and {why} learns from a teacher; {fix}"
    if algorithm.learns_from_reward and config.custom_reward_function.path is None:
        learns = f"algorithm.adv_estimator={algorithm.adv_estimator} learns from a task reward and none is given"
        yield f"{learns}; set custom_reward_function.path"


def _data_errors(config: PPOConfig) -> Iterator[str]:
    """Every data file must be there; what is in them is for the data sets to read."""
    # pyarrow comes with it, which --help has to do without.
    from verl.utils.dataset.parquet_files import expand_data_files

    data, trainer = config.data, config.trainer
    if not data.train_files:
        yield "data.train_files is not set; give a parquet file, a folder, a glob or a list of these"
    if not data.val_files and (trainer.val_only or trainer.rules):
        what = "trainer.val_only=True" if trainer.val_only else next(iter(trainer.rules))
        yield f"{what} needs data.val_files; set it"
    files = {} if data.custom_cls.path else {"data.train_files": data.train_files, "data.val_files": data.val_files}
    if data.synthetic_item_prompts.count and data.synthetic_item_prompts.catalogue:
        files["data.synthetic_item_prompts.catalogue"] = [data.synthetic_item_prompts.catalogue]
    for key, patterns in files.items():
        for pattern in patterns or []:
            try:
                expand_data_files(pattern)
            except ValueError:
                yield f"{key}={pattern} matches no parquet file; correct the path"


def _package_errors(config: PPOConfig) -> Iterator[str]:
    if is_installed("vllm"):
        return
    if config.actor_rollout_ref.rollout.name == "vllm":
        what = "actor_rollout_ref.rollout.name=vllm needs vLLM, which is not installed"
        yield f"{what}; run deploy_env.sh, or set it to hf"
    if config.engine_roles:
        yield f"{teacher_key(config.engine_roles[0])}.engine=vllm needs vLLM, which is not installed; run deploy_env.sh"


def _output_errors(config: PPOConfig) -> Iterator[str]:
    """A resume has to read weights, Weights & Biases to accept the run, and a validation to give what rules read."""
    trainer, parts = config.trainer, config.actor_rollout_ref.actor.checkpoint.load_contents
    if "model" not in parts:
        key = f"actor_rollout_ref.actor.checkpoint.load_contents={parts}"
        yield f"{key} reads no weights, so a resumed run would begin anew at a later step; add model"
    for key, refused in (("project_name", r"[/\\#?%:]|.{129}"), ("experiment_name", ".{129}")):
        if "wandb" in trainer.logger and re.search(refused, name := getattr(trainer, key)):
            limits = "at most 128 characters, in project_name none of / \\ # ? % :"
            yield f"trainer.{key}={name} is refused by Weights & Biases; use {limits}"
    if "wandb" in trainer.logger and not _wandb_can_start():
        yield (
            f"trainer.logger={trainer.logger} needs a login to Weights & Biases, and none is set; run wandb login, "
            "set WANDB_API_KEY, or set WANDB_MODE=offline and upload the run later with wandb sync"
        )
    rollout = config.actor_rollout_ref.rollout
    for key, (names, _) in trainer.rules.items():
        if config.custom_reward_function.path is None and any(name.endswith("/reward") for name in names):
            yield f"{key} needs rewards; set custom_reward_function.path, or take another metric: 'val/reverse_kl min'"
        if not rollout.validates_policy and any(name.endswith("/reverse_kl") for name in names):
            yield f"{key} needs answers of the policy that is trained; {_validation_of_policy(rollout)}"


def _wandb_can_start() -> bool:
    """Whether Weights & Biases is offline or finds a login where it looks: environment, settings, netrc."""
    home, environ = Path.home(), os.environ
    settings = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error):
        folder = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config/wandb").expanduser()
        settings.read([folder / "settings", "wandb/settings", ".wandb/settings"])
    saved = dict(settings["default"]) if settings.has_section("default") else {}
    if (environ.get("WANDB_MODE") or saved.get("mode") or "online") not in ("online", "run"):
        return True
    # SageMaker hands a key over in files of its own.
    if saved.get("api_key") or any(
        environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "SM_TRAINING_ENV")
    ):
        return True
    files = [Path(file).expanduser()] if (file := environ.get("NETRC")) else [home / ".netrc", home / "_netrc"]
    host = urlsplit(environ.get("WANDB_BASE_URL") or saved.get("base_url") or "").netloc
    with suppress(OSError, netrc.NetrcParseError):
        logins = netrc.netrc(next((file for file in files if file.exists()), files[0]))
        return any(logins.authenticators(name) for name in (host, "api.wandb.ai"))
    return False


def _validation_of_policy(rollout: RolloutConfig) -> str:
    """How to validate with answers of the policy."""
    key, now = "actor_rollout_ref.rollout.val_kwargs", rollout.val_kwargs
    return (
        f"{key} has do_sample={now.do_sample}, temperature={now.temperature}, top_p={now.top_p} and top_k={now.top_k}: "
        f"set them to True, {rollout.temperature}, 1 and -1"
    )


def _update_notices(config: PPOConfig) -> Iterator[str]:
    """Settings of the update and of checkpoints that are allowed and seldom meant."""
    actor = config.actor_rollout_ref.actor
    if actor.use_dynamic_bsz and (rows := actor.ppo_micro_batch_size_per_gpu):
        name = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
        yield f"{name}={rows} has no effect with use_dynamic_bsz=True; set that to False to have these rows per pass"
    if actor.fsdp_config.model_dtype == "bf16" and not config.actor_rollout_ref.model.lora_rank:
        name = "actor_rollout_ref.actor.fsdp_config.model_dtype"
        yield f"{name}=bf16 stores weights and AdamW's moments so, and most steps round away; leave it at auto (fp32)"
    if (optim := actor.optim).min_lr_ratio and optim.lr_scheduler_type == "constant":
        name = "actor_rollout_ref.actor.optim.min_lr_ratio"
        yield f"{name}={optim.min_lr_ratio} has no effect with lr_scheduler_type=constant; set that to cosine or linear"
    saved, read = actor.checkpoint.save_contents, actor.checkpoint.load_contents
    if config.trainer.saves_checkpoints and (lost := [part for part in read if part not in saved]):
        what = f"actor_rollout_ref.actor.checkpoint.save_contents={saved} leaves out {' and '.join(lost)}"
        yield f"{what}, which a resumed run reads: this one cannot go on from its checkpoints; add them to have that"


def _notices(config: PPOConfig) -> Iterator[str]:
    """Other settings that are allowed and seldom meant."""
    algorithm, rollout, key = config.algorithm, config.actor_rollout_ref.rollout, "actor_rollout_ref.rollout"
    distill = algorithm.distill
    if distill.coef and rollout.extend_vocab_start_token is not None and not distill.extended_sources:
        yield (
            f"algorithm.distill.coef={distill.coef}: no teacher knows item tokens, so an answer is trained up to its "
            "first; let the frozen student score such rows: "
            "++algorithm.distill.teachers.self='{vocabulary: full, sources: [rec_*]}'"
        )
    if algorithm.adv_estimator in ("grpo", "rloo", "reinforce_plus_plus_baseline") and rollout.n == 1:
        estimator = f"algorithm.adv_estimator={algorithm.adv_estimator}"
        yield f"{estimator} compares the answers to one prompt, and {key}.n=1 gives it one; set n to 4 or more"
    ahead = f"trainer.max_staleness={config.trainer.max_staleness}" if config.trainer.max_staleness else ""
    older = ahead or (f"{key}.oversample={rollout.oversample}" if rollout.carries else "")
    if older and distill.has_policy_loss and not algorithm.rollout_correction.rollout_is:
        yield (
            f"biased: with {older} the answers come from older weights than those that are trained; in small runs a "
            f"loss on drawn tokens lost all general ability this way; set {key}.calculate_log_probs=True and "
            "algorithm.rollout_correction.rollout_is=token, with a learning rate that is not too high, or "
            "algorithm.distill.objective=exact"
        )
    if rollout.oversample > 1 and not rollout.carries:
        yield (
            f"biased: {key}.unfinished=drop trains on short answers more often than the policy writes them; compare "
            "rollout/dropped_length/mean with response_length/mean, or set it to carry"
        )
    if rollout.top_p < 1 or rollout.top_k != -1:
        yield (
            f"biased: {key}.top_p={rollout.top_p} and top_k={rollout.top_k} cut the tail off the sampler, and the loss "
            "takes its answers as the whole policy's, which importance weights do not correct; set top_p=1 and top_k=-1"
        )
    if algorithm.distils and config.data.val_files and not rollout.validates_policy:
        yield f"validation has no reverse KL, which needs answers of the policy; {_validation_of_policy(rollout)}"
