"""How a model is loaded: attention, dropout, blocks, and models that cannot be used."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from support.tiny_workers import load_plain, whole, write_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from verl.config import FSDPConfig, HFModelConfig, MixedPrecisionConfig
from verl.ops import attention
from verl.ops.attention import PACKED_SDPA, PACKED_VARLEN, packed_sdpa_attention, packed_varlen_attention
from verl.single_controller.base import Worker
from verl.workers.fsdp import build as build_module
from verl.workers.fsdp.build import build_model, choose_attention, load_config
from verl.workers.fsdp.token_stats_model import TokenStatsModel

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def mesh() -> DeviceMesh:
    """One rank on the CPU."""
    Worker().init_process_group("gloo")
    return init_device_mesh("cpu", (1,))


@pytest.mark.parametrize(
    ("config", "packed"),
    [
        (Qwen3Config(), True),
        (Qwen2Config(), True),
        (LlamaConfig(), True),
        (MistralConfig(sliding_window=128), False),
        (Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=128, max_window_layers=2), False),
    ],
)
def test_rows_are_packed_where_attention_is_only_causal(config: PretrainedConfig, packed: bool) -> None:
    chosen = choose_attention(config, HFModelConfig(), "cpu", torch.float32)
    assert chosen == ((PACKED_SDPA, True) if packed else ("sdpa", False))
    wanted = HFModelConfig(override_config={"attn_implementation": "eager"})
    assert choose_attention(config, wanted, "cpu", torch.float32) == ("eager", False)
    padded = HFModelConfig(use_remove_padding=False)
    assert choose_attention(config, padded, "cpu", torch.float32) == ("sdpa", False)


@pytest.mark.parametrize("kernel", ["sdpa", PACKED_SDPA, PACKED_VARLEN])
def test_kernels_that_would_drop_a_cap_are_refused(kernel: str) -> None:
    wanted = HFModelConfig(override_config={"attn_implementation": kernel})
    with pytest.raises(ValueError, match=f"attn_implementation='{kernel}' drops what attention of Gemma2Config has"):
        choose_attention(transformers.Gemma2Config(), wanted, "cpu", torch.float32)
    uncapped = transformers.Gemma2Config(attn_logit_softcapping=None)
    assert choose_attention(uncapped, wanted, "cpu", torch.float32)[0] == kernel


def test_flash_attention_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose_attention(Qwen3Config(), HFModelConfig(), "cuda", torch.bfloat16) == (PACKED_VARLEN, True)
    assert choose_attention(MistralConfig(sliding_window=9), HFModelConfig(), "cuda", torch.bfloat16)[0] == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_attention(Qwen3Config(), HFModelConfig(), "cuda", torch.bfloat16) == (PACKED_SDPA, True)
    monkeypatch.setattr(build_module, "is_flash_attn_2_available", lambda: True)
    assert choose_attention(Qwen3Config(), HFModelConfig(), "cuda", torch.bfloat16) == ("flash_attention_2", True)
    assert choose_attention(Qwen3Config(), HFModelConfig(), "cuda", torch.float32) == (PACKED_SDPA, True)
    assert choose_attention(Qwen3Config(), HFModelConfig(), "cpu", torch.bfloat16) == (PACKED_SDPA, True)


def varlen_on_cpu(q, k, v, ends, ends_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What torch's kernel computes with these arguments, for causal rows: (N, H, d) in and out."""
    assert window_size == (-1, 0) and ends.dtype == torch.int32 and ends is ends_k
    assert longest == longest_k == int(ends.diff().max())
    rows = [tensor.transpose(0, 1).tensor_split(ends[1:-1].long(), dim=1) for tensor in (q, k, v)]
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=enable_gqa)
    return torch.cat([attend(*row) for row in zip(*rows, strict=True)], dim=1).transpose(0, 1)


