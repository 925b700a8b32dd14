"""LoRA: the options that are taken, adapters that are trained on, and a reference that is the policy of step 0."""

import json
import shutil
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from gopo_lightning.distributed.fsdp import reshard
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy import adapters
from gopo_lightning.policy.adapters import KeptWeights, lora_config
from gopo_lightning.policy.loading import fingerprint
from gopo_lightning.policy.model import Policy, PolicyConfig, load_policy, load_tokenizer, reference_of
from gopo_lightning.policy.sharded_loading import policy_without_weights
from gopo_lightning.rewards import LocalJudge, SequenceClassifierReward
from gopo_lightning.training.callbacks.export import export_policy
from gopo_lightning.training.placement import PlacementConfig, Reference
from gopo_lightning.training.reward_model import RewardModelModule
from gopo_lightning.types import Prompt
from tests.conftest import byte_tokenizer
from tests.ranks import Case, assert_same_run, launch, on, sharded_policy
from tests.runs import make_data, make_module, make_trainer

TOKENS = torch.arange(60, 80)[None]
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model whose linear layers have biases."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        vocab_size=259, num_hidden_layers=2, initializer_range=0.2, tie_word_embeddings=False, eos_token_id=257, **sizes
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter on ``qwen``, with dropout in its settings and a bias, and the tokenizer of its base alone."""
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(AutoModelForCausalLM.from_pretrained(qwen), folder, "CAUSAL_LM", lora_dropout=0.1, bias="lora_only")
    return folder


def make_adapter(model: Any, folder: Path, task_type: Any, **options: Any) -> None:
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(task_type=task_type, **LORA | options))
    disturb(peft)
    peft.save_pretrained(str(folder))


def disturb(policy: nn.Module) -> None:
    """As if trained for long."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(TOKENS).logits.clone()


def reference(config: PolicyConfig, policy: Policy) -> Callable[[], Tensor]:
    """The logits of the reference of ``policy``, which is to be at step 0 now."""
    kept = Reference(config, PlacementConfig())
    kept.remember(policy)

    def compute() -> Tensor:
        with kept.of(policy) as model:
            return logits(model)

    return compute


def assert_exact(config: PolicyConfig, base: Path, folder: Path) -> None:
    """The reference is the policy of step 0, before and after training, and the export is the trained policy."""
    policy = load_policy(config)
    compute, before = reference(config, policy), logits(policy)
    torch.testing.assert_close(compute(), before, rtol=0, atol=1e-6)
    disturb(policy)
    trained = logits(policy)
    assert (trained - before).abs().max() > 0.01
    torch.testing.assert_close(compute(), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(policy), trained, rtol=0, atol=0)
    export_policy(policy, byte_tokenizer(), folder)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the reference


def initialisations() -> list[Any]:
    """All that peft knows."""
    named = get_args(next(f for f in fields(LoraConfig) if f.name == "init_lora_weights").type)
    texts = {text for kind in named for text in get_args(kind) if "[" not in text}
    return [True, False, *sorted(texts | {"pissa_niter_2", "loftq", "lora_ga"})]


@pytest.mark.parametrize("initial", initialisations())
def test_an_initialisation_begins_as_the_base_or_is_refused(initial: Any, qwen: Path, tmp_path: Path) -> None:
    try:
        config = PolicyConfig(str(qwen), lora=LORA | {"init_lora_weights": initial})
    except ValueError as error:
        assert f"policy.lora.init_lora_weights={initial!r}" in str(error) and "se true" in str(error)  # noqa: PT017
        assert initial not in (True, "gaussian", "orthogonal")
    else:
        torch.testing.assert_close(
            logits(load_policy(config)), logits(load_policy(PolicyConfig(str(qwen)))), rtol=0, atol=1e-6
        )
        assert_exact(config, qwen, tmp_path / "export")


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"bias": None},
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [65, 66]},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]},
        {"task_type": "CAUSAL_LM", "peft_type": "LORA", "loftq_config": {}, "megatron_core": "megatron.core"},
    ],
    ids=str,
)
def test_the_reference_is_the_policy_of_step_0(options: dict[str, Any], qwen: Path, tmp_path: Path) -> None:
    assert_exact(PolicyConfig(str(qwen), lora=LORA | options), qwen, tmp_path / "export")


