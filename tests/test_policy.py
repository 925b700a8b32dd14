"""Loading policies: dropout, LoRA, the reference, special tokens."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, errors
from transformers import GPT2Config, GPT2LMHeadModel

from gopo_lightning.distributed.fsdp import clip_grad_norm
from gopo_lightning.policy import loading as pretrained
from gopo_lightning.policy.loading import finding
from gopo_lightning.policy.model import (
    PolicyConfig,
    end_of_turn,
    eos_token_ids,
    evaluating,
    load_policy,
    load_reference,
    load_tokenizer,
    reference_of,
)
from gopo_lightning.policy.shared_prefix import supports_shared_prefix
from tests.conftest import byte_tokenizer, save_llama
from tests.runs import make_data, make_module, make_trainer


def test_dropout_is_off_in_train_mode(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    policy = load_policy(PolicyConfig(str(tmp_path))).train()
    tokens = torch.arange(20)[None]
    assert torch.equal(policy(tokens).logits, policy(tokens).logits)
    for model in (policy, load_reference(PolicyConfig(str(tmp_path)))):
        assert supports_shared_prefix(model) == (True, "")  # so a group's prompt is forwarded once


def test_lora_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_dropout=0.1"):
        PolicyConfig("x", lora={"lora_dropout": 0.1})


def test_lora_trains_the_adapter_alone_and_is_its_own_reference(tiny_policy: Path) -> None:
    config = PolicyConfig(str(tiny_policy), lora={"r": 2, "target_modules": ["q_proj"]})
    policy = load_policy(config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # begins with 0
            torch.nn.init.normal_(parameter)
    assert all(("lora_" in name) == p.requires_grad for name, p in policy.named_parameters())
    tokens = torch.arange(10)[None]
    base = load_reference(PolicyConfig(str(tiny_policy)))
    with reference_of(policy, None) as reference:
        assert torch.equal(reference(tokens).logits, base(tokens).logits)
    assert not torch.equal(policy(tokens).logits, base(tokens).logits)


def test_the_reference_of_a_fully_trained_policy_is_the_frozen_copy(tiny_policy: Path) -> None:
    policy, frozen = load_policy(PolicyConfig(str(tiny_policy))), load_reference(PolicyConfig(str(tiny_policy)))
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    with reference_of(policy, frozen) as reference:
        assert reference is frozen
    with pytest.raises(ValueError, match="load_reference"), reference_of(policy, None):
        pass


def test_pad_falls_back_to_eos_and_without_either_it_is_an_error(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "eos")
    assert load_tokenizer(PolicyConfig(str(tmp_path / "eos"))).pad_token == "<eos>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="neither a pad nor an EOS token"):
        load_tokenizer(PolicyConfig(str(tmp_path / "none")))


def test_chat_template_of_the_config_replaces_the_tokenizers(tiny_policy: Path) -> None:
    tokenizer = load_tokenizer(PolicyConfig(str(tiny_policy), chat_template="{{ messages[0]['content'] }}!"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_a_chat_template_is_text_or_a_file(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }} from ü", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("t.jinja", str(tmp_path / "t.jinja")):
        tokenizer = load_tokenizer(PolicyConfig(str(tiny_policy), chat_template=name))
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi from ü"
    for name in ("gone.jinja", "templates/gone.txt", "chatml", ""):
        with pytest.raises(ValueError, match=f"policy.chat_template='{name}' is no file, and no template"):
            load_tokenizer(PolicyConfig(str(tiny_policy), chat_template=name))


@pytest.mark.parametrize("load", [load_policy, load_reference, load_tokenizer])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nomodel", "there is no folder './nomodel' in .*Check the path, or run first what writes"),
        ("runs/quickstart/policy", "there is no folder 'runs/quickstart/policy' in"),
        ("~/nomodel", "there is no folder '~/nomodel'"),
        ("", "there is no folder ''"),
        ("a.gguf", "a.gguf is a file, but a model is a folder"),
        ("nomodel", "there is no folder 'nomodel', and HF_HUB_OFFLINE is set .*hf download nomodel"),
        ("org/nomodel", "there is no folder 'org/nomodel', and HF_HUB_OFFLINE is set"),
        ("packaged:nomodel", "no packaged asset 'nomodel'"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(
    name: str, message: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("a.gguf").touch()
    with pytest.raises(ValueError, match=message) as caught:
        load(PolicyConfig(name))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (errors.GatedRepoError, "its owner has to grant access"),
        (errors.RepositoryNotFoundError, "no model of that name on the hub"),
        (errors.RevisionNotFoundError, "the hub has no revision 'v2' of it"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_says_is_one_sentence(cause: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=message), finding("org/model", "v2"):
        raise OSError("long") from cause.__new__(cause)
    with pytest.raises(OSError, match="disk"), finding("org/model"):
        raise OSError("disk")


def test_all_eos_ids_end_a_completion(tiny_policy: Path) -> None:
    policy = load_policy(PolicyConfig(str(tiny_policy)))
    tokenizer = load_tokenizer(PolicyConfig(str(tiny_policy)))
    assert eos_token_ids(policy, tokenizer) == (tokenizer.eos_token_id,)
    policy.generation_config.eos_token_id = [5, tokenizer.eos_token_id, 7]
    assert eos_token_ids(policy, tokenizer) == (5, tokenizer.eos_token_id, 7)
    policy.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS"):
        eos_token_ids(policy, tokenizer)


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_end|>", " <eos>"), "<eos>"),
        (CHATML.replace("<|im_end|>", ""), None),
        (CHATML.replace("<|im_end|>", "\n\nHuman:"), None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_special_token_that_ends_an_answer(template: str, end: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


@pytest.mark.parametrize(
    ("apply", "ids", "warns"), [("always", 257, True), ("always", [257, 260], False), ("never", 257, False)]
)
def test_answers_that_would_not_end_are_warned_about(
    apply: Any, ids: Any, warns: bool, prompts_file: Path, tmp_path: Path
) -> None:
    save_llama(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    model = load_policy(PolicyConfig(str(tmp_path)))
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = ids
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = make_data(prompts_file, apply_chat_template=apply)
        make_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(make_module(tmp_path), data)
    said = [str(w.message) for w in caught if "would run on after their end" in str(w.message)]
    assert len(said) == warns
    if warns:
        assert "ends an answer with <|im_end|> (id 260), but completions end with <eos> alone" in said[0]


def test_evaluating_restores_the_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)).train()
    model[0].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model[1].training
        raise RuntimeError
    assert model.training and model[1].training and not model[0].training


def test_clip_grad_norm_scales_to_the_limit() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_grad_norm(model, 1.0).item() == 5
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))