@pytest.mark.parametrize("in_one_call", [False, True])
def test_packed_attention_is_attention_row_by_row(in_one_call: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    monkeypatch.setattr(attention, "varlen_attn", varlen_on_cpu)
    ends = {"cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32), "max_length_q": 4}
    function = packed_varlen_attention if in_one_call else packed_sdpa_attention
    packed, _ = function(nn.Module(), query, key, value, None, **ends if in_one_call else {"row_lengths": (3, 4)})
    scores = (query @ key.repeat_interleave(2, dim=1).transpose(-1, -2)) / 8**0.5
    row = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    visible = (row[:, None] == row[None, :]) & torch.ones(7, 7).tril().bool()
    right = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(packed, right.transpose(1, 2))
    with pytest.raises(ValueError, match="packed attention knows no softcap"):
        function(nn.Module(), query, key, value, None, softcap=30.0)


def test_a_model_whose_rows_are_one_kernel_call_loads_and_is_its_own(
    student_model: Path, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own logits are those of rows alone, which the model gives its attention without boundaries.
    monkeypatch.setattr(attention, "varlen_attn", varlen_on_cpu)
    model = HFModelConfig(override_config={"attn_implementation": PACKED_VARLEN})
    assert build_model(str(student_model), model, FSDPConfig(), mesh, trainable=True).packed


def test_a_config_is_overridden_and_has_no_dropout(student_model: Path, tmp_path: Path, caplog) -> None:
    config = json.loads((student_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    model = HFModelConfig(override_config={"rms_norm_eps": 0.5, "attn_implementation": "sdpa"})
    loaded = load_config(str(tmp_path), model)
    assert (loaded.attention_dropout, loaded.rms_norm_eps) == (0.0, 0.5) and "attention_dropout=0.1" in caplog.text
    with pytest.raises(ValueError, match=r"override_config\.rms_norm=0\.5: Qwen3Config has no such entry"):
        load_config(str(tmp_path), HFModelConfig(override_config={"rms_norm": 0.5}))


@pytest.mark.parametrize("name", ["flash_attention_2", PACKED_VARLEN])
def test_flash_kernels_get_the_row_boundaries_in_their_form(name: str, student_model: Path) -> None:
    model = TokenStatsModel(load_plain(student_model), packed=True)
    assert model._row_boundaries(None) == {}
    model.causal_lm.config._attn_implementation = name
    arguments = model._row_boundaries((3, 1, 4))
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 3, 4, 8]
    assert arguments["cu_seq_lens_q"].dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == 4


@pytest.mark.parametrize(
    ("trainable", "fsdp", "dtype"),
    [
        (True, FSDPConfig(mixed_precision=MixedPrecisionConfig(param_dtype="bf16")), torch.float32),
        (False, FSDPConfig(mixed_precision=MixedPrecisionConfig(param_dtype="bf16")), torch.bfloat16),
        (True, FSDPConfig(model_dtype="bf16"), torch.bfloat16),
        (False, FSDPConfig(), torch.float32),
    ],
)
def test_precision_of_stored_weights(
    trainable: bool, fsdp: FSDPConfig, dtype: torch.dtype, student_model: Path, mesh: DeviceMesh
) -> None:
    module = build_model(str(student_model), HFModelConfig(), fsdp, mesh, trainable=trainable)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert {parameter.requires_grad for parameter in module.parameters()} == {trainable}
    sharded = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    assert sharded == ["", "causal_lm.model.layers.0", "causal_lm.model.layers.1"]
    causal_lm = module.causal_lm
    assert causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight


@pytest.mark.parametrize(("tied", "packed"), [(True, True), (False, False)])
def test_a_model_takes_memory_as_shards_alone(
    tied: bool, packed: bool, tiny_tokenizers: tuple[Path, Path], mesh: DeviceMesh, monkeypatch, tmp_path: Path
) -> None:
    """FSDP is given a model without memory, on rank 0 too; what comes of it is the folder's, buffers included."""
    given: list[tuple[str, str]] = []

    def shard(module: nn.Module, **options: Any) -> None:
        given.extend(
            (name, tensor.device.type) for name, tensor in (*module.named_parameters(), *module.named_buffers())
        )
        fully_shard(module, **options)

    monkeypatch.setattr(build_module, "fully_shard", shard)
    path, settings = write_model(tmp_path, tiny_tokenizers[1], tied=tied), HFModelConfig(use_remove_padding=packed)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    module = build_model(str(path), settings, FSDPConfig(), mesh, trainable=True)
    assert {device for _, device in given} == {"meta"} and any("inv_freq" in name for name, _ in given)
    plain = load_plain(path)
    right = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    found = {**dict(module.causal_lm.named_parameters()), **dict(module.causal_lm.named_buffers())}
    assert found.keys() == right.keys() and ("lm_head.weight" in found) != tied
    assert all(torch.equal(whole(found[name]), value) for name, value in right.items())
    assert module.causal_lm.generation_config.eos_token_id == [1, 2]


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8}


@pytest.mark.parametrize(
    ("kind", "more", "head"),
    [
        ("LlamaConfig", {"tie_word_embeddings": True}, None),
        ("GPTNeoXConfig", {}, None),
        ("StableLmConfig", {"num_key_value_heads": 4}, "pack"),  # its decoder keeps row lengths to itself
        ("NemotronConfig", {"num_key_value_heads": 4}, "pack"),
        ("FalconH1Config", {**MAMBA, "num_key_value_heads": 4, "lm_head_multiplier": 0.25}, lambda x: x / 0.25),
        (
            "RecurrentGemmaConfig",
            {"num_key_value_heads": 1, "lru_width": 32, "logits_soft_cap": 9.0},
            lambda x: 9 * (x / 9).atanh(),
        ),
    ],
)
def test_a_model_is_refused_whose_scores_would_not_be_its_own(
    kind: str, more: dict[str, Any], head: Any, mesh: DeviceMesh, tmp_path: Path
) -> None:
    """By as much as float64 gives: where the pack counts as one row, or its logits as they leave the head's matrix."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **more)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    ids = torch.arange(12) * 7 % 96  # rows of 6 and 4 tokens, of which the last predicts nothing
    rows, places = (ids[:5], ids[6:9]), torch.cat([torch.arange(5), torch.arange(3)])
    with torch.no_grad():
        own = torch.cat([model.double()(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        if head == "pack":
            mask = torch.full((1, 1, 8, 8), -torch.inf).double().triu(1)
            inputs = {"input_ids": torch.cat(rows)[None], "position_ids": places[None], "attention_mask": mask}
            taken = model(**inputs, use_cache=False).logits[0]
        else:
            taken = head(own) if head else own
    distance = (taken.log_softmax(-1) - own.log_softmax(-1)).abs().mean().item()
    for packed in (True, False):
        settings, is_right = HFModelConfig(use_remove_padding=packed), not head or (head == "pack" and not packed)
        with nullcontext() if is_right else pytest.raises(ValueError, match=f"{kind[:-6]}.* is scored other") as caught:
            build_model(str(tmp_path), settings, FSDPConfig(), mesh, trainable=True)
        if caught is not None:
            found = str(caught.value).partition(", by ")[2].partition(" nats")[0]
            assert float(found) == pytest.approx(distance, rel=1e-2)


def test_a_model_whose_files_lack_weights_is_refused(student_model: Path, mesh: DeviceMesh, tmp_path: Path) -> None:
    folder = shutil.copytree(student_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = weights.popitem()[0]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder} lacks 1 weights of its model \({lost}\); copy it again"):
        build_model(str(folder), HFModelConfig(), FSDPConfig(), mesh, trainable=False)


def test_ranks_have_to_read_one_config(student_model: Path, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[str], own: str) -> None:
        found[:] = [own, own.replace('"qwen3"', '"qwen2"')]

    monkeypatch.setattr(build_module.dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match=f"the ranks read different configs of {student_model}; give a folder"):
        build_model(str(student_model), HFModelConfig(), FSDPConfig(), mesh, trainable=False)


def test_a_student_whose_files_hold_buffers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"m cannot be trained: its files hold 3 buffers \(num_batches_tracked\)"):
        build_module._require_no_buffers("m", nn.BatchNorm1d(4))


def test_gradients_are_reduced_in_the_precision_that_is_set(student_model: Path, mesh: DeviceMesh, monkeypatch) -> None:
    seen: list[Any] = []

    def shard(module: nn.Module, **options: Any) -> None:
        seen.append(options["mp_policy"])
        fully_shard(module, **options)

    monkeypatch.setattr(build_module, "fully_shard", shard)
    half = FSDPConfig(mixed_precision=MixedPrecisionConfig(param_dtype="bf16"))
    build_model(str(student_model), HFModelConfig(), half, mesh, trainable=True)
    assert {(each.param_dtype, each.reduce_dtype) for each in seen} == {(torch.bfloat16, torch.float32)}