def test_an_adapter_is_trained_on(adapter: Path, qwen: Path, tmp_path: Path) -> None:
    config = PolicyConfig(str(adapter))
    policy = load_policy(config)
    torch.testing.assert_close(logits(policy), logits(AutoModelForCausalLM.from_pretrained(adapter)))
    assert {n for n, p in policy.named_parameters() if p.requires_grad} >= {
        n for n, _ in policy.named_parameters() if "lora_" in n
    }
    assert torch.equal(policy.train()(TOKENS).logits, policy(TOKENS).logits)  # its dropout is off
    assert load_tokenizer(config).eos_token == "<eos>"
    assert_exact(config, qwen, tmp_path / "export")


def kl_of(folder: Path, prompts_file: Path, policy: PolicyConfig, *, resume: Path | None = None, **trainer: Any) -> Any:
    """train/kl of the last step; the checkpoint of step 2 is left as ``<folder>/2.ckpt``."""
    torch.manual_seed(9 if resume is None else 10)
    module = make_module(folder, policy=policy, loss=ClippedSurrogate(kl_coef=0.1), optimizer=adamw)
    fitting = make_trainer(folder, **{"max_steps": 2, "limit_val_batches": 0} | trainer)
    fitting.fit(module, make_data(prompts_file), ckpt_path=resume)
    if fitting.global_step == 2:
        fitting.save_checkpoint(folder / "2.ckpt")
    return float(fitting.callback_metrics["train/kl"])


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


@pytest.mark.parametrize("kind", ["lora", "bias", "adapter", "full"])
def test_kl_begins_at_zero_and_goes_on_after_a_resume(
    kind: str, qwen: Path, adapter: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = {
        "lora": PolicyConfig(str(qwen), lora=LORA),
        "bias": PolicyConfig(str(qwen), lora=LORA | {"bias": "all"}),
        "adapter": PolicyConfig(str(adapter)),
        "full": PolicyConfig(str(qwen)),
    }[kind]
    assert kl_of(tmp_path, prompts_file, config, max_steps=1) == pytest.approx(0, abs=1e-9)
    whole = kl_of(tmp_path, prompts_file, config, max_steps=3)
    kl_of(tmp_path, prompts_file, config)
    resumed = kl_of(tmp_path, prompts_file, config, max_steps=3, resume=tmp_path / "2.ckpt")
    assert whole > 1e-4
    assert resumed == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
def test_bfloat16_rounds_policy_and_reference_alike(
    lora: dict[str, Any] | None, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = PolicyConfig(str(tiny_policy), lora=lora)
    assert kl_of(tmp_path, prompts_file, config, max_steps=1, precision="bf16-true") == 0


def initial_weights_of_shards(rank: int, folder: Path) -> dict[str, Any]:
    """Logits at the beginning, of the reference after training, and of what was trained before and after it."""
    policy = sharded_policy(PolicyConfig(str(folder)))
    initial, before = KeptWeights.of(policy), logits(policy)
    reshard(policy)
    disturb(policy)
    trained = logits(policy)
    reshard(policy)
    with reference_of(policy, initial) as model:  # type: ignore[arg-type]
        reference = logits(model)
        reshard(model)
    return {"before": before, "reference": reference, "trained": trained, "after": logits(policy)}


def test_the_reference_of_a_sharded_adapter(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    make_adapter(AutoModelForCausalLM.from_pretrained(tiny_policy), adapter, "CAUSAL_LM")
    run = Case("run", "ddp", max_steps=2, kl_coef=0.1)
    launch([run, on("fsdp2", run), initial_weights_of_shards], adapter, prompts_file, tmp_path, 2)
    assert_same_run(tmp_path, "fsdp2-run", "run")
    expected = logits(load_policy(PolicyConfig(str(adapter))))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"initial_weights_of_shards.{rank}.pt")
        torch.testing.assert_close(found["before"], expected)
        torch.testing.assert_close(found["reference"], expected)
        assert (found["trained"] - expected).abs().max() > 0.01
        torch.testing.assert_close(found["after"], found["trained"])


# ------------------------------------------------------------------ a resume


@pytest.mark.parametrize(
    "options", [{"lora_alpha": 16}, {"r": 2}, {"target_modules": ["q_proj"]}, {"use_rslora": True}]
)
def test_another_adapter_is_not_resumed(
    options: dict[str, Any], qwen: Path, prompts_file: Path, tmp_path: Path
) -> None:
    kl_of(tmp_path, prompts_file, PolicyConfig(str(qwen), lora=LORA))
    (name,) = options
    with pytest.raises(ValueError, match=f"policy.lora.{name} .* → .*"):
        kl_of(tmp_path, prompts_file, PolicyConfig(str(qwen), lora=LORA | options), resume=tmp_path / "2.ckpt")


@pytest.mark.parametrize("lora", [None, LORA])
def test_another_base_is_not_resumed_and_a_moved_one_is(
    lora: dict[str, Any] | None, qwen: Path, prompts_file: Path, tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved" / qwen.name, tmp_path / "other"
    shutil.copytree(qwen, moved)
    shutil.copytree(qwen, other)
    weights = load_file(qwen / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    kl_of(tmp_path, prompts_file, PolicyConfig(str(qwen), lora=lora))
    kl_of(tmp_path, prompts_file, PolicyConfig(str(moved), lora=lora), resume=tmp_path / "2.ckpt", max_steps=3)
    with pytest.raises(ValueError, match=r"policy.base qwen0 \(\w{16}\) → other \(\w{16}\)"):
        kl_of(tmp_path, prompts_file, PolicyConfig(str(other), lora=lora), resume=tmp_path / "2.ckpt")
    module = make_module(tmp_path, policy=PolicyConfig(str(other), lora=lora))
    with pytest.raises(ValueError, match="policy.base"):
        make_trainer(tmp_path).validate(module, make_data(prompts_file), ckpt_path=tmp_path / "2.ckpt")


def test_a_fingerprint_does_not_depend_on_the_files(qwen: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(qwen).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shutil.copy(qwen / "config.json", tmp_path)
    assert fingerprint(tmp_path) == fingerprint(qwen)


def test_an_adapter_that_was_replaced_is_not_resumed(adapter: Path, prompts_file: Path, tmp_path: Path) -> None:
    mine = tmp_path / adapter.name
    shutil.copytree(adapter, mine)
    kl_of(tmp_path, prompts_file, PolicyConfig(str(mine)))
    weights = {name: value + 0.1 for name, value in load_file(mine / "adapter_model.safetensors").items()}
    save_file(weights, mine / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="policy.adapter"):
        kl_of(tmp_path, prompts_file, PolicyConfig(str(mine)), resume=tmp_path / "2.ckpt")


# -------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "policy.lora has no option rank. For rank try r. There are: .*lora_alpha"),
        ({"lora_alfa": 4}, "For lora_alfa try lora_alpha"),
        ({"xyz": 4}, "policy.lora has no option xyz. There are"),
        ({"task_type": "SEQ_CLS"}, "policy.lora.task_type='SEQ_CLS': here it is always CAUSAL_LM. Leave it out"),
        ({"peft_type": "LOHA"}, "always LORA"),
        ({"inference_mode": True, "revision": "x"}, "policy.lora holds inference_mode, revision, which belong to"),
        ({"lora_alpha": 0}, "nothing is trained"),
        ({"r": 0}, "policy.lora=.*r"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any], message: str, qwen: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(PolicyConfig(str(qwen), lora=LORA | options))


@pytest.mark.parametrize(
    "field",
    [field for field in fields(LoraConfig) if field.init and field.name not in adapters._TAKEN],
    ids=lambda field: field.name,
)
def test_no_option_of_peft_is_taken_unseen(field: Any) -> None:
    """An option that a later peft brings is refused until someone has looked at it."""
    default = field.default if field.default is not MISSING else field.default_factory()
    value = {"x": 1} if not default else f"not {default}"
    with pytest.raises(ValueError, match=f"policy.lora.*{field.name}"):
        lora_config({field.name: value}, task_type="CAUSAL_LM", option="policy.lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nothing"]}, "policy.lora=.*nothing.*The linear layers are down_proj, .*q_proj"),
        ({"target_modules": ["q_proj", "nothing"]}, "policy.lora.target_modules: the model has no nothing"),
        ({"modules_to_save": ["nothing"]}, "policy.lora.modules_to_save: the model has no nothing"),
        ({"rank_pattern": {"up_proj": 2}}, "policy.lora.rank_pattern: the model has no up_proj to adapt"),
    ],
)
def test_names_that_match_nothing_are_refused(options: dict[str, Any], message: str, qwen: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(PolicyConfig(str(qwen), lora=LORA | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "model.lora has no option rank. For rank try r"),
        ({"task_type": "CAUSAL_LM"}, "always SEQ_CLS"),
        ({"target_modules": ["nothing"]}, "model.lora=.*The linear layers are"),
    ],
)
def test_options_of_a_reward_model_are_checked_too(options: dict[str, Any], message: str, qwen: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModelModule(str(qwen), lora=LORA | options)
    RewardModelModule(str(qwen), lora=LORA | {"task_type": "SEQ_CLS"})


# ------------------------------------------------------------- adapter folders


def test_a_new_adapter_does_not_take_the_place_of_a_saved_one(adapter: Path) -> None:
    with pytest.raises(ValueError, match="is an adapter, and policy.lora would put a new one in its place. Leave lora"):
        load_policy(PolicyConfig(str(adapter), lora=LORA))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3 and task_type CAUSAL_LM; LORA and CAUSAL_LM are needed"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS; LORA and CAUSAL_LM are needed"),
        ({"init_lora_weights": "pissa_niter_4"}, "begun with init_lora_weights=pissa_niter_4, which changes the base"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"base_model_name_or_path": "./gone"}, "was trained on './gone': there is no folder .*Correct base_model"),
        ({"base_model_name_or_path": None}, "Correct base_model_name"),
        ({"target_modules": ["q_proj"]}, "does not fit the model it names: 4 tensors differ"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "does not fit the model it names"),
    ],
)  # fmt: skip
def test_a_saved_adapter_that_cannot_be_trained_on_is_refused(
    change: dict[str, Any], message: str, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bias": "none"} | change))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "lora_" in k}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_policy(PolicyConfig(str(folder)))


def test_a_pickled_adapter_is_not_loaded(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(ValueError, match="they may run code"):
        load_policy(PolicyConfig(str(tmp_path / "pickled")))


def test_a_saved_adapter_is_not_read_by_shards(adapter: Path) -> None:
    with pytest.raises(ValueError, match="placement.load: whole"):
        policy_without_weights(PolicyConfig(str(adapter)))


def test_a_reward_model_and_a_judge_may_be_adapters(qwen: Path, adapter: Path, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(qwen, num_labels=1, pad_token_id=258)
    make_adapter(classifier, tmp_path / "rm", "SEQ_CLS")
    reward = SequenceClassifierReward(str(tmp_path / "rm"), micro_batch_size=1, template="plain")
    reward.setup(CPU)
    prompt = Prompt(0, (1,), "say ")
    judge = LocalJudge(str(adapter), dtype="float32", template="plain")
    judge.setup(CPU)
    assert reward.model is not None and judge.model is not None
    with torch.no_grad():
        trained = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(qwen, num_labels=1, pad_token_id=258),
            str(tmp_path / "rm"),
        ).eval()
        text = byte_tokenizer()("say it", return_tensors="pt")
        expected = trained(text["input_ids"]).logits[0]
    torch.testing.assert_close(reward([prompt], ["it"]), expected)
    torch.testing.assert_close(logits(judge.model), logits(AutoModelForCausalLM.from_pretrained(adapter)))
    with pytest.raises(ValueError, match="LORA and SEQ_CLS are needed"):
        SequenceClassifierReward(str(adapter)).setup(CPU)
